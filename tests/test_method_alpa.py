"""Alpa: the dynamic program against brute force, Megatron's MLP from the integer program, submeshes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import small_problem
from torch import nn

from autopar import capture
from autopar.cluster.presets import preset
from autopar.planner.methods.alpa import alpa
from autopar.planner.methods.alpa_stages import assign_stages, submeshes
from autopar.planner.search import search


@pytest.mark.parametrize("seed", range(25))
def test_equals_brute_force(seed):
    draw = random.Random(seed)
    num, devices, microbatches = draw.randrange(1, 6), draw.randrange(1, 6), draw.choice([1, 2, 8])
    sizes = draw.choice([(1, 2), (1, 2, 4), (1, 3), (2,)])
    costs_s = np.full((num, num + 1, len(sizes)), math.inf)
    succ = np.zeros(costs_s.shape, int)
    for i, k, m in itertools.product(range(num), range(1, num + 1), range(len(sizes))):
        if k > i and draw.random() < 0.9:
            costs_s[i, k, m] = draw.uniform(0.5, 2) * (k - i) / sizes[m]
            succ[i, k, m] = draw.randrange(0, 4)
    best_s = math.inf
    for count in range(1, num + 1):
        for cuts in itertools.combinations(range(1, num), count - 1):
            edges = list(itertools.pairwise((0, *cuts, num)))
            for chosen in itertools.product(range(len(sizes)), repeat=count):
                if sum(sizes[m] for m in chosen) != devices:
                    continue
                stages = list(zip(edges, chosen, strict=True))
                if all(succ[i, k, m] >= count - 1 - s for s, ((i, k), m) in enumerate(stages)):
                    times = [costs_s[i, k, m] for (i, k), m in stages]
                    best_s = min(best_s, sum(times) + (microbatches - 1) * max(times))
    found = assign_stages(costs_s, succ, sizes, devices, microbatches)
    assert (found.total_s if found else math.inf) == pytest.approx(best_s)
    if found:
        assert [stage.start for stage in found.stages] == [0, *(stage.stop for stage in found.stages[:-1])]
        close = assign_stages(costs_s, succ, sizes, devices, microbatches, gap=0.05)
        assert found.total_s <= close.total_s <= found.total_s * 1.06


def test_submeshes_tile_the_cluster():
    assert submeshes(3, 8) == (1, 2, 4, 8, 16, 24)
    assert submeshes(1, 1) == (1,)
    assert submeshes(2, 6) == (1, 2, 4, 6, 12)


def test_the_integer_program_finds_megatrons_mlp():
    """On two devices with few rows and wide weights: the first linear by its columns, the second by its rows, so that
    one all-reduce is all there is to say."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2048, 8192, bias=False), nn.GELU(), nn.Linear(8192, 2048, bias=False))
        graph = capture(module, torch.zeros(8, 2048), loss=lambda out: out.sum())
    plan = search(graph, preset("a100-80gb", 1, 2), "alpa", progress=False, tensor=2)
    chosen = {}
    for stage in plan.stages:
        for row, block in zip(stage.layouts[0], graph.blocks[stage.start : stage.stop], strict=True):
            layout = plan.layouts[row]
            chosen |= dict(zip((graph.tensors[p].fqn for p in block.parameters), layout.parameters, strict=True))
    assert chosen == {"0.weight": "S0", "2.weight": "S1"}


@pytest.mark.parametrize("seed", range(6))
def test_plans_of_captured_graphs_run(seed):
    problem = small_problem(seed, [2, 4, 8][seed % 3], **[{}, {"data": 1}, {"zero": 0}][seed % 3])
    plan = alpa(problem)
    plan.validate(problem.graph, problem.cluster)
    assert plan.candidates[0].verdict == "chosen"


def test_unequal_submeshes():
    """All submeshes at once are no slower than equal ones; all ranks are used, whole hosts stay whole."""
    for seed in range(4):
        problem = small_problem(seed, 8, num_blocks=5)
        equal_s = alpa(replace(problem, unequal_stages=False)).prediction.step_time_s
        plan = alpa(problem)
        assert plan.prediction.step_time_s <= equal_s
        assert sorted(rank for stage in plan.stages for rank in stage.ranks) == list(range(8))
