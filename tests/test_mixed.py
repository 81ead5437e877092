"""The last stage of `auto` on equal devices: stages of different meshes, against brute force, and what they gain and compute."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from loopback_plans import parallel_step
from planner_cases import limited, random_problem, simulated, small_cluster, whole_layout
from torch import nn

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.plan import Plan, Stage, same_recompute, tensor_axes
from autopar.planner.auto import auto
from autopar.planner.chains import LayoutChains
from autopar.planner.judge import Judge
from autopar.planner.meshes import MeshLayouts, meshes_of, place, team_of
from autopar.planner.methods.exhaustive import exhaustive
from autopar.planner.mixed import with_unequal_stages
from autopar.planner.mixes import CAPS, Mixes, assignments
from autopar.planner.problem import Constraints, Problem
from autopar.planner.sketch import Sketch
from autopar.planner.wide import count_wide_plans, every_wide_plan
from autopar.planner.wide_mixes import count_mixed_plans, every_mixed_plan
from autopar.simulate import simulate


def meshes(plan: Plan) -> set[tuple[int, int]]:
    return {(stage.data, stage.tensor) for stage in plan.stages}


# -- the recursion


@pytest.mark.parametrize("seed", range(12))
def test_pipelines_against_brute_force(seed: int) -> None:
    """The slowest stage is as fast as can be in one of them, and the best is no worse than its nearest cap makes it."""
    draw = random.Random(seed)
    layers, units, count = draw.randrange(2, 6), draw.randrange(2, 6), draw.choice([1, 2, 8, 64])
    sizes = sorted(draw.sample(range(1, units + 1), draw.randrange(1, units + 1)))
    most = min(layers, units)
    costs_s = np.full((most, len(sizes), layers, layers + 1), math.inf)
    for behind, size, start in itertools.product(range(most), range(len(sizes)), range(layers)):
        for stop in range(start + 1, layers + 1):
            if draw.random() < 0.9:
                costs_s[behind, size, start, stop] = draw.uniform(0.5, 1.5) * (stop - start) / sizes[size]
    every = []
    for stages in range(1, most + 1):
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            for chosen in itertools.product(range(len(sizes)), repeat=stages):
                if sum(sizes[size] for size in chosen) == units:
                    edges = itertools.pairwise((0, *cuts, layers))
                    each = [costs_s[stages - 1 - s, chosen[s], a, b] for s, (a, b) in enumerate(edges)]
                    if math.isfinite(max(each)):
                        every.append((max(each), sum(each) + (count - 1) * max(each)))
    found = assignments(costs_s, sizes, units, count, range(1, most + 1))
    fastest = min(every, default=None)
    assert bool(found) == (fastest is not None)
    if not found:
        return
    slowest = []
    for one in found:
        assert sum(part.units for part in one.parts) == units
        edges = [(part.start, part.stop) for part in one.parts]
        assert edges[0][0] == 0 and edges[-1][1] == layers and all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        each = [
            costs_s[len(edges) - 1 - s, sizes.index(part.units), part.start, part.stop]
            for s, part in enumerate(one.parts)
        ]
        assert one.total_s == pytest.approx(sum(each) + (count - 1) * max(each))
        slowest.append(max(each))
    assert min(slowest) == pytest.approx(fastest[0])
    best_s, best_slowest_s = min((total_s, slowest_s) for slowest_s, total_s in every)
    if best_slowest_s <= CAPS[-1] * fastest[0]:
        cap_s = fastest[0] * next(c for c in CAPS if c * fastest[0] >= best_slowest_s * (1 - 1e-9))
        assert best_s * (1 - 1e-9) <= found[0].total_s <= best_s + (count - 1) * (cap_s - best_slowest_s) + 1e-9


def test_groups_stay_within_hosts_where_they_can() -> None:
    cluster = small_cluster(16, 8)
    assert place(cluster, [4, 4, 8]) == (tuple(range(4)), tuple(range(4, 8)), tuple(range(8, 16)))
    assert place(cluster, [4, 8, 4]) == ((8, 9, 10, 11), tuple(range(8)), (12, 13, 14, 15))


# -- tiny problems, whole


PINS = [
    {}, {"schedule": "1f1b"}, {"zero": 0}, {"zero": 3}, {"microbatches": 2}, {"recompute": "full"}, {"tensor": 1},
    {"pipeline": 2}, {"data": 1}, {"schedule": "1f1b", "recompute": "none"},
]  # fmt: skip


@functools.cache
def tiny_problem(seed: int, most_plans: int = 500) -> Problem:
    """3 or 4 devices, up to 4 blocks, pinned at random, with unlike stages to choose."""
    draw = random.Random(seed)
    for _ in range(500):
        try:
            problem = random_problem(draw.randrange(10**6), (3, 4), 4, **draw.choice(PINS))
            if count_mixed_plans(problem) and count_mixed_plans(problem) + count_wide_plans(problem) <= most_plans:
                return problem
        except ValueError:
            continue
    raise AssertionError("no such problem was drawn")


def keeps(problem: Problem, plan: Plan) -> bool:
    pinned = problem.constraints
    said = {
        "schedule": {plan.schedule}, "microbatches": {plan.microbatches}, "pipeline": {plan.pipeline},
        "zero": {s.zero for s in plan.stages}, "data": {s.data for s in plan.stages},
        "tensor": {s.tensor for s in plan.stages}, "recompute": {c for s in plan.stages for c in s.block_recompute},
    }  # fmt: skip
    return all(getattr(pinned, name) is None or values == {getattr(pinned, name)} for name, values in said.items())


@pytest.mark.parametrize("seed", range(8))
def test_auto_equals_or_beats_all_plans_under_every_memory_limit(seed: int) -> None:
    free = tiny_problem(seed)
    every = simulated(free, itertools.chain(every_wide_plan(free), every_mixed_plan(free)))
    peaks = sorted({peak for _, peak in every})
    for share in (0.0, 0.1, 0.5, 1.0):
        problem = limited(free, peaks[int(share * (len(peaks) - 1))])
        plan = auto(problem)
        best_s = min(time_s for time_s, peak in every if peak <= problem.memory_limit_bytes)
        assert plan.prediction.step_time_s <= best_s * (1 + 1e-9)
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
        assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
        plan.validate(problem.graph, problem.cluster)
        assert keeps(problem, plan)


def test_exhaustive_has_unlike_stages() -> None:
    problem = next(one for one in map(tiny_problem, range(20)) if len(meshes(auto(one))) > 1)
    assert len(meshes(exhaustive(problem))) > 1


def unlike_plans(problem: Problem) -> Iterator[Plan]:
    """Under 1F1B without ZeRO, made here from nothing but the definition of a plan."""
    graph, world, rows = problem.graph, problem.cluster.world_size, problem.graph.batch_size
    num_blocks = len(graph.blocks)
    for groups in range(2, min(world, num_blocks) + 1):
        for ends in itertools.combinations(range(1, world), groups - 1):
            sizes = [b - a for a, b in itertools.pairwise((0, *ends, world))]
            for tensors in itertools.product(*([t for t in range(1, n + 1) if n % t == 0] for n in sizes)):
                for cuts in itertools.combinations(range(1, num_blocks), groups - 1):
                    for count, choices in itertools.product(
                        [m for m in range(1, rows + 1) if rows % m == 0],
                        itertools.product(("none", "full"), repeat=groups),
                    ):
                        stages, layouts, first = [], [], 0
                        for start, stop, size, tensor, choice in zip(
                            (0, *cuts), (*cuts, num_blocks), sizes, tensors, choices, strict=True
                        ):
                            index = tuple(range(len(layouts), len(layouts) + stop - start)) if tensor > 1 else ()
                            layouts += [whole_layout(block, tensor) for block in graph.blocks[start:stop] if tensor > 1]
                            stages.append(
                                Stage(
                                    start, stop, tuple(range(first, first + size)), size // tensor, tensor_axes(tensor),
                                    (index,) if tensor > 1 else (), same_recompute(choice, stop - start),
                                )
                            )  # fmt: skip
                            first += size
                        if all(rows // count % stage.data == 0 for stage in stages):
                            yield Plan(
                                graph.name, graph.fingerprint, world, rows, count, "1f1b", tuple(stages), tuple(layouts)
                            )


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_unlike_stages_beats_auto(seed: int) -> None:
    """Of all that one can write down; on some of these problems the best has unlike stages."""
    problem = tiny_problem(seed)
    problem = replace(problem, constraints=Constraints(schedule="1f1b", zero=0))
    plan = auto(problem)
    fitting = [s for s, peak in simulated(problem, unlike_plans(problem)) if peak <= problem.memory_limit_bytes]
    assert plan.prediction.step_time_s <= min(fitting) * (1 + 1e-9)


def test_some_tiny_problems_want_unlike_stages() -> None:
    found = 0
    for seed in range(10):
        problem = tiny_problem(seed)
        equal_s = auto(replace(problem, unequal_stages=False)).prediction.step_time_s
        plan = auto(problem)
        assert plan.prediction.step_time_s <= equal_s
        found += len(meshes(plan)) > 1 and plan.prediction.step_time_s < 0.99 * equal_s
    assert found >= 2


# -- where unlike stages should win


class WideHead(nn.Module):
    """Two small layers under a head that has most of the work; returns the loss."""

    def __init__(self, width: int = 32, words: int = 2048) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, words)

    def forward(self, x):
        return torch.tanh(self.head(self.body(x))).square().mean()


@functools.cache
def head_graph() -> Graph:
    """Eight small layers under a head that is twice as much."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)), nn.Linear(512, 8192))
        return capture(module, torch.zeros(384, 512), loss=lambda out: out.sum())


