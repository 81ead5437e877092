"""UniAP: its program against brute force, and against searching in two steps."""

from __future__ import annotations

import itertools
import math
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from method_cases import small_problem

from autopar.planner.methods.uniap import uniap
from autopar.planner.methods.uniap_program import ChainCosts, pipeline_s, solve_program, two_steps


def random_costs(draw: random.Random, num: int, ways: int, stages: int) -> ChainCosts:
    def matrix() -> np.ndarray:
        found = np.array([[draw.uniform(0, 1) for _ in range(ways)] for _ in range(ways)])
        found[draw.randrange(ways), draw.randrange(ways)] = math.inf if draw.random() < 0.3 else 0.1
        return found

    return ChainCosts(
        np.array([[draw.uniform(0.2, 2) for _ in range(ways)] for _ in range(num)]),
        [matrix() for _ in range(num - 1)],
        [matrix() for _ in range(num - 1)],
        np.array(
            [[[draw.uniform(0, 1) * (stages - s) for s in range(stages)] for _ in range(ways)] for _ in range(num)]
        ),
    )


@pytest.mark.parametrize("seed", range(25))
def test_equals_brute_force_and_is_never_worse_than_two_steps(seed):
    draw = random.Random(seed)
    num, ways = draw.randrange(2, 6), draw.randrange(1, 4)
    stages, microbatches = draw.randrange(1, min(num, 3) + 1), draw.choice([1, 2, 8])
    costs, cap = random_costs(draw, num, ways, stages), draw.choice([math.inf, 3.0, 1.5])
    best_s = math.inf
    for cuts in itertools.combinations(range(1, num), stages - 1):
        stage = [sum(i >= cut for cut in cuts) for i in range(num)]
        for strategy in itertools.product(range(ways), repeat=num):
            held = [
                sum(costs.memory_bytes[i, strategy[i], s] for i in range(num) if stage[i] == s) for s in range(stages)
            ]
            if max(held) <= cap:
                best_s = min(best_s, pipeline_s(costs, stage, strategy, microbatches))
    found = solve_program(costs, stages, microbatches, cap)
    assert (found.total_s if found else math.inf) == pytest.approx(best_s, rel=1e-5)
    if found:
        assert found.bound_s <= found.total_s * (1 + 1e-6)
        assert pipeline_s(costs, found.stage, found.strategy, microbatches) == found.total_s
    stepwise = two_steps(costs, stages, microbatches, cap)
    if stepwise and stepwise[2] < math.inf:
        assert found.total_s <= stepwise[2] * (1 + 1e-5)


def test_two_steps_fall_for_what_the_joint_program_does_not():
    """Strategy 0 is a little faster for each layer, but what it hands to the next stage is expensive to send; and the
    stages it makes do not balance. Chosen first, it is cut after; chosen together, it is left."""
    work_s = np.array([[1.0, 1.1]] * 4)
    inside = [np.zeros((2, 2))] * 3
    across = [np.array([[4.0, 4.0], [4.0, 0.1]])] * 3
    costs = ChainCosts(work_s, inside, across, np.zeros((4, 2, 2)))
    joint, stepwise = solve_program(costs, 2, 8, math.inf), two_steps(costs, 2, 8, math.inf)
    assert joint.strategy == (1, 1, 1, 1) or joint.strategy[1:3] == (1, 1)
    assert joint.total_s < stepwise[2] / 1.5


@pytest.mark.parametrize("seed", range(6))
def test_plans_of_captured_graphs_run(seed):
    problem = small_problem(seed, [2, 4][seed % 2], **[{}, {"microbatches": 4}, {"recompute": "none"}][seed % 3])
    plan = uniap(problem)
    plan.validate(problem.graph, problem.cluster)
    assert plan.candidates[0].verdict == "chosen"


def test_mixed_stages():
    for seed in range(2):
        problem = small_problem(seed, 4, num_blocks=3, batch_size=4)
        equal_s = uniap(replace(problem, unequal_stages=False)).prediction.step_time_s
        plan = uniap(problem)
        assert plan.prediction.step_time_s <= equal_s * 1.2
        assert sorted(rank for stage in plan.stages for rank in stage.ranks) == list(range(4))


def test_the_solver_hears_what_its_caller_says():
    """A program that takes long is given up when asked, while it is built and while it is solved; Ctrl-C in it stays one.

    A solver that was left alone while it presolved counts in the processor time too.
    """
    costs = random_costs(random.Random(0), 24, 10, 8)
    assert solve_program(costs, 8, 64, 3.0, is_over=lambda: True) is None
    begin_s = time.process_time()
    solve_program(costs, 8, 64, 3.0, 8.0, lambda: time.process_time() - begin_s > 0.5)
    assert time.process_time() - begin_s < 4

    def pressed() -> bool:
        if time.process_time() - begin_s > 0.5:
            signal.raise_signal(signal.SIGINT)
        return False

    begin_s = time.process_time()
    # A shell's job in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            solve_program(costs, 8, 64, 3.0, 8.0, pressed)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.process_time() - begin_s < 4
