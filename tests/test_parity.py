"""Every plan computes what the module computes on one device: losses, gradients, and ten steps of an optimizer.

The plans are random (layouts, stage cuts, placements at rest); the oracle is the untouched module in this process.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from plan_cases import random_plan
from storage_cases import CountCollectives
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.runtime.ownership import Ownership
from autopar.runtime.torch_private import local_tensor

MODELS = ["build_llama", "build_gpt2", "build_mlp", "build_conv_net", "build_tied_lm", "build_two_inputs"]
DEGREES = list(itertools.product((1, 2), repeat=3))


def call(module: nn.Module, example: Any, loss: Callable[..., Tensor] | None = None) -> Tensor:
    """The scalar loss of the module, or of the parallel module, on the example."""
    args, kwargs = example if isinstance(example, tuple) else (), example if isinstance(example, dict) else {}
    if isinstance(example, Tensor):
        args = (example,)
    if loss is None:
        result = module(*args, **kwargs)
        return result if isinstance(result, Tensor) else result["loss"]
    taken = inspect.signature(module.forward).parameters
    inputs = {k: v for k, v in kwargs.items() if k in taken}
    targets = [v for k, v in kwargs.items() if k not in taken]
    return loss(module(*args[: len(taken)], **inputs), *args[len(taken) :], *targets)


@functools.cache
def graph_of(name: str) -> Graph:
    return autopar.capture(*getattr(models, name)())


def parallel(name: str, plan: dict[str, Any]) -> tuple[autopar.Model, Any, nn.Module, Callable[..., Tensor] | None]:
    """The named model under a random plan of these degrees, on this rank."""
    module, example, loss = getattr(models, name)()
    axes = plan["tensor"] if isinstance(plan["tensor"], tuple) else (plan["tensor"],)
    world = plan["data"] * math.prod(axes) * plan["pipeline"]
    model = autopar.parallelize(
        module,
        example,
        loss,
        plan=random_plan(graph_of(name), **plan),
        cluster=Cluster.preset("cpu", hosts=1, devices_per_host=world),
    )
    return model, example, module, loss


def errors(model: autopar.Model, module: nn.Module) -> float:
    """The worst relative error of this rank's parts of the gradients, each against the norm of the whole gradient."""
    worst = 0.0
    oracle = dict(module.named_parameters())
    assert {n for n, _ in model.named_parameters()} <= set(oracle)
    for name, parameter in model.named_parameters():
        ownership: Ownership = parameter.autopar.ownership
        whole = oracle[name].grad
        if whole is None:
            assert parameter.grad is None, f"{name} is frozen, and got a gradient"
            continue
        expected = ownership.take(whole, model.runtime.groups.rank)
        worst = max(worst, float((local_tensor(parameter.grad).cpu() - expected).norm() / whole.norm()))
    return worst


def one_step(name: str, plans: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """(loss error, gradient error, evaluation error) per plan."""
    found = []
    for plan in plans:
        model, example, module, loss = parallel(name, plan)
        value = call(model, example)
        # Scaling the loss scales gradients; two calls before one another's backward accumulate.
        (value / 4).backward()
        (call(model, example) * 0.75).backward()
        module.zero_grad()
        expected = call(module, example, loss)
        expected.backward()
        with torch.no_grad():
            evaluated = call(model.eval(), example)
        relative = [abs(v.item() - expected.item()) / abs(expected.item()) for v in (value, evaluated)]
        found.append((relative[0], errors(model, module), relative[1]))
    return found


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(n, name, marks=pytest.mark.slow)
        if n == 8 and name in ("build_gpt2", "build_tied_lm")
        else (n, name)
        for n in (1, 2, 4, 8)
        for name in MODELS
    ],
)
def test_loss_and_gradients(pool, name: str, world_size: int) -> None:
    plans = [
        dict(data=d, tensor=t, pipeline=p, microbatches=m, schedule=schedule, seed=m)
        for d, t, p in DEGREES
        if d * t * p == world_size
        for m, schedule in ((1, "gpipe"), (4, "1f1b"))
    ]
    results = pool.run(one_step, name, plans, world_size=world_size, timeout_s=240)
    for rank, found in enumerate(results):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6, (rank, plan, loss, evaluated)
            assert gradient < 1e-5, (rank, plan, gradient)


