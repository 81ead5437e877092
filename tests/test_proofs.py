"""The bounds of planner/proofs.py against plans of every shape that fits, priced exactly."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, language_models, real_problem, small_cluster

from autopar.planner.axis_prices import LeastPrices
from autopar.planner.broad import Broad
from autopar.planner.layout_chain import chain_frontier
from autopar.planner.problem import Constraints, Problem, Shape
from autopar.planner.proofs import Proof
from autopar.planner.stages import StageSearch

# Shapes of one problem whose plans are priced.
NUM_SHAPES = 24


graphs = pytest.fixture(scope="module")(language_models)


def bounds_of(search: Broad, shape: Shape) -> Iterator[tuple[str, float]]:
    """All bounds of a shape, with nothing known of layouts, with what the divisors of its degree say, and with its own."""
    degree = search.degrees[shape.tensor]
    at = degree.some.shapes.index(shape)
    for known in range(3 if shape.tensor > 1 else 1):
        proof = search.proof = Proof(search.problem, search.prices)
        proof.prepare([shape])
        if known == 1:
            coarse = next(m for m in range(1, shape.microbatches + 1) if shape.microbatches % m == 0)
            fewer = next(t for t in range(2, shape.tensor + 1) if shape.tensor % t == 0)
            if (shape.tensor // fewer) in search.degrees or fewer == shape.tensor:
                proof.learn(fewer if fewer in search.degrees else shape.tensor, shape.data * coarse)
        elif known == 2:
            proof.learn(shape.tensor, shape.shards)
        bounds, again = search._bounds(shape.tensor)
        yield f"outline {known}", float(bounds[at])
        if not math.isfinite(bounds[at]):
            continue
        for number, (refine, _) in enumerate(proof.refinements(shape)):
            yield f"{refine.__name__} {number} {known}", refine(shape, float(again[at]), math.inf)


def plans_of(problem: Problem, search: Broad, shape: Shape, draw: random.Random) -> Iterator[float]:
    """Step seconds of plans of a shape, under all layouts found for it: the best, and some cut at random."""
    for chain in problem.chains.of(problem, shape):
        stages = StageSearch(problem, shape, chain, search.prices)
        pieces = stages.first()
        if pieces is None:
            continue
        yield stages.step_time_s(pieces)
        yield stages.solve(math.inf, 30).step_time_s
        for _ in range(3):
            cuts = sorted(draw.sample(range(1, stages.num_blocks), shape.pipeline - 1))
            ends = itertools.pairwise([0, *cuts, stages.num_blocks])
            ways = [stages.option(stage, *end) for stage, end in enumerate(ends)]
            if all(ways):
                yield stages.step_time_s(tuple(way.piece for way in ways))


def check(problem: Problem, draw: random.Random) -> tuple[int, dict[str, list[float]]]:
    """Hold every bound of some shapes against every plan; how many plans there were, and the ratios."""
    search, count, ratios = Broad(problem), 0, {}
    for shape in draw.sample(problem.shapes, min(NUM_SHAPES, len(problem.shapes))):
        least_s = min(plans_of(problem, search, shape, draw), default=math.inf)
        if not math.isfinite(least_s):
            continue
        count += 1
        for name, bound_s in bounds_of(search, shape):
            assert bound_s <= least_s * (1 + 1e-9), (shape, name, bound_s / least_s)
            ratios.setdefault(name.split()[0], []).append(bound_s / least_s)
    return count, ratios


PRESETS = [("h100-80gb", 2, 8), ("v100-16gb", 3, 4), ("cpu", 2, 6)]
EVERY = [(name, *preset) for name in ("llama", "gpt2", "tied") for preset in PRESETS]
QUICK = [("llama", *PRESETS[0]), ("gpt2", *PRESETS[2]), ("tied", *PRESETS[1])]


@pytest.mark.parametrize(
    ("name", "preset", "hosts", "per_host"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_no_plan_is_faster_than_a_bound(graphs, name: str, preset: str, hosts: int, per_host: int) -> None:
    """On 12 and 16 devices, with room enough and with what a plan needs."""
    draw = random.Random(f"{name} {preset}")
    free = real_problem(graphs[name], preset, hosts, per_host)
    need = Broad(free).run().prediction.peak_memory_bytes
    count, ratios = check(free, draw)
    assert count > 10
    limited = real_problem(
        graphs[name], preset, hosts, per_host, memory_limit_bytes=int(need * draw.uniform(0.5, 1)) + 1
    )
    check(limited, draw)
    assert np.median(ratios["_table_s"]) > 0.2


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_of_made_up_costs_is_faster_than_a_bound(seed: int) -> None:
    """On 9 to 16 devices, with slow networks and little memory among them."""
    draw = random.Random(seed)
    world_size = draw.choice((9, 10, 12, 14, 15, 16))
    kinds = tuple(draw.randrange(3) for _ in range(draw.randrange(2, 9)))
    graph = chain_graph(kinds, world_size * draw.choice((1, 2, 4)))
    cluster = small_cluster(world_size, world_size // next(d for d in (2, 3, 5, 7) if world_size % d == 0))
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice((1.0, 5.0)))
    whole = sum(costs._kind(block.kind)["parameters"] for block in graph.blocks)
    for limit_bytes in (None, draw.randrange(whole, 20 * whole)):
        pinned = Constraints(memory_limit_bytes=limit_bytes)
        count, _ = check(Problem(graph, cluster, costs, WholeLayouts(), pinned), draw)
        assert count > 3 or limit_bytes


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_no_plan_is_faster_than_a_bound_where_it_just_fits(graphs, name: str) -> None:
    """The limit is what the plan needs, under layouts that are fast and that keep little."""
    free, count = real_problem(graphs[name], "cpu", 2, 6), 0
    draw = random.Random(name)
    shapes = [shape for shape in free.shapes if shape.tensor > 1]
    for shape in draw.sample(shapes, min(6, len(shapes))):
        for chain in [*itertools.islice(free.chains.of(free, shape), 2), free.chains.smallest(free, shape)]:
            stages = StageSearch(free, shape, chain, Broad(free).prices)
            pieces, need = stages.smallest()
            problem = real_problem(graphs[name], "cpu", 2, 6, memory_limit_bytes=need)
            for bound_name, bound_s in bounds_of(Broad(problem), shape):
                assert bound_s <= stages.step_time_s(pieces) * (1 + 1e-9), (shape, bound_name)
            count += 1
    assert count > 5


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_no_layouts_within_so_many_bytes_take_less(graphs, name: str) -> None:
    problem = real_problem(graphs[name], "cpu", 2, 8)
    chains, num_blocks, count = problem.chains, len(graphs[name].blocks), 0
    for shape in (Shape(1, 4, 4, 2, "1f1b", 3), Shape(2, 4, 2, 2, "1f1b", 1)):
        for recompute in ("none", "full"):
            for one in chain_frontier(chains._options_of(problem, shape, recompute, LeastPrices), 0, num_blocks):
                assert chains.least_s(problem, shape, one.memory_bytes, math.inf) <= one.time_s * (1 + 1e-9)
                count += 1
    assert count > 5
