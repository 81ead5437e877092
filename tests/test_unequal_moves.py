"""Moves on clusters of unequal devices: priced as the simulator does, never worse, within what is pinned, and where they help."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from method_cases import half_as_fast, unequal_problem
from plan_cases import unequal_plan

from autopar.cluster.spec import Cluster
from autopar.planner.auto import auto
from autopar.planner.problem import Constraints
from autopar.planner.relief import CHOICES, with_recompute
from autopar.planner.unequal import _Unequal
from autopar.planner.unequal_moves import RanksJudge, alleviated_on_ranks
from autopar.simulate import simulate

CPU = Cluster.preset("cpu", 1, 2)


@pytest.mark.parametrize("seed", range(8))
def test_the_judge_says_what_the_simulator_says(seed: int) -> None:
    """Of random plans over devices of two speeds and memories: step time, and by how much the fullest rank is over."""
    draw = random.Random(seed)
    problem = unequal_problem("deep", [CPU, half_as_fast(CPU, 3.0, memory=draw.choice([0.5, 1e-4]))])
    meshes = draw.choice([[(2, 1), (2, 1)], [(1, 2), (2, 1)], [(1, 1), (1, 1), (1, 2)], [(3, 1), (1, 1)]])
    shares = [(2, 1, 1), ()] if meshes[0][0] == 3 else ()
    schedule = draw.choice(["1f1b", "gpipe", "zb-h1", "interleaved"]) if len(meshes) == 2 else "1f1b"
    plan = unequal_plan(problem.graph, meshes, 2, schedule=schedule, shares=shares, seed=seed)
    stages = tuple(with_recompute(s, [draw.choice(CHOICES) for _ in range(s.num_blocks)]) for s in plan.stages)
    plan = replace(plan, stages=stages)
    line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
    judged = RanksJudge(problem)(plan)
    assert judged.time_s == pytest.approx(line.step_time_s, rel=1e-9)
    excess_bytes = problem.excess_bytes(line.peak_memory_bytes)
    assert max(judged.peaks_bytes) - judged.limit_bytes == excess_bytes
    assert judged.fits == (excess_bytes <= 0)


@pytest.mark.parametrize("pinned", [{}, {"schedule": "1f1b"}, {"zero": 0, "recompute": "none"}, {"microbatches": 4}])
def test_never_worse_and_within_what_is_pinned(pinned: dict, monkeypatch) -> None:
    monkeypatch.setattr("autopar.planner.unequal.MAX_SEEDED", 0)
    problem = unequal_problem("deep", [CPU, half_as_fast(CPU, 2.0)], tensor=1, **pinned)
    search = _Unequal(problem)
    search._search()
    before = search.judge.best
    found = alleviated_on_ranks(problem, before)
    if found is None:
        return
    found.validate(problem.graph, problem.cluster)
    line = simulate(problem.graph, found, problem.cluster, model=problem.costs)
    assert line.step_time_s < before.prediction.step_time_s
    assert problem.excess_bytes(line.peak_memory_bytes) <= 0
    said = {
        "schedule": {found.schedule}, "microbatches": {found.microbatches}, "zero": {s.zero for s in found.stages},
        "recompute": {choice for s in found.stages for choice in s.block_recompute},
    }  # fmt: skip
    assert all(said[name] == {value} for name, value in pinned.items())


def test_few_microbatches_want_a_schedule_that_walks_do_not_have(monkeypatch) -> None:
    monkeypatch.setattr("autopar.planner.unequal.MAX_SEEDED", 0)
    problem = unequal_problem("stack", [CPU, half_as_fast(CPU, 2.0)], pipeline=4, microbatches=4)
    after = auto(problem)
    monkeypatch.setattr("autopar.planner.unequal.alleviated_on_ranks", lambda problem, plan, others: None)
    before = auto(problem)
    assert before.schedule in ("1f1b", "gpipe") and after.schedule not in ("1f1b", "gpipe")
    assert after.prediction.step_time_s < 0.95 * before.prediction.step_time_s
    line = simulate(problem.graph, after, problem.cluster, model=problem.costs)
    assert line.step_time_s == pytest.approx(after.prediction.step_time_s, rel=1e-9)
    assert max(line.peak_memory_bytes.values()) == after.prediction.peak_memory_bytes
    pinned = replace(problem, constraints=Constraints(pipeline=4, microbatches=4, schedule="1f1b"))
    assert auto(pinned).schedule == "1f1b"


def test_an_interrupt_of_the_moves_leaves_the_plan_before(monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autopar.planner.unequal.MAX_SEEDED", 0)
    monkeypatch.setattr("autopar.planner.unequal.alleviated_on_ranks", interrupted)
    problem = unequal_problem("deep", [CPU, half_as_fast(CPU, 2.0)], microbatches=4)
    plan = auto(problem)
    plan.validate(problem.graph, problem.cluster)
    assert "cut short by an interrupt" in plan.candidates[0].verdict
