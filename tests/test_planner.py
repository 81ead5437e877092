"""The stage search against the exhaustive oracle, its bounds, its constraints, and what it says."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import ZOO, build_llama
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, is_in_wide_space, small_cluster
from torch import nn

from autopar import capture
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.plan import Plan
from autopar.planner.auto import auto, exact_search
from autopar.planner.chains import LayoutChains
from autopar.planner.floors import Floors
from autopar.planner.methods.exhaustive import every_plan, exhaustive, the_space
from autopar.planner.pricing import Piece, StagePrices
from autopar.planner.problem import Chain, Constraints, Problem
from autopar.planner.search import METHODS, search
from autopar.planner.stages import StageSearch
from autopar.simulate import simulate, stage_peak_bytes

PINS = [{}, {"schedule": "1f1b"}, {"zero": 0}, {"microbatches": 2}, {"recompute": "full"}, {"schedule": "gpipe"}]


def random_problem(seed: int, world_sizes=(1, 2, 3, 4, 6, 8), most_blocks: int = 6, **pinned) -> Problem:
    """A small problem: up to 6 blocks of up to 3 kinds, on up to 8 devices, some of them on two hosts."""
    draw = random.Random(seed)
    world = draw.choice(world_sizes)
    kinds = tuple(draw.randrange(3) for _ in range(draw.randrange(2, most_blocks + 1)))
    graph = chain_graph(kinds, draw.choice([4, 6, 8]))
    cluster = small_cluster(world, world // 2 if world % 2 == 0 and draw.random() < 0.5 else world)
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice([0.1, 1, 10]))
    return Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))


def limited(problem: Problem, limit_bytes: int) -> Problem:
    return replace(problem, constraints=replace(problem.constraints, memory_limit_bytes=limit_bytes))


def simulated(problem: Problem, plans: Iterable[Plan] | None = None) -> list[tuple[float, int]]:
    """(step time, peak of the fullest rank) of every plan, by default of the exact search's space."""
    plans = every_plan(problem) if plans is None else plans
    lines = (simulate(problem.graph, plan, problem.cluster, model=problem.costs) for plan in plans)
    return [(line.step_time_s, max(line.peak_memory_bytes.values())) for line in lines]


def small_enough(seed: int, most_plans: int, plans: Callable[[Problem], Iterator[Plan]] = every_plan) -> Problem:
    """A random problem whose space the oracle can walk, pinned at random until it is."""
    draw = random.Random(seed)
    for _ in range(100):
        problem = random_problem(draw.randrange(10**6), **draw.choice(PINS))
        try:
            count = sum(1 for _ in itertools.islice(plans(problem), most_plans + 1))
        except ValueError:
            continue
        if 1 < count <= most_plans:
            return problem
    raise AssertionError("no small problem was drawn")


@pytest.mark.parametrize("seed", range(60))
def test_auto_finds_the_optimum_under_every_memory_limit(seed):
    """Each limit that makes a difference between loose and tight, a sample of them, and one that nothing fits."""
    free = small_enough(seed, 250)
    all_plans = simulated(free)
    peaks = sorted({peak for _, peak in all_plans})
    for share in (0.0, 0.05, 0.3, 1.0):
        problem = limited(free, peaks[int(share * (len(peaks) - 1))])
        plan = exact_search(problem)
        best_s = min(time_s for time_s, peak in all_plans if peak <= problem.memory_limit_bytes)
        assert plan.prediction.step_time_s == pytest.approx(best_s, rel=1e-8)
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        assert line.step_time_s == plan.prediction.step_time_s
        assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
        plan.validate(problem.graph, problem.cluster)
        chosen = [one for one in plan.candidates if one.verdict == "chosen"]
        assert [one.step_time_s for one in chosen] == [plan.prediction.step_time_s]
        assert all(one.step_time_s >= best_s * (1 - 1e-9) for one in plan.candidates if "slower" in one.verdict)
    if peaks[0] > 1:
        with pytest.raises(ValueError, match=f"needs {peaks[0]} bytes .*, 1 bytes .*too many"):
            auto(limited(free, peaks[0] - 1))


