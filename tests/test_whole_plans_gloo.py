"""Random plans of random modules on real processes, with all levels of ZeRO, against the module on one device.

What tests/test_whole_plans.py, which has no ZeRO, does in one process by the hundred.
"""

from __future__ import annotations

import random

import pytest
import torch
from plan_cases import random_plan, unequal_plan
from random_models import random_model
from test_parity import errors

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.parallelize import Model
from autopar.plan import Plan
from autopar.schedule.orders import SCHEDULES

WORLD_SIZE = 4
PLANS_PER_MODEL = 8


def draw_plan(graph: Graph, seed: int) -> Plan:
    """Four ranks as one, two or four sets, at times with unequal meshes; every schedule, level and way to recompute."""
    draw = random.Random(seed)
    microbatches = draw.choice([1, 2, 4])
    meshes = draw.choice(
        [
            [(4, 1)],
            [(2, 2)],
            [(1, 4)],
            [(1, (2, 2))],
            [(2, 1)] * 2,
            [(2, 1), (1, 2)],
            [(3, 1), (1, 1)],
            [(1, 2), (2, 1)],
        ]
    )
    rows = graph.batch_size // microbatches
    meshes = [(data if data <= rows else 1, tensor if data <= rows else data) for data, tensor in meshes]
    uneven = any(rows % data for data, _ in meshes)
    schedules = [
        name for name, one in SCHEDULES.items() if one.flushes and len(meshes) * (one.virtual or 2) <= len(graph.blocks)
    ]
    options = dict(
        schedule=draw.choice(schedules),
        zero=draw.choice([0, 1, 2, 3, 3]),
        recompute=draw.choice(["none", "full", "mixed"]),
        seed=seed,
    )
    if meshes == [(4, 1)]:
        return random_plan(graph, 4, 1, 1, microbatches, zero_group=draw.choice([0, 2]), **options)
    return unequal_plan(graph, meshes, microbatches, shares="random" if uneven else (), **options)


def train(model_seed: int, device: str = "cpu") -> list[tuple[float, float]]:
    """(loss error, worst error of a gradient) under each of the model's plans, after an evaluation and with two calls."""
    module, example = random_model(model_seed)
    graph = autopar.capture(module, example)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=WORLD_SIZE)
    module.zero_grad()
    expected = module(**example)
    expected.backward()
    found = []
    for seed in range(PLANS_PER_MODEL * model_seed, PLANS_PER_MODEL * (model_seed + 1)):
        plan = draw_plan(graph, seed)
        plan.validate(graph, cluster)
        model = Model(
            graph, plan, cluster, module, seed=0, device=torch.device(device), initialise=None, constraints={}
        )  # fmt: skip
        with torch.no_grad():
            evaluated = model(**example)
        (model(**example) / 2).backward()
        loss = model(**example)
        (loss / 2).backward()
        worst = max(abs(value.item() / expected.item() - 1) for value in (loss, evaluated))
        found.append((worst, errors(model, module)))
    return found


@pytest.mark.parametrize(
    "model_seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 16))]
)
def test_random_plans_are_exact(pool, model_seed: int) -> None:
    for rank, found in enumerate(pool.run(train, model_seed, world_size=WORLD_SIZE, timeout_s=240)):
        for number, (loss, gradient) in enumerate(found):
            assert loss < 2e-6 and gradient < 1e-5, (rank, PLANS_PER_MODEL * model_seed + number, loss, gradient)
