"""Metis and Whale on unequal devices, and the methods that know of equal ones alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from method_cases import half_as_fast, unequal_problem

from autopar.cluster.spec import Cluster
from autopar.planner.methods.metis import metis
from autopar.planner.methods.whale import balanced, flops_per_s, whale
from autopar.planner.problem import Problem
from autopar.planner.search import search
from autopar.simulate import simulate

FAST = Cluster.preset("cpu", 1, 2)


def idle_share(problem: Problem, plan) -> float:
    """Of a step of one stage, what its ranks wait for the slowest on average."""
    costs = [problem.costs.of_rank(plan, 0, rank) for rank in plan.stages[0].ranks]
    times = [cost.forward_s + cost.backward_s for cost in costs]
    return 1 - sum(times) / len(times) / max(times)


@pytest.mark.parametrize(("factor", "rows"), [(2.0, (512, 512, 256, 256)), (3.0, (576, 576, 192, 192))])
def test_idle_time_falls_against_the_even_split(factor: float, rows: tuple[int, ...]) -> None:
    """Rows in proportion to speed: a slow cpu at half (a third of) the rate gets exactly half (a third) of a fast one's."""
    problem = unequal_problem("rows", [FAST, half_as_fast(FAST, factor)], data=4, microbatches=1)
    found = whale(problem)
    even = replace(found, stages=(replace(found.stages[0], shares=()),))
    rates = [flops_per_s(problem, rank) for rank in range(4)]
    assert rates[0] == pytest.approx(factor * rates[2])
    assert found.stages[0].shares == rows
    assert idle_share(problem, found) < 0.05 < 0.2 < idle_share(problem, even)
    assert found.prediction.step_time_s < 0.85 * simulate(problem.graph, even, problem.cluster).step_time_s
    found.validate(problem.graph, problem.cluster)


def test_rows_leave_devices_that_run_out_of_memory() -> None:
    fast, slow = FAST, half_as_fast(FAST, 1.0001)
    problem = unequal_problem("rows", [fast, slow], data=4, microbatches=1)
    plan = whale(problem)
    peaks = simulate(problem.graph, plan, problem.cluster).peak_memory_bytes
    tight_bytes = int(peaks[3] * 0.97 / 0.9)
    small = replace(slow, device=replace(slow.device, memory_bytes=tight_bytes, kind="small"))
    # The small ones are not slower, so that only their memory tells them apart.
    tight = unequal_problem("rows", [half_as_fast(fast, 0.9), small], data=4, microbatches=1)
    even = replace(plan, stages=(replace(plan.stages[0], shares=()),))
    assert tight.excess_bytes(simulate(tight.graph, even, tight.cluster).peak_memory_bytes) > 0
    found = balanced(tight, even)
    assert found.stages[0].shares[0] > 384 > found.stages[0].shares[3]
    assert tight.excess_bytes(simulate(tight.graph, found, tight.cluster).peak_memory_bytes) <= 0


def test_whale_puts_more_memory_first_and_more_layers_on_faster_devices() -> None:
    small, large = FAST, half_as_fast(FAST, 6.0, memory=4)
    problem = unequal_problem("llama", [small, large], pipeline=2, microbatches=2, data=2, tensor=1)
    plan = whale(problem)
    assert [stage.ranks for stage in plan.stages] == [(2, 3), (0, 1)]
    assert plan.stages[0].num_blocks < plan.stages[1].num_blocks
    plan.validate(problem.graph, problem.cluster)


@pytest.mark.parametrize("pinned", [{}, {"pipeline": 2}, {"microbatches": 2}])
def test_metis_uses_what_faster_devices_have(pinned: dict) -> None:
    """Never worse than if all devices were the slow ones, and better than the same with even rows."""
    problem = unequal_problem("llama", [half_as_fast(FAST, 3.0), FAST], **pinned)
    plan = metis(problem)
    plan.validate(problem.graph, problem.cluster)
    slow = metis(problem.as_equal)
    assert plan.prediction.step_time_s < slow.prediction.step_time_s
    on_all = simulate(problem.graph, slow, problem.cluster).step_time_s
    assert plan.prediction.step_time_s <= on_all * (1 + 1e-9)
    assert simulate(problem.graph, plan, problem.cluster).step_time_s == pytest.approx(plan.prediction.step_time_s)


def test_metis_shares_three_to_one() -> None:
    one = Cluster.preset("cpu", 1, 1)
    problem = unequal_problem("rows", [one, half_as_fast(one, 3.0)], microbatches=1)
    plan = metis(problem)
    shares = {stage.shares for stage in plan.stages}
    assert plan.pipeline == 1 and len(shares) == 1
    fast, slow = shares.pop()
    assert fast + slow == 1536 and fast / slow == pytest.approx(3, rel=0.05)


def test_methods_for_equal_devices_plan_for_what_all_have_in_common() -> None:
    problem = unequal_problem("mlp", [FAST, half_as_fast(FAST)])
    for method in ("alpa", "pipedream", "dapple", "aceso"):
        plan = search(problem.graph, problem.cluster, method, model=problem.costs, progress=False)
        plan.validate(problem.graph, problem.cluster)
        line = simulate(problem.graph, plan, problem.cluster)
        assert line.step_time_s == pytest.approx(plan.prediction.step_time_s)