@pytest.mark.parametrize(
    "name", ["build_llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("build_gpt2", "build_conv_net"))]
)
@pytest.mark.parametrize(
    "zero,recompute", [(3, "full"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((3, "none"), (0, "full")))]
)
def test_zero_and_recompute(pool, name: str, zero: int, recompute: str) -> None:
    plans = [
        dict(data=2, tensor=t, pipeline=p, microbatches=m, zero=zero, recompute=recompute, seed=7)
        for t, p in ((1, 2), (2, 1))
        for m in (1, 4)
    ]
    results = pool.run(one_step, name, plans, world_size=4, timeout_s=240)
    for rank, found in enumerate(results):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6, (rank, plan, loss, evaluated)
            assert gradient < 1e-5, (rank, plan, gradient)


@pytest.mark.parametrize("name", ["build_llama", "build_tied_lm"])
def test_zero_levels(pool, name: str) -> None:
    plans = [
        dict(data=d, tensor=t, pipeline=p, microbatches=m, zero=zero, zero_group=group, seed=5)
        for d, t, p, m, zero, group in (
            (2, 2, 1, 2, 1, 0),
            (2, 1, 2, 4, 2, 0),
            (4, 1, 1, 2, 2, 2),
            (4, 1, 1, 2, 3, 2),
        )
    ]
    results = pool.run(one_step, name, plans, world_size=4, timeout_s=240)
    for rank, found in enumerate(results):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6, (rank, plan, loss, evaluated)
            assert gradient < 1e-5, (rank, plan, gradient)


# Every schedule beside 1F1B and GPipe, with one, few and many microbatches.
SCHEDULES = [("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zb-h1", 4), ("zb-h2", 4), ("zb-v", 2), ("zb-v", 8)]


@pytest.mark.parametrize(
    "name",
    ["build_mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("build_llama", "build_gpt2", "build_tied_lm"))],
)
@pytest.mark.parametrize("data,tensor", [(1, 1), (2, 1), (1, 2)])
def test_schedules(pool, name: str, data: int, tensor: int) -> None:
    """Recompute and ZeRO take turns; a data rank has at least one row of a microbatch."""
    plans = [
        dict(data=data, tensor=tensor, pipeline=2, microbatches=min(m, 8 // data), schedule=schedule, seed=m)
        | dict(recompute=("none", "full", "selective")[(i + data + tensor) % 3])
        | dict(zero=3 if data > 1 and (schedule, m) == ("interleaved", 4) else 0)
        for i, (schedule, m) in enumerate(SCHEDULES)
    ]
    results = pool.run(one_step, name, plans, world_size=2 * data * tensor, timeout_s=240)
    for rank, found in enumerate(results):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6, (rank, plan, loss, evaluated)
            assert gradient < 1e-5, (rank, plan, gradient)


def zero_step(name: str, plans: list[dict[str, Any]]) -> list[tuple[float, float, dict[str, int], int]]:
    """Per plan: loss error, gradient error, collectives of one step that shard parameters, and what is gathered together."""
    found = []
    for plan in plans:
        model, example, module, loss = parallel(name, plan)
        call(model, example).backward()
        model.zero_grad()
        with CountCollectives() as counted:
            value = call(model, example)
        value.backward()
        expected = call(module, example, loss)
        module.zero_grad()
        expected.backward()
        storages = model.runtime.storage.stages.values()
        units = sum(len(s._units) + bool(s._stage.keys) for s in storages)
        found.append((abs(value.item() / expected.item() - 1), errors(model, module), counted.found, units))
    return found


@pytest.mark.parametrize(
    "schedule", ["interleaved", "zb-h2", "zb-v", *(pytest.param(n, marks=pytest.mark.slow) for n in ("1f1b", "zb-h1"))]
)
@pytest.mark.parametrize("name", ["build_tied_lm", pytest.param("build_conv_net", marks=pytest.mark.slow)])
def test_zero_under_every_schedule(pool, name: str, schedule: str) -> None:
    """Exact at every level, and no collective more often than the level needs (the table in runtime/shards.py)."""
    plans = [
        dict(data=2, tensor=1, pipeline=2, microbatches=microbatches, schedule=schedule, zero=zero, seed=microbatches)
        for microbatches, zero in ((4, 1), (4, 2), (4, 3), (1 if schedule != "interleaved" else 2, 3))
    ]
    for rank, results in enumerate(pool.run(zero_step, name, plans, world_size=4, timeout_s=240)):
        for plan, (loss, gradient, counted, units) in zip(plans, results, strict=True):
            assert loss < 1e-6 and gradient < 1e-5, (rank, plan, loss, gradient)
            times = plan["microbatches"]
            most = units * (1 if plan["zero"] == 1 else times)
            # A weight half may find that the one before has reduced all there is.
            least = units if schedule.startswith("zb") else most
            assert least <= counted["scatter"] <= most, (rank, plan, counted, units)
            assert counted["gather"] <= units * (1 if plan["zero"] < 3 else 2 * times), (rank, plan, counted, units)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_hybrid_zero_under_split_backwards(pool, precision: str) -> None:
    plans = [
        dict(
            data=4, tensor=1, pipeline=1, microbatches=2, schedule="zb-h1", zero=zero, zero_group=2, recompute=recompute
        )
        for zero, recompute in ((1, "none"), (2, "full"), (3, "selective"))
    ]
    for rank, results in enumerate(pool.run(zero_step, "build_llama", plans, world_size=4, timeout_s=240)):
        for plan, (loss, gradient, counted, units) in zip(plans, results, strict=True):
            assert loss < 1e-6 and gradient < 1e-5, (rank, plan, loss, gradient)
            assert counted["scatter"] == units * (1 if plan["zero"] == 1 else 2), (rank, plan, counted, units)


def ten_steps(name: str, plan: dict[str, Any]) -> tuple[list[float], list[float]]:
    model, example, module, loss = parallel(name, plan)
    losses: tuple[list[float], list[float]] = ([], [])
    sides = ((model, None, autopar.clip_grad_norm_), (module, loss, nn.utils.clip_grad_norm_))
    for found, (side, side_loss, clip) in zip(losses, sides, strict=True):
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-3)
        for _ in range(10):
            value = call(side, example, side_loss)
            value.backward()
            clip(side if side is model else side.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
    return losses


@pytest.mark.parametrize(
    "name",
    [n if n in ("build_tied_lm", "build_two_inputs") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_ten_optimizer_steps(pool, name: str) -> None:
    zero = {"build_llama": 3, "build_gpt2": 2, "build_mlp": 1}.get(name, 0)
    plan = dict(data=2, tensor=2, pipeline=2, microbatches=4, zero=zero, seed=3)
    for found, expected in pool.run(ten_steps, name, plan, world_size=8, timeout_s=240):
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert abs(a - b) <= 1e-4 * abs(b), (step, found, expected)
