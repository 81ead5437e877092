"""What a loss does to gradients, and what a model leaves behind when it goes."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any
from weakref import ref

import models
import pytest
import torch
from plan_cases import random_plan
from test_parity import call, graph_of, parallel
from torch import Tensor

import autopar
from autopar.cluster.spec import Cluster
from autopar.runtime import delivery
from autopar.runtime.torch_private import local_tensor

PLAN = dict(data=1, tensor=1, pipeline=1, microbatches=2)


def factors() -> list[tuple[str, float, list[Any]]]:
    """By way of differentiating: what gradients were multiplied with, and the factors that the runtime saw."""
    model, example, _, _ = parallel("build_mlp", dict(PLAN))
    seen: list[Any] = []
    deliver = delivery.deliver

    def watched(parameters: Any, gradients: Any, factor: Any) -> None:
        seen.append(factor)
        deliver(parameters, gradients, factor)

    delivery.deliver = watched

    def doubled(loss: Tensor) -> Tensor:
        loss.register_hook(lambda gradient: 2 * gradient)
        return loss

    def kept(loss: Tensor) -> None:
        loss.retain_grad()
        loss.backward()
        assert loss.grad.item() == 1.0

    ways = {
        "alone": lambda loss: loss.backward(),
        "kept": kept,
        "scaled": lambda loss: (loss / 4).backward(),
        "given": lambda loss: loss.backward(torch.tensor(3.0)),
        "hooked": lambda loss: doubled(loss).backward(),
        "engine": lambda loss: torch.autograd.backward([loss, 2 * loss]),
    }
    try:
        norms = []
        for way in ways.values():
            model.zero_grad()
            way(call(model, example))
            norms.append(torch.stack([local_tensor(p.grad).norm() for p in model.parameters()]).norm().item())
        loss = call(model, example)
        loss.backward()
        for copied in (pickle.loads(pickle.dumps(loss)), copy.copy(loss.detach())):
            try:
                copied.backward()
                raise AssertionError("a copy has a graph")
            except RuntimeError:
                pass
        try:
            loss.backward()
            raise AssertionError("gradients were handed out twice")
        except RuntimeError as error:
            assert "differentiated already" in str(error)
    finally:
        delivery.deliver = deliver
    return [(name, norm / norms[0], factor) for name, norm, factor in zip(ways, norms, seen, strict=False)]


def test_a_loss_scales_gradients_and_alone_does_not_touch_them(pool) -> None:
    found = {name: (ratio, factor) for name, ratio, factor in pool.run(factors, world_size=1)[0]}
    expected = {"alone": 1.0, "kept": 1.0, "scaled": 0.25, "given": 3.0, "hooked": 2.0, "engine": 3.0}
    assert {name: ratio for name, (ratio, _) in found.items()} == pytest.approx(expected, rel=1e-6)
    assert type(found["alone"][1]) is float, "the factor was not known, and would be multiplied with on a device"


def left_behind(plan: dict[str, Any], precision: str) -> int:
    """Tensors of a trained model that are there when it has gone."""
    module, example, loss = models.build_mlp()
    graph = (
        autopar.capture(module, example, loss, precision=precision) if precision != "float32" else graph_of("build_mlp")
    )
    made = replace(random_plan(graph, **plan), precision=precision)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=made.world_size)
    model = autopar.parallelize(module, example, loss, plan=made, cluster=cluster)
    for _ in range(2):
        call(model, example).backward()
    held = [ref(t) for s in model.runtime.storage.stages.values() for t in [*s.parameters.values(), *s.buffers()]]
    assert (
        len(held) > len(list(model.parameters())) or (plan["data"] == 1 and precision == "float32") or plan.get("zero")
    )
    model.runtime.close()
    del model
    gc.collect()
    return sum(tensor() is not None for tensor in held)


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_that_goes_takes_its_memory_along(pool, zero: int, precision: str) -> None:
    plan = dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=zero)
    assert pool.run(left_behind, plan, precision) == [0, 0]