@pytest.mark.parametrize("seed", range(8))
def test_exhaustive_is_the_minimum_of_all_plans(seed):
    problem = small_enough(100 + seed, 1000, lambda one: the_space(one)[1])
    times = simulated(problem, the_space(problem)[1])
    assert exhaustive(problem).prediction.step_time_s == min(time_s for time_s, _ in times)
    least = min(peak for _, peak in times)
    with pytest.raises(ValueError, match=f"needs {least} bytes, 1 too many"):
        exhaustive(limited(problem, least - 1))


@pytest.mark.parametrize("seed", range(60))
def test_cuts_of_one_shape_are_optimal(seed):
    """More blocks and microbatches than the whole oracle can walk: brute force over cuts and recompute choices."""
    draw = random.Random(seed)
    graph = chain_graph(tuple(draw.randrange(4) for _ in range(draw.randrange(5, 10))), 16)
    pipeline = draw.randrange(2, 5)
    cluster = small_cluster(pipeline)
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice([0.1, 1, 10, 100]))
    pinned = {
        "pipeline": pipeline,
        "microbatches": draw.choice([1, 2, 4, 8, 16]),
        "schedule": draw.choice(["1f1b", "gpipe"]),
    }
    problem = Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))
    (shape,) = problem.shapes
    wide = StageSearch(problem, shape, Chain(), StagePrices(problem))
    smallest, least = wide.smallest()
    problem = limited(problem, draw.choice([least, int(1.3 * least), 10 * least]))
    cuts = StageSearch(problem, shape, Chain(), StagePrices(problem))
    best_s = float("inf")
    for inner in itertools.combinations(range(1, len(graph.blocks)), pipeline - 1):
        edges = list(itertools.pairwise((0, *inner, len(graph.blocks))))
        for choice in itertools.product(("none", "full"), repeat=pipeline):
            pieces = tuple(Piece(*edge, recompute) for edge, recompute in zip(edges, choice, strict=True))
            if all(cuts.priced(s, piece).peak_bytes <= problem.memory_limit_bytes for s, piece in enumerate(pieces)):
                time_s = cuts.step_time_s(pieces)
                assert time_s >= cuts.root_bound_s * (1 - 1e-9)
                best_s = min(best_s, time_s)
    found = cuts.solve()
    assert found.step_time_s == pytest.approx(best_s, rel=1e-9)
    assert found.open_bound_s == float("inf")
    assert cuts.step_time_s(found.pieces) == found.step_time_s
    if best_s < float("inf"):
        again = cuts.solve(max_visits=3)
        assert best_s * (1 - 1e-9) <= again.step_time_s and min(again.open_bound_s, again.step_time_s) <= best_s * (
            1 + 1e-9
        )
        assert cuts.solve(below_s=best_s).pieces is None


