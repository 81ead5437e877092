"""The stage search against the exhaustive oracle, its bounds, its constraints, and what it says."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from models import ZOO, build_llama
from planner_cases import (
    MadeUpCosts,
    WholeLayouts,
    chain_graph,
    is_in_wide_space,
    limited,
    random_problem,
    simulated,
    small_cluster,
    small_enough,
)

from autopar import capture
from autopar.cluster.spec import Cluster, Curve
from autopar.cost.model import CostModel
from autopar.planner.auto import auto, exact_search
from autopar.planner.chains import LayoutChains
from autopar.planner.floors import Floors
from autopar.planner.methods.exhaustive import every_plan, exhaustive, the_space
from autopar.planner.pricing import Piece, StagePrices
from autopar.planner.problem import Chain, Constraints, Problem
from autopar.planner.search import search
from autopar.planner.stages import StageSearch
from autopar.simulate import simulate, stage_peak_bytes


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
        problem = limited(free, peaks[0] - 1)
        with pytest.raises(ValueError, match=f"needs {peaks[0]} bytes .*, 1 bytes .*too many"):
            exact_search(problem)
        try:
            plan = auto(problem)
        except ValueError as error:
            assert f"needs {peaks[0]} bytes" in str(error)
        else:  # outside of that space something does fit
            line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
            assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes < peaks[0]
            plan.validate(problem.graph, problem.cluster)


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


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_on_devices_that_are_slower_at_large_sizes(graphs, seed):
    """As measured ones with caches are: half of the work may take less than half of the time."""
    draw = random.Random(seed)
    start = draw.uniform(2, 4)
    sizes, falling = [10.0 ** (start + k / 2) for k in range(5)], (4e10, 3e10, 1e10, 1e9, 1e8)
    rates = {
        name: Curve(tuple((size, rate * draw.uniform(0.6, 1.6)) for size, rate in zip(sizes, falling, strict=True)))
        for name in ("pointwise", "pointwise_backward", "transcendental", "reduction", "loss", "norm", "softmax")
    }
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    quick = replace(cluster.device, rates=rates, flops_per_s={"float32": 1e12}, launch_s=1e-7, backward_launch_s=1e-7)
    cluster = replace(cluster, device=quick, intra=replace(cluster.intra, latency_s=1e-6, bandwidth_bytes_per_s=1e10))
    graph = graphs[draw.choice(("llama", "gpt2", "tied_lm"))]
    pinned = Constraints(recompute="none", rewrites=False)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), pinned)
    prices = StagePrices(problem)
    floors = Floors(problem, prices)
    shape_of = {(*shape.group, shape.microbatches, shape.schedule): shape for shape in problem.shapes}
    best_s = float("inf")
    for plan in every_plan(problem):
        stage = plan.stages[0]
        shape = shape_of[plan.pipeline, stage.data, stage.tensor, stage.zero, plan.microbatches, plan.schedule]
        time_s = simulate(graph, plan, cluster, model=problem.costs).step_time_s
        best_s = min(best_s, time_s)
        assert floors.time_s(shape) <= time_s and floors.refined_s(shape) <= time_s, shape
        if stage.tensor == 1:
            assert floors.chain_s(shape, Chain()) <= time_s, shape
            assert StageSearch(problem, shape, Chain(), prices).root_bound_s <= time_s * (1 + 1e-9), shape
    assert exact_search(problem).prediction.step_time_s == pytest.approx(best_s, rel=1e-8)
