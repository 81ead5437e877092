"""Problems made of measured tables: what stages cost, what is refused, and that searches run on their authors' input."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from method_cases import peer
from planner_cases import small_cluster

from autopar.cluster.presets import preset
from autopar.cluster.spec import Cluster, Device, Link
from autopar.cost.collectives import collective_s
from autopar.plan import Plan, Stage
from autopar.planner.alleviate import differences
from autopar.planner.auto import auto
from autopar.planner.inputs.aceso_tables import AcesoProfile, ProfiledOp, read_aceso
from autopar.planner.inputs.layer_dag import Choice, Edge, Layer, LayerAt, LayerDag, LayerMachine
from autopar.planner.inputs.pipedream_text import ProfiledGraph, ProfiledNode, read_pipedream
from autopar.planner.inputs.piper_json import read_piper
from autopar.planner.inputs.table_costs import FORWARD_SHARE, TableCosts, at_size
from autopar.planner.inputs.table_problem import aceso_problem, pipedream_problem, piper_problem, table_problem
from autopar.planner.methods.aceso import aceso
from autopar.planner.methods.exhaustive import exhaustive
from autopar.planner.methods.pipedream import pipedream
from autopar.planner.methods.piper import piper
from autopar.planner.pricing import Piece, StagePrices, assemble
from autopar.planner.problem import Constraints, Problem
from autopar.planner.search import METHODS
from autopar.planner.shapes import Shape
from autopar.simulate import at_rest_bytes, simulate

GIB = 2**30
SIZES, DEGREES = (1, 2, 4), (1, 2)


def random_tables(seed: int, num_layers: int = 5, sizes=SIZES, degrees=DEGREES, skips: bool = True):
    """Tables of one DAG of layers: recomputation costs time and keeps less, tensor ranks share time and bytes."""
    draw = random.Random(seed)
    pairs = [(v, v + 1) for v in range(num_layers - 1)]
    pairs += [(v, v + 2) for v in range(num_layers - 2) if skips and draw.random() < 0.5]
    kinds = [draw.randrange(2) for _ in range(num_layers)]
    drawn = {
        kind: (draw.uniform(1, 4) * 1e-3, draw.uniform(1, 8) * 2**20, draw.randrange(1, 9) * 2**20) for kind in (0, 1)
    }
    tables = {}
    for size in sizes:
        layers = []
        for v, kind in enumerate(kinds):
            time_s, each, parameters = drawn[kind]
            at = {}
            for t in degrees:
                s, kept = time_s * size**0.9 / t**0.8, each * size / t
                passed_s = s * 0.4 if kind else None
                choices = (
                    Choice("keep", s, kept, 8 * parameters / t, passed_s, kept / 4, kept / 2),
                    Choice("again", 1.4 * s, kept / 10, 8 * parameters / t, passed_s, kept / 4, kept),
                )
                shared = {e: 1e4 * size if t > 1 else 0.0 for e, pair in enumerate(pairs) if v in pair}
                at[t] = LayerAt(choices, parameters / t, shared)
            layers.append(Layer(f"layer {v}", at))
        tables[size] = LayerDag(tuple(layers), tuple(Edge(u, v, 1e6 * size) for u, v in pairs))
    return tables


def problem_of(seed: int, world: int = 4, batch: int = 8, skips: bool = True, **pinned) -> Problem:
    """Random tables; two hosts at every other seed."""
    cluster = small_cluster(world, world // 2 if seed % 2 and world > 1 else world)
    return table_problem(random_tables(seed, skips=skips), cluster, batch, Constraints(**pinned))


def v100s(world: int, memory_gib: int = 32) -> Cluster:
    """The machine that Aceso's tables are of: V100s of 32 GB with 11 GB/s between any two of a host."""
    device = Device("V100", memory_gib * GIB, {"float32": 15.7e12}, 900e9, 0.0, 0.0, asynchronous=False)
    return Cluster(device, 1, world, Link(1e-5, 11e9), Link(1e-5, 11e9), "the profile")