@pytest.mark.parametrize("seed", range(20))
def test_floors_are_lower_bounds(seed):
    free = small_enough(200 + seed, 250)
    peaks = sorted({peak for _, peak in simulated(free)})
    problem = limited(free, random.Random(seed).choice(peaks))
    floors = Floors(problem, StagePrices(problem))
    plans = list(every_plan(problem))
    times = simulated(problem)
    for shape in problem.shapes:
        mine = [
            (time_s, peak)
            for plan, (time_s, peak) in zip(plans, times, strict=True)
            if (plan.pipeline, plan.stages[0].data, plan.stages[0].tensor, plan.stages[0].zero) == shape.group
            and (plan.microbatches, plan.schedule) == (shape.microbatches, shape.schedule)
        ]
        assert mine and floors.memory_bytes(shape) <= min(peak for _, peak in mine)
        fitting = [time_s for time_s, peak in mine if peak <= problem.memory_limit_bytes]
        assert floors.time_s(shape) <= min(fitting, default=float("inf")) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_prices_are_those_of_the_whole_plan(seed):
    """What is remembered for one place in a pipeline is what the cost model says at every other it is used for."""
    problem = random_problem(seed, world_sizes=(4, 8), most_blocks=8)
    prices = StagePrices(problem)
    plans = list(itertools.islice(every_plan(problem), 4000))
    for plan in random.Random(seed).sample(plans, min(100, len(plans))):
        (shape,) = (
            shape
            for shape in problem.shapes
            if (plan.pipeline, plan.stages[0].data, plan.stages[0].tensor, plan.stages[0].zero) == shape.group
            and (plan.microbatches, plan.schedule) == (shape.microbatches, shape.schedule)
        )
        (chain,) = problem.chains.of(problem, shape)
        for s, stage in enumerate(plan.stages):
            cost = prices.cost(shape, chain, s, Piece(stage.start, stage.stop, stage.block_recompute[0]))
            assert cost == problem.costs.stage(plan, s)


def test_repeated_blocks_are_priced_once():
    graph = chain_graph((0, *[1] * 30, 2), 64)
    cluster = small_cluster(8)
    costs = MadeUpCosts(graph, cluster, 0)
    problem = Problem(
        graph, cluster, costs, WholeLayouts(), Constraints(pipeline=8, tensor=1, microbatches=8, schedule="1f1b")
    )
    StageSearch(problem, problem.shapes[0], Chain(), StagePrices(problem))
    # Runs of 1 to 25 layers with and without the first block, before a layer or before the last block, and those that
    # end the model: far from the 2,000 (stage, start, stop) that there are.
    assert costs.asked <= 5 * 25


# --- real models and costs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs():
    return {name: capture(*build()) for name, build in ZOO.items()}


@pytest.mark.parametrize("name", list(ZOO))
def test_real_models_get_the_optimum_of_the_space(graphs, name):
    graph = graphs[name]
    cluster = Cluster.preset("a100-80gb", hosts=2, devices_per_host=2)
    for pinned in (
        {"schedule": "1f1b", "microbatches": 2, "zero": 0},
        {"tensor": 2, "microbatches": 1, "zero": 3, "recompute": "none"},
        {"pipeline": 2, "tensor": 1, "schedule": "gpipe"},
    ):
        plan = search(graph, cluster, progress=False, **pinned)
        oracle = search(graph, cluster, "exhaustive", progress=False, **pinned)
        assert plan.prediction.step_time_s <= oracle.prediction.step_time_s * (1 + 1e-8), pinned
        if is_in_wide_space(plan):
            assert plan.prediction.step_time_s == pytest.approx(oracle.prediction.step_time_s, rel=1e-8), pinned
        plan.validate(graph, cluster)
        assert type(plan).from_json(plan.to_json()) == plan
        assert plan.candidates and graph.name in plan.explain(graph)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied_lm"])
def test_layouts_that_take_less_memory_are_used_where_they_pay(graphs, name):
    """Under each memory limit, the optimum over all chains of layouts, of which the search makes as few as it can."""
    graph, cluster = graphs[name], Cluster.preset("cpu", hosts=1, devices_per_host=4)
    pinned = Constraints(schedule="1f1b", microbatches=2, tensor=2)
    free = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), pinned)
    all_plans = simulated(free)
    peaks = sorted({peak for _, peak in all_plans})
    for share in (0.02, 0.05, 0.2, 0.3, 0.5, 0.7):
        problem = limited(free, peaks[int(share * (len(peaks) - 1))])
        best_s = min(time_s for time_s, peak in all_plans if peak <= problem.memory_limit_bytes)
        assert exact_search(problem).prediction.step_time_s == pytest.approx(best_s, rel=1e-8)


