"""Encoders, vision, speech, recurrence and awkward habits: two steps under every kind of plan equal those of one device."""

from __future__ import annotations

import functools
import math
from typing import Any

import models
import more_models
import pytest
import torch
from plan_cases import random_plan, world_of
from test_parity import call
from torch import nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.runtime.torch_private import local_tensor
from autopar.sharding.batch import batch_layout

PLANS = [
    dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=1),
    dict(data=1, tensor=1, pipeline=2, microbatches=2, seed=2),
    dict(data=2, tensor=1, pipeline=1, microbatches=1, recompute="full"),
    dict(data=2, tensor=2, pipeline=1, microbatches=1, seed=3),
    dict(data=2, tensor=1, pipeline=2, microbatches=2, seed=4),
]


QUICK = ("build_bert", "build_resnet", "build_habits")


def builder(name: str) -> Any:
    return getattr(more_models, name, None) or getattr(models, name)


@functools.cache
def graph_of(name: str) -> Graph:
    return autopar.capture(*builder(name)())


def gradient_error(model: autopar.Model, module: nn.Module) -> float:
    """The worst error of this rank's gradients, against the gradient's norm, or a thousandth of all gradients' norm: a bias
    of keys or in front of a batch norm has none but rounding."""
    oracle = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    least = 1e-3 * float(torch.cat([g.flatten() for g in oracle.values()]).norm())
    worst = 0.0
    for name, parameter in model.named_parameters():
        if name not in oracle:
            assert parameter.grad is None, name
            continue
        expected = parameter.autopar.ownership.take(oracle[name], model.runtime.groups.rank)
        difference = float((local_tensor(parameter.grad) - expected).norm())
        worst = max(worst, difference / max(least, float(oracle[name].norm())))
    return worst


def two_steps(name: str, plans: list[dict[str, Any]]) -> list[list[float]]:
    """Per plan: relative errors of two losses, of an evaluation and of the buffers, and a tenth of the gradients'."""
    found = []
    for plan in plans:
        module, example, loss = builder(name)()
        graph = graph_of(name)
        world = world_of(plan)
        if batch_layout(graph, 2).time_conflict:
            plan = {**plan, "microbatches": 1}
        cluster = Cluster.preset("cpu", hosts=1, devices_per_host=world)
        model = autopar.parallelize(module, example, loss, plan=random_plan(graph, **plan), cluster=cluster)
        worst = []
        for _ in range(2):
            value = call(model, example)
            value.backward()
            expected = call(module, example, loss)
            expected.backward()
            worst.append(abs(value.item() - expected.item()) / abs(expected.item()))
        worst.append(gradient_error(model, module) / 10)
        model.share_buffers()
        named = dict(module.named_buffers())
        for fqn, buffer in model.named_buffers():
            difference = (buffer.double() - named[fqn].double()).norm() / named[fqn].double().norm().clamp(min=1e-9)
            worst.append(float(difference) if math.prod(buffer.shape) else 0.0)
        model.eval(), module.eval()
        with torch.no_grad():
            value, expected = call(model, example), call(module, example, loss)
        worst.append(abs(value.item() - expected.item()) / abs(expected.item()))
        found.append(worst)
    return found


CASES = [
    pytest.param(name, world_size, marks=[] if world_size == 2 and name in QUICK else pytest.mark.slow)
    for world_size in (2, 4)
    for name in (builder.__name__ for builder in more_models.BUILDERS)
]


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_losses_gradients_and_buffers(pool, name: str, world_size: int) -> None:
    plans = [p for p in PLANS if p["data"] * p["tensor"] * p["pipeline"] == world_size]
    for rank, found in enumerate(pool.run(two_steps, name, plans, world_size=world_size, timeout_s=240)):
        for plan, worst in zip(plans, found, strict=True):
            assert max(worst) < 1e-5, (rank, plan, worst)
