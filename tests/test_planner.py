"""The stage search against the exhaustive oracle, its bounds, its constraints and its errors."""

from __future__ import annotations

import random

import pytest
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, small_cluster

from autopar.planner.auto import auto
from autopar.planner.methods.exhaustive import every_plan, exhaustive
from autopar.planner.problem import Constraints, Problem
from autopar.simulate import simulate


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
    pinned = {name: getattr(problem.constraints, name) for name in Constraints.__dataclass_fields__}
    return Problem(
        problem.graph, problem.cluster, problem.costs, problem.chains, Constraints(**pinned | {"memory_limit_bytes": limit_bytes})
    )


def peaks(problem: Problem) -> list[int]:
    return sorted(
        max(simulate(problem.graph, plan, problem.cluster, model=problem.costs).peak_memory_bytes.values())
        for plan in every_plan(problem)
    )


@pytest.mark.parametrize("seed", range(40))
def test_auto_finds_what_exhaustive_finds(seed):
    draw = random.Random(1000 + seed)
    pinned = draw.choice([{}, {}, {"schedule": "1f1b"}, {"zero": 0}, {"microbatches": 2}, {"recompute": "full"}])
    free = random_problem(seed, **pinned)
    if len(list(zip(every_plan(free), range(1500)))) == 1500:
        free = random_problem(seed, **pinned | {"schedule": draw.choice(["1f1b", "gpipe"]), "microbatches": 2})
    found = peaks(free)
    for share in (0.0, 0.02, 0.3, 1.0):
        problem = limited(free, found[int(share * (len(found) - 1))])
        plan, oracle = auto(problem, progress=False), exhaustive(problem, progress=False)
        assert plan.prediction.step_time_s == pytest.approx(oracle.prediction.step_time_s, rel=1e-8)
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        assert line.step_time_s == plan.prediction.step_time_s
        assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
        plan.validate(problem.graph, problem.cluster)
    problem = limited(free, found[0] - 1) if found[0] > 1 else None
    if problem:
        for method in (auto, exhaustive):
            with pytest.raises(ValueError, match=f"needs {found[0]} bytes"):
                method(problem, progress=False)