def gpt_problem(num_layers: int, batch: int, memory_gib: int = 32, world: int = 4, **pinned) -> Problem:
    profile = read_aceso(peer("aceso/profiles/gpt_1_3B_mbs1_tp1_algo0.csv").parent, "gpt_1_3B")
    return aceso_problem(profile, num_layers, v100s(world, memory_gib), batch, Constraints(**pinned))


def check(problem: Problem, plan: Plan) -> None:
    """It runs the graph, fits, and takes as long and as much memory as the simulator says of the finished plan."""
    plan.validate(problem.graph, problem.cluster)
    line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
    assert plan.prediction.step_time_s == pytest.approx(line.step_time_s, rel=1e-9)
    assert plan.prediction.peak_memory_bytes == max(line.peak_memory_bytes.values())
    assert plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes


def random_plan(problem: Problem, draw: random.Random) -> Plan:
    """Cuts, degrees that differ from stage to stage, recomputation per block."""
    num, rows = len(problem.graph.blocks), problem.graph.batch_size
    stops = [*sorted(draw.sample(range(1, num), draw.randrange(0, 3))), num]
    microbatches, stages, first = draw.choice([1, 2, 4]), [], 0
    for start, stop in itertools.pairwise((0, *stops)):
        data, tensor = draw.choice([1, 2]), draw.choice([1, 2])
        ranks = tuple(range(first, first + data * tensor))
        first += data * tensor
        recompute = tuple(draw.choice(["none", "full"]) for _ in range(start, stop))
        axes = (tensor,) if tensor > 1 else ()
        stages.append(Stage(start, stop, ranks, data, axes, ((0,) * (stop - start),) * len(axes), recompute))
    return Plan(problem.graph.name, "", first, rows, microbatches, "1f1b", tuple(stages))


