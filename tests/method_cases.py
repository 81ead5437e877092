"""What the tests of the published planners share: small problems, random inputs, and where the authors' data lies."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, small_cluster

from autopar.planner.problem import Constraints, Problem


def peer(path: str) -> Path:
    """A file of the planners' own data; the test is skipped where it is absent."""
    for parent in Path(__file__).resolve().parents:
        if (found := parent / "shared" / "peers" / path).exists():
            return found
    pytest.skip(f"no {path} of the planners' own data here")


def small_problem(seed: int, world_size: int = 4, num_blocks: int = 6, batch_size: int = 8, **pinned) -> Problem:
    """Made-up costs that keep what costs are like; two hosts where the number of devices is even."""
    draw = random.Random(seed)
    graph = chain_graph(tuple(draw.randrange(3) for _ in range(num_blocks)), batch_size)
    per_host = world_size // 2 if world_size % 2 == 0 and draw.random() < 0.5 else world_size
    cluster = small_cluster(world_size, per_host)
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice([0.1, 1, 10]))
    return Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))


def ungated(problem: Problem, monkeypatch) -> Problem:
    """The problem as it is when the runtime executes all that a plan can say."""
    monkeypatch.setattr("autopar.plan_validate._check_runnable", lambda *_: None, raising=False)
    return replace(problem, unequal_stages=True)