def test_real_prices_are_those_of_the_whole_plan(graphs):
    """Kinds, shared parameters and hosts tell stages apart as far as the real cost model does."""
    cluster = Cluster.preset("a100-80gb", hosts=2, devices_per_host=2)
    for name in ("gpt2", "tied_lm", "llama"):
        problem = Problem(
            graphs[name], cluster, CostModel(graphs[name], cluster), LayoutChains(), Constraints(microbatches=2)
        )
        prices = StagePrices(problem)
        for shape in problem.shapes:
            for chain in itertools.islice(problem.chains.of(problem, shape), 2):
                found = StageSearch(problem, shape, chain, prices)
                pieces = found.first()
                plan = found.plan(pieces)
                plan.validate(graphs[name], cluster)
                whole = [problem.costs.stage(plan, s) for s in range(plan.pipeline)]
                assert prices.of_plan(shape, chain, pieces) == whole
                for s, (piece, cost) in enumerate(zip(pieces, whole, strict=True)):
                    alone = prices.cost(shape, chain, s, piece)
                    if graphs[name].shared_parameters:
                        alone = replace(alone, reduce_model_s=cost.reduce_model_s)
                    assert alone == cost


@pytest.mark.parametrize("pinned", [{"tensor": 2, "data": 1}, {"tensor": 1, "data": 2, "zero": 3}])
def test_runs_between_the_knots_are_close(pinned):
    """Stage tables ask for few runs of a deep model; what they fill in is what the cost model would have said."""
    graph, cluster = capture(*build_llama(layers=12)), Cluster.preset("a100-80gb", hosts=2, devices_per_host=4)
    problem = Problem(
        graph,
        cluster,
        CostModel(graph, cluster),
        LayoutChains(),
        Constraints(microbatches=2, schedule="1f1b", **pinned),
    )
    prices = StagePrices(problem)
    (shape,) = problem.shapes
    chain = next(iter(problem.chains.of(problem, shape)))
    compared = 0
    for stage, recompute in itertools.product(range(shape.pipeline), ("none", "full")):
        runs = prices.runs(shape, chain, stage, recompute)
        for start, stop in np.argwhere(runs.exists > 0):
            cost = prices.cost(shape, chain, stage, Piece(int(start), int(stop), recompute))
            assert runs.forward_s[start, stop] == pytest.approx(cost.forward_s, rel=1e-6)
            assert runs.backward_s[start, stop] == pytest.approx(cost.backward_s, rel=2e-3)
            assert runs.activation_bytes[start, stop] == pytest.approx(cost.activation_bytes, rel=1e-6)
            peak = stage_peak_bytes(cost, "1f1b", stage, shape.pipeline, shape.microbatches)
            assert runs.peak_bytes("1f1b", stage, shape.pipeline, shape.microbatches)[start, stop] == pytest.approx(
                peak, rel=1e-3
            )
            compared += 1
    assert compared > 100


def test_planning_is_fast(capsys):
    """A Llama of 32 layers; the time is printed, and bounded loosely because machines differ."""
    graph = capture(*build_llama(layers=32))
    for hosts in (1, 8):
        cluster = Cluster.preset("h100-80gb", hosts=hosts, devices_per_host=8)
        begin = time.process_time()
        plan = search(graph, cluster, progress=False)
        taken_s = time.process_time() - begin
        with capsys.disabled():
            print(f"\nplanning a 32-layer Llama on {8 * hosts} devices took {taken_s:.1f} s: {plan.candidates[0].name}")
        assert taken_s < 60


# --- constraints and errors ------------------------------------------------------------------------------------------


def small_graph():
    return chain_graph((0, 1, 1, 0), 8)


