"""The search on many devices: its outlines against brute force and exact prices, its plans against the exact search."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, language_models, real_problem, small_cluster

from autopar.planner.auto import _Auto
from autopar.planner.broad import Broad, broad
from autopar.planner.chains import LayoutChains
from autopar.planner.outlines import Outline, ShapeArrays
from autopar.planner.pricing import StagePrices
from autopar.planner.problem import Chain, Problem
from autopar.planner.stages import StageSearch
from autopar.simulate import simulate

graphs = pytest.fixture(scope="module")(language_models)


def limited(problem: Problem, limit_bytes: int) -> Problem:
    return replace(problem, constraints=replace(problem.constraints, memory_limit_bytes=limit_bytes))


@pytest.mark.parametrize("seed", range(20))
def test_the_fullest_stage_takes_what_the_evenest_cut_leaves_it(seed: int) -> None:
    draw = random.Random(seed)
    graph = chain_graph(tuple(draw.randrange(4) for _ in range(draw.randrange(2, 9))), 16)
    cluster = small_cluster(16)
    problem = Problem(graph, cluster, MadeUpCosts(graph, cluster, seed), WholeLayouts())
    outline = Outline(problem, StagePrices(problem), 1, Chain(), 1)
    blocks_s = outline._block_s
    for stages in range(1, len(blocks_s) + 1):
        cuts = itertools.combinations(range(1, len(blocks_s)), stages - 1)
        fullest_s = min(max(map(sum, np.split(blocks_s, cut))) for cut in cuts)
        assert outline.fullest(stages) == pytest.approx(fullest_s * stages / sum(blocks_s), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied"])
@pytest.mark.parametrize("preset", ["h100-80gb", "v100-16gb"])
def test_estimates_are_near_and_bounds_below(graphs, name: str, preset: str) -> None:
    """Of every shape that fits, priced exactly under the layouts of the outline."""
    problem = real_problem(graphs[name], preset)
    search = Broad(problem)
    while search._outline_more():
        pass
    errors = []
    for degree in search.degrees.values():
        for outline, _ in degree.outlines:
            estimates, _ = outline.estimate(degree.some)
            bounds = search.plain.bound(
                degree.some, np.full(len(degree.some.shapes), search.plain.pass_s), search.plain.recomputed(degree.some)
            )
            chosen = random.Random(0).sample(range(len(estimates)), min(12, len(estimates)))
            for i in chosen:
                shape = degree.some.shapes[i]
                if not problem.chains.serve(problem, shape.tensor, outline.shards, shape.shards):
                    continue
                found = StageSearch(problem, shape, outline.chain, search.prices)
                pieces = found.first()
                if pieces is None:
                    continue
                step_s = found.step_time_s(pieces)
                assert bounds[i] <= step_s * (1 + 1e-9), shape
                errors.append(abs(math.log(estimates[i] / step_s)))
    assert len(errors) > 20
    assert np.median(errors) < 0.05 and max(errors) < 0.5


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_plans_are_those_of_the_exact_search_or_better(graphs, seed: int) -> None:
    """On 16 devices both can run. The exact search has more layouts and fewer ZeRO levels."""
    draw = random.Random(seed)
    graph = graphs[draw.choice(sorted(graphs))]
    # On "cpu" the model's own bytes decide; on a GPU most of what so small a model needs is the driver's context.
    free = real_problem(graph, ("cpu", "cpu", "h100-80gb")[seed % 3])
    roomy = broad(free)
    for share in (1.0, draw.uniform(0.4, 0.9)):
        problem = limited(free, int(roomy.prediction.peak_memory_bytes * share) + 1)
        try:
            exact = _Auto(problem).run()
        except ValueError:
            with pytest.raises(ValueError, match="the smallest found"):
                broad(problem)
            continue
        plan = broad(problem)
        plan.validate(graph, problem.cluster)
        assert plan.prediction.step_time_s <= exact.prediction.step_time_s * 1.03
        line = simulate(graph, plan, problem.cluster, model=problem.costs)
        assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
        assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
        search = Broad(replace(problem, chains=LayoutChains()))
        assert search.run() == plan
        assert search._bound_s(plan.prediction.step_time_s) <= exact.prediction.step_time_s


def test_what_does_not_fit_is_refused_with_the_smallest_plan(graphs) -> None:
    problem = limited(real_problem(graphs["llama"], "h100-80gb"), 1000)
    with pytest.raises(ValueError, match="fits in 1000 bytes .* the smallest found .* needs .* too many"):
        broad(problem)


def test_shapes_as_arrays_hold_what_schedules_say() -> None:
    graph, cluster = chain_graph((0, 1, 1, 1, 1, 1, 1, 2), 64), small_cluster(16)
    problem = Problem(graph, cluster, MadeUpCosts(graph, cluster, 0), WholeLayouts())
    some = ShapeArrays.of(problem.shapes)
    for i, shape in enumerate(problem.shapes):
        held = [min(shape.pipeline - s, shape.microbatches) for s in range(shape.pipeline)]
        assert shape.schedule == "1f1b"
        assert (some.first_held[i], some.last_held[i]) == (held[0], held[-1])
        assert some.inverse_held[i] == pytest.approx(sum(1 / k for k in held))