@pytest.mark.parametrize("seed", range(20))
def test_stage_costs_are_sums_of_the_rows(seed):
    problem, tables, draw = problem_of(seed, 16), random_tables(seed), random.Random(seed)
    plan = random_plan(problem, draw)
    for index, stage in enumerate(plan.stages):
        rows = plan.batch_size // plan.microbatches // stage.data
        found, size = problem.costs.stage(plan, index), min(rows, SIZES[-1])
        dag, more = tables[size], rows / size
        forward_s = backward_s = each = state = parameters = again = 0.0
        peaks = [0.0, 0.0]
        for b, recompute in zip(range(stage.start, stage.stop), stage.recompute, strict=True):
            at = dag.layers[b].at[stage.tensor]
            choice = at.choices[recompute == "full"]
            passed_s = FORWARD_SHARE * at.choices[0].time_s if choice.forward_s is None else choice.forward_s
            forward_s, backward_s = forward_s + more * passed_s, backward_s + more * (choice.time_s - passed_s)
            each, again = each + more * choice.each_bytes, again + more * at.choices[0].each_bytes
            state, parameters = state + choice.rest_bytes, parameters + at.parameter_bytes
            peaks[0] = max(peaks[0], more * choice.forward_peak_bytes)
            peaks[1] = max(peaks[1], more * choice.backward_peak_bytes)
        inside = range(stage.start, stage.stop)
        crossing = [(e.source in inside) != (e.target in inside) for e in dag.edges]
        shared = 1e4 * rows * sum(crossing) if stage.tensor > 1 else 0.0
        synchronised_s = shared / problem.cluster.link(stage.ranks[: stage.tensor]).bandwidth_bytes_per_s
        assert found.forward_s == pytest.approx(forward_s + synchronised_s)
        assert found.backward_s == pytest.approx(backward_s + synchronised_s)
        assert found.activation_bytes == pytest.approx(each, abs=1)
        assert found.deferred_bytes == pytest.approx(again, abs=1)
        assert at_rest_bytes(found) == pytest.approx(state, abs=3)
        assert found.parameter_bytes == found.gradient_bytes == pytest.approx(parameters, abs=1)
        assert [found.forward_peak_bytes, found.backward_peak_bytes] == pytest.approx(peaks, abs=1)
        replicas = stage.ranks[:: stage.tensor]
        assert found.reduce_s == pytest.approx(collective_s(problem.cluster, "all_reduce", parameters, replicas))
        if index + 1 < len(plan.stages):
            after = plan.stages[index + 1]
            held = max(rows, plan.batch_size // plan.microbatches // after.data)
            sent = 1e6 * held * sum(e.source < stage.stop <= e.target for e in dag.edges)
            ends = (stage.ranks[0], after.ranks[0])
            assert found.boundary_bytes == sent
            assert found.send_s == pytest.approx(collective_s(problem.cluster, "send", sent, ends))
        else:
            assert found.send_s == found.boundary_bytes == 0


@pytest.mark.parametrize("seed", range(10))
def test_recomputation_costs_time_and_saves_memory(seed):
    problem = problem_of(seed)
    shape = Shape(1, 2, 2, 2, "1f1b", 0)
    chain = problem.chains.smallest(problem, shape)
    one, other = (
        problem.costs.stage(assemble(problem, shape, chain, [Piece(0, 5, choice)]), 0) for choice in ("none", "full")
    )
    assert other.backward_s > one.backward_s and other.activation_bytes < one.activation_bytes
    assert (other.forward_s, other.reduce_s, at_rest_bytes(other)) == (one.forward_s, one.reduce_s, at_rest_bytes(one))


def test_rows_between_and_beyond_the_sizes():
    sizes, values = (2, 4, 8), (10.0, 30.0, 40.0)
    assert [at_size(sizes, values, n) for n in (1, 2, 3, 4, 6, 8, 16)] == [5.0, 10.0, 20.0, 30.0, 35.0, 40.0, 80.0]
    costs = problem_of(3).costs
    ends = [costs.block(1, 2, "full", rows) for rows in (2, 3, 4, 8)]
    assert ends[1].backward_s == pytest.approx((ends[0].backward_s + ends[2].backward_s) / 2)
    assert ends[3].each_bytes == pytest.approx(2 * ends[2].each_bytes)
    assert ends[3].rest_bytes == ends[2].rest_bytes == ends[0].rest_bytes


@pytest.mark.parametrize("seed", range(10))
def test_blocks_of_one_kind_cost_the_same_wherever_they_stand(seed):
    """What the searches remember by kinds of blocks is what the tables say of the very blocks."""
    tables = random_tables(seed, num_layers=9)
    problem = table_problem(tables, small_cluster(8, 4), 8)
    prices = StagePrices(problem)
    for tensor, start, stop in itertools.product(DEGREES, range(1, 8), range(2, 9)):
        if start >= stop:
            continue
        shape = Shape(3, 1, tensor, 4, "1f1b", 0)
        chain = problem.chains.smallest(problem, shape)
        pieces = [Piece(0, start, "none"), Piece(start, stop, "full"), Piece(stop, 9, "none")]
        exact = problem.costs.stage(assemble(problem, shape, chain, pieces), 1)
        assert prices.cost(shape, chain, 1, pieces[1]) == exact
    assert len({block.kind for block in table_problem(random_tables(0, 9, skips=False), v100s(4), 8).graph.blocks}) < 9


def test_layers_in_any_order():
    """The cut sends what crosses it in the topological order, also where the table lists the layers backwards."""
    (dag,) = random_tables(4, sizes=(1,)).values()
    last = len(dag.layers) - 1
    edges = tuple(replace(edge, source=last - edge.source, target=last - edge.target) for edge in dag.edges)
    backwards = LayerDag(dag.layers[::-1], edges)
    forwards, turned = (table_problem({1: one}, small_cluster(4), 8) for one in (dag, backwards))
    assert turned.costs.tables == forwards.costs.tables
    assert turned.costs.crossing_bytes(1, 1) == sum(edge.source == 0 for edge in dag.edges) * 1e6
    branches = replace(dag, edges=(Edge(0, 3, 1.0), Edge(1, 2, 1.0), Edge(2, 4, 1.0), Edge(3, 4, 1.0)))
    assert table_problem({1: branches}, small_cluster(4), 8).costs.layers == branches.layers


def test_measured_reductions_are_taken_inside_a_host():
    """Linear between the sizes, the last rate beyond; between hosts, and for other numbers of devices, by the links."""
    tables = random_tables(1)
    state = tables[1].layers[0].at[1].parameter_bytes
    measured = {("all_reduce", 2): ((state / 2, 1.0), (state * 3 / 2, 2.0))}
    costs = table_problem(tables, small_cluster(8, 4), 8, collectives=measured).costs
    plain = TableCosts(costs.tables, costs.cluster)

    def reduce_s(costs: TableCosts, ranks: tuple[int, ...]) -> float:
        return costs.stage(Plan("", "", 8, 8, 1, "1f1b", (Stage(0, 1, ranks, len(ranks)),)), 0).reduce_s

    assert reduce_s(costs, (0, 1)) == pytest.approx(1.5)
    for ranks in ((0, 4), (0, 1, 2, 3), (0,)):
        assert reduce_s(costs, ranks) == reduce_s(plain, ranks)


def change(tables, at):
    """The tables with `at` of what each layer has by degree."""
    return {
        size: replace(dag, layers=tuple(replace(layer, at=at(layer.at)) for layer in dag.layers))
        for size, dag in tables.items()
    }


GOOD, CLUSTER = random_tables(0), small_cluster(4)
LONE = change(GOOD, lambda at: {t: replace(one, choices=one.choices[:1]) for t, one in at.items()})
CYCLE = LayerDag(GOOD[1].layers, (*GOOD[1].edges, Edge(3, 1, 1.0)))


@pytest.mark.parametrize(
    ("tables", "batch", "pinned", "message"),
    [
        (GOOD, 8, {"tensor": 4}, r"tensor=4 was not profiled; expected one of 1, 2"),
        (change(GOOD, lambda at: {2: at[2]}), 8, {}, r"have: 2; expected 1"),
        ({1: LayerDag((), ())}, 8, {}, "no layers"),
        ({}, 8, {}, r"tables of \[\] rows"),
        ({0: GOOD[1]}, 8, {}, r"tables of \[0\] rows"),
        ({1: GOOD[1], 2: random_tables(0, 4)[2]}, 8, {}, r"the table of 2 rows has other layers or edges \(4"),
        ({1: CYCLE}, 8, {}, "cycle"),
        (GOOD, 0, {}, "batch_size=0"),
        (GOOD, 8, {"zero": 3}, "zero=3"),
        (GOOD, 8, {"context": 2}, "how ops are split"),
        (GOOD, 8, {"layout": {"*": "column"}}, "how ops are split"),
        (GOOD, 8, {"recompute": "selective"}, r"recompute='selective': the layers' choices are none, full"),
        (LONE, 8, {"recompute": "full"}, r"recompute='full': the layers' choices are none"),
        (change(GOOD, lambda at: {1: LayerAt((), 1.0, {})}), 8, {}, "no choice"),
        (GOOD, 8, {"microbatches": 3}, "microbatches=3 does not divide"),
    ],
)
def test_bad_input_is_one_clear_error(tables, batch, pinned, message):
    with pytest.raises(ValueError, match=message):
        table_problem(tables, CLUSTER, batch, Constraints(**pinned))


def test_clusters_of_several_kinds_are_refused():
    several = Cluster.join(preset("a100-80gb", 1, 2), preset("v100-32gb", 1, 2))
    with pytest.raises(ValueError, match="several kinds of hosts"):
        table_problem(GOOD, several, 8)


def test_a_stage_that_no_table_describes_has_no_price():
    costs = table_problem(GOOD, CLUSTER, 8).costs
    for stage in (
        Stage(0, 5, (0, 1, 2, 3), 1, (4,), ((0,) * 5,)),
        Stage(0, 5, (0, 1), 2, zero=3),
        Stage(0, 5, (0,), 1, recompute=("selective",) * 5),
    ):
        with pytest.raises(ValueError, match="tables have tensor degrees 1, 2"):
            costs.stage(Plan("", "", 4, 8, 1, "1f1b", (stage,)), 0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", ["aceso", "dapple", "pipedream", "piper", "alpa", "metis", "uniap", "auto"])
@pytest.mark.parametrize("seed", range(2))
def test_methods_run_on_tables(method, seed):
    """None uses a degree or a choice that was not profiled."""
    problem = problem_of(seed, batch=4, schedule="1f1b")
    plan = METHODS[method](problem)
    check(problem, plan)
    assert {stage.tensor for stage in plan.stages} <= set(DEGREES)
    assert {choice for stage in plan.stages for choice in stage.block_recompute} <= {"none", "full"}


@pytest.mark.parametrize(("seed", "share"), [(0, 1.0), (1, 0.6), (2, 0.6)])
def test_auto_is_no_worse_than_every_plan(seed, share):
    problem = problem_of(seed, batch=4, skips=False, schedule="1f1b")
    if share < 1:
        peak_bytes = exhaustive(problem).prediction.peak_memory_bytes
        problem = replace(problem, constraints=replace(problem.constraints, memory_limit_bytes=int(share * peak_bytes)))
    try:
        best_s = exhaustive(problem).prediction.step_time_s
    except ValueError:
        with pytest.raises(ValueError, match="fits"):
            auto(problem)
        return
    plan = auto(problem)
    check(problem, plan)
    assert plan.prediction.step_time_s <= best_s * (1 + 1e-9)
    assert plan.prediction.lower_bound_s <= plan.prediction.step_time_s * (1 + 1e-9)
    assert aceso(problem).prediction.step_time_s >= plan.prediction.step_time_s * (1 - 1e-9)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_methods_run_on_layers_with_one_choice_and_on_many_devices():
    problem = table_problem(LONE, small_cluster(16, 4), 16)
    for method in (aceso, auto, piper):
        check(problem, method(problem))
    assert problem.recompute_choices == ("none",)


# -- on the authors' own input


def test_aceso_on_its_own_tables():
    """GPT-1.3B, 24 layers, 4 devices, at microbatches of the sizes that were profiled: the plan is within 3% of `auto`'s."""
    problem = gpt_problem(24, 64)
    assert problem.costs.degrees == (1, 2, 4)
    plan, best = aceso(problem), auto(problem)
    check(problem, plan)
    check(problem, best)
    assert plan.stages[-1].stop == 26
    assert best.prediction.step_time_s <= plan.prediction.step_time_s < 1.03 * best.prediction.step_time_s
    assert all(stage.tensor in (1, 2, 4) for stage in plan.stages)
    Plan.from_json(plan.to_json()).validate(problem.graph, problem.cluster)
    assert "pipeline" in plan.explain(problem.graph)


def test_aceso_beside_every_plan_of_two_stages():
    """Of whole stages that recompute; `auto` recomputes block by block."""
    problem = gpt_problem(24, 64, pipeline=2, schedule="1f1b")
    every, best, plan = exhaustive(problem), auto(problem), aceso(problem)
    for one in (every, best, plan):
        check(problem, one)
    assert best.prediction.step_time_s < every.prediction.step_time_s <= plan.prediction.step_time_s * (1 + 1e-9)


def test_aceso_beside_every_plan_on_its_own_tables():
    problem = gpt_problem(2, 8, memory_gib=6)
    every, best, plan = exhaustive(problem), auto(problem), aceso(problem)
    for one in (every, best, plan):
        check(problem, one)
    assert best.prediction.step_time_s <= every.prediction.step_time_s <= plan.prediction.step_time_s


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_piper_where_microbatches_leave_no_memory_at_all():
    """What large microbatches need while they run is more than a device has, so that no number of stages would do."""
    problem = gpt_problem(2, 64, memory_gib=6)
    check(problem, piper(problem))


def test_more_memory_and_more_devices_are_faster():
    few, tight, many = gpt_problem(24, 64), gpt_problem(24, 64, memory_gib=16), gpt_problem(24, 64, world=8)
    few_s, tight_s, many_s = (aceso(problem).prediction.step_time_s for problem in (few, tight, many))
    assert few_s < tight_s and many_s < 0.7 * few_s


def test_aceso_tables_keep_the_split_of_the_passes():
    def op(i: int) -> ProfiledOp:
        return ProfiledOp(f"op{i}", 1.0 + i, 10.0 * (1 + i), 3.0, 3.0, 8.0, 20.0, 5.0, 7.0 + i)

    profile = AcesoProfile({(1, 1, 0): tuple(op(i) for i in range(6))}, {("all_reduce", 2): ((1.0, 0.5), (1e9, 2.0))})
    costs = aceso_problem(profile, 2, v100s(2), 4).costs
    keep, again = (costs.block(1, 1, choice, 1) for choice in ("none", "full"))
    assert (keep.forward_s, keep.backward_s) == (2.0 + 3.0 + 4.0, 20.0 + 30.0 + 40.0)
    assert (again.forward_s, again.backward_s) == (9.0, 90.0 + 9.0)
    assert (keep.each_bytes, again.each_bytes, keep.parameter_bytes, keep.rest_bytes) == (60.0, 3.0, 24.0, 192.0)
    assert (keep.forward_peak_bytes, keep.backward_peak_bytes, again.backward_peak_bytes) == (5.0, 10.0, 57.0 + 10.0)
    assert costs.collectives["all_reduce", 2] == ((1.0, 0.5), (1e9, 2.0))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_piper_on_its_own_input():
    """BERT-32 on 4 devices: data parallelism alone, which its file says is every layer's time and one all-reduce."""
    dag, machine = read_piper(peer("piper/bert32a100.json"))
    machine = LayerMachine(4, machine.memory_bytes, machine.bandwidth_bytes_per_s, 32)
    problem = piper_problem(dag, machine)
    plan = piper(problem)
    check(problem, plan)
    check(problem, aceso(problem))
    assert problem.memory_limit_bytes == machine.memory_bytes
    alone = replace(problem, constraints=replace(problem.constraints, pipeline=1, tensor=1, recompute="none"))
    at = [layer.at[1] for layer in dag.layers]
    reduce_s = 2 * (3 / 4) * sum(one.parameter_bytes for one in at) / machine.bandwidth_bytes_per_s
    wanted_s = 32 / 4 * sum(one.choices[0].time_s for one in at) + reduce_s
    assert aceso(alone).prediction.step_time_s == pytest.approx(wanted_s)
    assert plan.prediction.step_time_s <= wanted_s * (1 + 1e-9)


def test_pipedream_on_its_own_input():
    graph = read_pipedream(peer("pipedream/profiles/vgg16.txt"))
    problem = pipedream_problem(graph, 64, v100s(4), 256)
    plan = pipedream(problem)
    check(problem, plan)
    check(problem, aceso(problem))
    whole = sum(node.forward_s + node.backward_s for node in graph.nodes)
    alone = pipedream_problem(graph, 64, v100s(1), 256, Constraints(microbatches=4))
    assert aceso(alone).prediction.step_time_s == pytest.approx(4 * whole)
    assert whole < plan.prediction.step_time_s < 4 * whole


def test_pipedream_layers_hold_state_as_often_as_asked():
    nodes = (ProfiledNode("a", "Linear", 1.0, 2.0, 8.0, 4.0), ProfiledNode("b", "Linear", 1.0, 2.0, 16.0, 0.0))
    graph = ProfiledGraph(nodes, ((0, 1),))
    costs = pipedream_problem(graph, 2, v100s(1), 2, state_per_parameter_byte=4.0).costs
    block = costs.block(0, 1, "none", 2)
    assert (block.forward_s, block.backward_s, block.each_bytes, block.rest_bytes) == (1.0, 2.0, 8.0, 16.0)
    assert costs.crossing_bytes(1, 2) == 8.0


def test_as_many_stages_on_fewer_ranks_are_told_apart_by_their_schedule():
    """One stage per rank or two can end at the same blocks."""
    stages = tuple(Stage(b, b + 1, (b,), 1) for b in range(4))
    one = Plan("", "", 4, 8, 4, "1f1b", stages)
    other = replace(one, schedule="interleaved", stages=tuple(replace(s, ranks=(s.start % 2,)) for s in stages))
    assert differences(one, other).startswith("degrees, schedule") and "stages" not in differences(one, other)
