"""compile=: the same results, and one compilation per kind of block."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from plan_cases import random_plan
from test_parity import call, errors
from torch._dynamo.testing import CompileCounterWithBackend

import autopar
from autopar.cluster.spec import Cluster

pytestmark = pytest.mark.slow


def compiled_step(plan: dict[str, Any], layers: int) -> tuple[float, float, int, int, int]:
    """(loss error, gradient error, compilations in the first two steps, in the third, kinds of blocks)."""
    torch._dynamo.reset()
    module, example, loss = models.build_llama(layers=layers)
    graph = autopar.capture(module, example, loss)
    made = random_plan(graph, **plan)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=made.world_size)
    counter = CompileCounterWithBackend("aot_eager")
    model = autopar.parallelize(module, example, loss, plan=made, cluster=cluster, compile=counter)
    for _ in range(2):
        value = call(model, example)
        model.zero_grad()
        value.backward()
    first = counter.frame_count
    call(model, example)
    module.zero_grad()
    expected = call(module, example, loss)
    expected.backward()
    kinds = {block.block.kind for stage in model.runtime.compiled.values() for block in stage.blocks}
    return (
        abs(value.item() - expected.item()) / abs(expected.item()),
        errors(model, module),
        first,
        counter.frame_count - first,
        len(kinds),
    )


@pytest.mark.parametrize("layers", [2, 5])
def test_each_kind_is_compiled_once(pool, layers: int) -> None:
    plan = dict(data=1, tensor=1, pipeline=1, microbatches=2)
    loss, gradient, first, later, kinds = pool.run(compiled_step, plan, layers, world_size=1, timeout_s=120)[0]
    assert loss < 1e-6 and gradient < 1e-5
    assert first == kinds and later == 0, (first, later, kinds)


def test_compiled_blocks_under_plans(pool) -> None:
    for plan in (
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, recompute="mixed", seed=3),
        dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=4),
    ):
        for loss, gradient, first, later, _ in pool.run(compiled_step, plan, 1, world_size=2, timeout_s=240):
            assert loss < 1e-6 and gradient < 1e-5 and first > 0 and later == 0, (plan, loss, gradient, first, later)
