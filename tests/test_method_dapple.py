"""DAPPLE: its search against brute force, and a case where the replicas of a stage belong on different machines."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from method_cases import small_problem

from autopar.planner.methods.dapple import dapple
from autopar.planner.methods.dapple_placement import Layers, Machines, Placed, place, placements, score_s, transfer_s


def random_layers(draw: random.Random, num: int, most: int) -> Layers:
    forward = np.array([draw.uniform(0.5, 2) for _ in range(num)])
    launch = draw.uniform(0, 0.1)
    block_s = {m: np.concatenate([[0.0], np.cumsum(forward / m + launch)]) for m in range(1, most + 1)}
    weights = np.concatenate([[0.0], np.cumsum([draw.uniform(0, 3) for _ in range(num)])])
    return Layers(block_s, weights, np.array([0.0, *(draw.uniform(0, 2) for _ in range(num))]))


def every_pipeline(layers: Layers, machines: Machines, kinds):
    total = machines.count * machines.devices
    for count in range(1, min(layers.num, total) + 1):
        for cuts in itertools.combinations(range(1, layers.num), count - 1):
            edges = list(itertools.pairwise((0, *cuts, layers.num)))
            for shares in itertools.product(range(1, total + 1), repeat=count):
                if sum(shares) == total:
                    yield from _placed(edges, shares, (0,) * machines.count, machines, kinds)


def _placed(edges, shares, used, machines, kinds):
    if not edges:
        yield ()
        return
    for on in placements(used, machines, shares[0], kinds):
        now = tuple(a + b for a, b in zip(used, on, strict=True))
        for rest in _placed(edges[1:], shares[1:], now, machines, kinds):
            yield (Placed(*edges[0], on), *rest)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed):
    draw = random.Random(seed)
    machines = Machines(*draw.choice([(1, 3), (2, 2), (3, 1)]), 10.0, draw.choice([0.5, 3.0]))
    layers = random_layers(draw, draw.randrange(2, 5), machines.count * machines.devices)
    microbatches = draw.choice([1, 2, 8])
    kinds = ("fresh", "append", "scatter")
    best_s = min(score_s(stages, layers, machines, microbatches) for stages in every_pipeline(layers, machines, kinds))
    stages, found_s = place(layers, machines, microbatches)
    assert found_s == pytest.approx(best_s)
    assert score_s(stages, layers, machines, microbatches) == pytest.approx(found_s)
    assert sum(stage.replicas for stage in stages) == machines.count * machines.devices


def test_replicas_belong_across_machines_where_activations_are_large():
    """Two layers on two machines of two devices. Weights are small, the activation between the layers is large: with a
    replica of each stage on either machine it stays inside the machines, which contiguous placement cannot do."""
    block_s = {m: np.array([0.0, 1.0, 2.0]) / m for m in (1, 2, 4)}
    layers = Layers(block_s, np.array([0.0, 0.1, 0.2]), np.array([0.0, 8.0, 0.0]))
    machines = Machines(2, 2, 100.0, 1.0)
    stages, found_s = place(layers, machines, 4, replicas=[2])
    assert [stage.on for stage in stages] == [(1, 1), (1, 1)]
    contiguous, contiguous_s = place(layers, machines, 4, replicas=[2], kinds=("fresh", "append"))
    assert [stage.on for stage in contiguous] == [(2, 0), (0, 2)]
    assert found_s < contiguous_s / 1.5
    # and where weights are what is large, a stage's replicas share a machine
    heavy = Layers(block_s, np.array([0.0, 8.0, 16.0]), np.array([0.0, 0.1, 0.0]))
    assert [stage.on for stage in place(heavy, machines, 4, replicas=[2])[0]] == [(2, 0), (0, 2)]


def test_the_three_placements():
    machines = Machines(3, 4, 1.0, 1.0)
    used = (2, 0, 0)
    assert list(placements(used, machines, 4, ("fresh",))) == [(0, 4, 0)]
    assert list(placements(used, machines, 4, ("append",))) == [(2, 2, 0)]
    assert list(placements(used, machines, 4, ("scatter",))) == [(2, 1, 1)]
    assert list(placements((4, 4, 3), machines, 1, ("fresh", "append", "scatter"))) == [(0, 0, 1)]


def test_transfers_inside_and_between_machines():
    layers = Layers({2: np.zeros(3)}, np.zeros(3), np.array([0.0, 6.0, 0.0]))
    machines = Machines(2, 4, 4.0, 1.0)
    on = Placed(0, 1, (1, 1))
    assert transfer_s(on, Placed(1, 2, (1, 1)), layers, machines) == pytest.approx(12 / (2 * 4.0))
    assert transfer_s(Placed(0, 1, (2, 0)), Placed(1, 2, (0, 2)), layers, machines) == pytest.approx(12 / 2)
    half = transfer_s(Placed(0, 1, (2, 0)), Placed(1, 2, (1, 1)), layers, machines)
    assert half == pytest.approx(6 / (2 * 4.0) + 6 / 2)


@pytest.mark.parametrize("seed", range(6))
def test_plans_of_captured_graphs_run(seed):
    problem = small_problem(seed, [2, 4, 8][seed % 3], **[{}, {"pipeline": 2}][seed % 2])
    plan = dapple(problem)
    plan.validate(problem.graph, problem.cluster)
    assert plan.prediction.step_time_s < math.inf and plan.stages[0].tensor == 1
    if problem.constraints.pipeline:
        assert len(plan.stages) == 2


def test_unequal_stages():
    """One heavy block among light ones: with free numbers of replicas the plan is no slower, and uses all ranks."""
    for seed in range(4):
        problem = small_problem(seed, 6, num_blocks=5, batch_size=12)
        equal_s = dapple(replace(problem, unequal_stages=False)).prediction.step_time_s
        plan = dapple(problem)
        assert plan.prediction.step_time_s <= equal_s
        assert sorted(rank for stage in plan.stages for rank in stage.ranks) == list(range(6))