@pytest.mark.parametrize("seed", range(30))
def test_constraints_are_kept(seed):
    """Pins taken from a random plan of the free space are satisfiable together, and the answer keeps them."""
    problem = small_enough(300 + seed, 250)
    draw = random.Random(seed)
    plan = draw.choice(list(every_plan(problem)))
    first = plan.stages[0]
    pins = {
        "data": first.data, "tensor": first.tensor, "pipeline": plan.pipeline, "microbatches": plan.microbatches,
        "schedule": plan.schedule, "zero": first.zero, "context": 1, "expert": 1,
    }  # fmt: skip
    pins = {name: pins[name] for name in draw.sample(list(pins), 4)}
    found = auto(replace(problem, constraints=Constraints(**pins)))
    said = {
        "data": found.stages[0].data, "tensor": found.stages[0].tensor, "pipeline": found.pipeline,
        "microbatches": found.microbatches, "schedule": found.schedule, "zero": found.stages[0].zero,
        "context": 1, "expert": 1,
    }  # fmt: skip
    assert {name: said[name] for name in pins} == pins
    for choice in ("none", "full"):
        pinned = auto(replace(problem, constraints=Constraints(recompute=choice)))
        assert {said for stage in pinned.stages for said in stage.block_recompute} == {choice}


IMPOSSIBLE = {
    "product": (
        {"data": 2, "tensor": 2, "pipeline": 1},
        "data=2 x tensor=2 x pipeline=1 = 4, but the cluster has 8 devices",
    ),
    "part": ({"data": 4, "tensor": 4}, "data=4 x tensor=4 = 16, which does not divide the cluster's 8 devices"),
    "one": ({"pipeline": 3}, "pipeline=3, which does not divide the cluster's 8 devices; the product could be 2 or 4"),
    "blocks": ({"pipeline": 8}, "pipeline=8, but Chain has 4 blocks"),
    "batch": ({"data": 3}, "data=3 does not divide the batch of 8 rows; data could be 2 or 4"),
    "microbatches": ({"data": 2, "microbatches": 3}, "does not divide the 4 rows of each data rank.* could be 2 or 4"),
    "zero": ({"zero": 3, "data": 1}, "zero=3 shards parameters over the data axis, but data=1"),
    "no data": (
        {"zero": 3, "tensor": 4, "pipeline": 2},
        "tensor=4 and pipeline=2 and zero=3 contradict each other .* tensor could be 1 or 2, .*pipeline could be 1, .*zero "
        "could be 0",
    ),
    "zero value": ({"zero": 5}, "zero=5: expected one of 0, 1, 2, 3"),
    "schedule": ({"schedule": "1f2b"}, "schedule='1f2b': expected one of 'gpipe', '1f1b', .*; did you mean '1f1b'"),
    "method's schedule": (
        {"schedule": "zb-h1"},
        "schedule='zb-h1': method='auto' makes .* use method='exhaustive' or ",
    ),
    "no method's": (
        {"schedule": "zb-v"},
        "schedule='zb-v': method='auto' .*no method does yet; give parallelize a plan=",
    ),
    "recompute": ({"recompute": "ful"}, "recompute='ful': expected one of 'none', .*'full'; did you mean 'full'"),
    "reserve": ({"memory_reserve": 1.0}, "memory_reserve=1.0: expected a share"),
    "whole reserve": ({"memory_reserve": 10**12}, "memory_reserve=1000000000000 leaves nothing"),
    "both": ({"memory_reserve": 0.2, "memory_limit_bytes": 5}, "say the same thing twice"),
    "no module": (
        {"layout": {"*.q_porj": "column"}},
        r"layout\['\*.q_porj'\]='column': no module or parameter of Chain",
    ),
    "word": ({"layout": {"layers.1": "colum"}}, "did you mean 'column'"),
    "unfit word": ({"layout": {"layers.1": "heads"}}, "none of the 2 ops .* what suits them is 'column' or 'row' or "),
    "no such stage": (
        {"stage": {"layers.3": 3}, "pipeline": 2},
        "pipeline=2 and stage.*contradict each other.*pipeline could be 4",
    ),
    "twice": ({"stage": {"layers.1": 0, "layers.*": 1}}, "block 1 of Chain, .*is pinned to stage 0 too"),
    "backwards": (
        {"stage": {"layers.1": 1, "layers.2": 0}},
        r"stage\['layers.1'\]=1 and stage\['layers.2'\]=0 contradict",
    ),
    "shape of layout": ({"layout": "column"}, "layout='column': expected patterns"),
    "degree": ({"data": 0}, "data=0: expected a positive integer"),
    "type": ({"tensor": "2"}, "tensor='2': expected a positive integer"),
    "bool": ({"pipeline": True}, "pipeline=True: expected a positive integer"),
    "context": ({"context": 2}, "context=2: only 1 is supported"),
    "expert": ({"expert": 4}, "expert=4: only 1 is supported"),
    "name": ({"tensr": 2}, "unknown constraint tensr=.*did you mean tensor"),
    "memory": ({"memory_limit_bytes": 10}, "fits in 10 bytes .* the smallest found .* needs .* too many"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_constraints_are_explained(case):
    pinned, words = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=words):
        search(small_graph(), small_cluster(8), progress=False, **pinned)


def test_a_tensor_degree_that_nothing_divides_names_the_dims():
    with pytest.raises(
        ValueError, match="tensor=5: no op of Chain .* split 5 ways; its parameters' dims are 24; .* 1 on 5"
    ):
        search(small_graph(), small_cluster(5), progress=False, tensor=5)
    with pytest.raises(ValueError, match="no such degree divides the batch of 8 rows"):
        search(small_graph(), small_cluster(5), progress=False)


def test_unknown_methods_name_the_nearest():
    with pytest.raises(
        ValueError, match="method='exhastive': expected one of auto, exhaustive, .*; did you mean exhaustive"
    ):
        search(small_graph(), small_cluster(2), "exhastive")
    assert set(METHODS) >= {"auto", "exhaustive"}


def test_exhaustive_refuses_large_spaces():
    graph = chain_graph((0, *[1] * 30, 2), 64)
    with pytest.raises(ValueError, match=r"would simulate \d+ plans"):
        search(graph, small_cluster(8), "exhaustive", progress=False)


def test_rows_that_meet_forbid_microbatches():
    """Data ranks can share the statistics of a batch norm; microbatches, one after the other, cannot."""
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    graph = capture(module, (torch.randn(8, 8), torch.randn(8, 8)), nn.functional.mse_loss)
    cluster = Cluster.preset("a100-80gb", hosts=1, devices_per_host=2)
    plan = search(graph, cluster, progress=False)
    assert plan.microbatches == 1
    with pytest.raises(ValueError, match="rows of Sequential's batch depend on each other: .*batch_norm"):
        search(graph, cluster, progress=False, microbatches=4)
    wrong = replace(plan, microbatches=2)
    with pytest.raises(ValueError, match="plan.microbatches is 2, but the rows .* depend on each other"):
        wrong.validate(graph, cluster)


def test_candidates_say_why_they_lost():
    graph = chain_graph((0, *[1] * 6, 2), 32)
    cluster = small_cluster(8)
    costs = MadeUpCosts(graph, cluster, 3)
    problem = Problem(graph, cluster, costs, WholeLayouts())
    roomy = exact_search(problem)
    tight = exact_search(limited(problem, roomy.prediction.peak_memory_bytes // 8))
    for plan in (roomy, tight):
        assert 5 <= len(plan.candidates) <= 20
        for one in plan.candidates:
            assert re.fullmatch(
                r"chosen|\d+\.\d\dx slower: (bubbles|recomputation|gradient reduction|optimizer) \d+%|"
                r"\d+\.\d\dx slower: each device works \d+\.\d\dx as long|needs .* more than .*",
                one.verdict,
            ), one.verdict
            assert re.match(r"pipeline \d+ x data \d+ x tensor \d+, \d+ microbatch(es)?, (1f1b|gpipe), zero", one.name)
    assert any(one.verdict.startswith("needs") for one in tight.candidates)
    assert tight.prediction.step_time_s >= roomy.prediction.step_time_s