def problem_of(graph, cluster, **pinned) -> Problem:
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pinned))


def test_a_heavy_head_gets_more_devices_and_computes_the_same() -> None:
    """Three devices: no plan of one mesh is as fast, and the plan runs as the module does."""
    torch.manual_seed(0)
    module, example = WideHead(), {"x": torch.randn(16, 32)}
    graph, cluster = capture(module, example), preset("cpu", 1, 3)
    problem = problem_of(graph, cluster, zero=0, rewrites=False, schedule="1f1b", recompute="none")
    plan = auto(problem)
    assert len(meshes(plan)) == 2 and len(plan.stages[-1].ranks) == 2
    equal = simulated(problem, every_wide_plan(problem))
    assert plan.prediction.step_time_s < 0.97 * min(s for s, peak in equal if peak <= problem.memory_limit_bytes)
    assert any("before" in one.verdict for one in plan.candidates)
    assert max(parallel_step(graph, module, example, plan)) < 1e-5


@pytest.mark.parametrize("devices", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_wide_heads_on_numbers_of_devices_that_are_no_power_of_two(devices: int) -> None:
    """Beyond what is searched whole: by the recursion and by moves."""
    graph = head_graph()
    problem = problem_of(graph, preset("t4-16gb", 1, devices), rewrites=False, microbatches=8)
    equal_s = auto(replace(problem, unequal_stages=False)).prediction.step_time_s
    plan = auto(problem)
    assert plan.prediction.step_time_s < 0.97 * equal_s and len(meshes(plan)) > 1
    plan.validate(graph, problem.cluster)
    line = simulate(graph, plan, problem.cluster, model=problem.costs)
    assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes


def test_what_is_expected_is_near_what_it_costs() -> None:
    """Of pipelines of unlike meshes of a real model, so that the right ones are judged."""
    problem = problem_of(head_graph(), preset("t4-16gb", 1, 6), microbatches=4)
    judge = Judge(problem)
    found = list(itertools.islice(Mixes(problem, judge, MeshLayouts(problem), 4).sketches((0,), "1f1b"), 12))
    assert len(found) > 3
    for expected_s, sketch in found:
        assert abs(math.log(judge(sketch.plan(problem.graph)).time_s / expected_s)) < 0.2


# -- what stays


def test_pins_and_hosts_that_allow_one_mesh_only() -> None:
    problem = tiny_problem(0)
    for pinned in (dict(pipeline=1), dict(data=1, tensor=1)):
        other = replace(problem, constraints=Constraints(**pinned))
        assert not list(every_mixed_plan(other))
    problem = replace(problem, constraints=Constraints(data=1))
    assert {mesh.data for mesh in meshes_of(problem, 2, 1)} == {1}
    assert [
        mesh.shares for mesh in meshes_of(replace(problem, constraints=Constraints()), 3, 1) if mesh.tensor == 1
    ] == [() if problem.graph.batch_size % 3 == 0 else (2, 1, 1) if problem.graph.batch_size == 4 else (3, 3, 2)]


def test_out_of_time_the_plan_stays() -> None:
    problem = next(one for one in map(tiny_problem, range(20)) if len(meshes(auto(one))) > 1)
    plan = auto(replace(problem, unequal_stages=False))
    problem.budget.interrupted()
    assert with_unequal_stages(problem, plan, 1.0) == plan


def test_teams_have_no_zero_without_data() -> None:
    problem = tiny_problem(1)
    layouts, found = MeshLayouts(problem), []
    for mesh in meshes_of(replace(problem, constraints=Constraints()), 2, 1):
        found.append(team_of(mesh, range(2), layouts.fastest(mesh, 1, 3), 3))
    assert {(team.data, team.zero) for team in found} <= {(2, 3), (1, 0)} and found
    assert Sketch((len(problem.graph.blocks),), (found[0],), 1, "1f1b").plan(problem.graph).world_size == 2
