"""Mixed precision: what lies at rest stays float32, blocks compute in half of that, and results are one process's."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from plan_cases import random_plan
from test_parity import call
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.runtime.ownership import Ownership
from autopar.runtime.torch_private import local_tensor

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Cast(nn.Module):
    """One process's module with float32 parameters and inputs cast in front of its forward, and nothing else."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        # What tells targets of the loss from inputs reads the signature.
        self.forward = functools.wraps(module.forward)(functools.partial(self._forward))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters = {name: self._cast(p) for name, p in self.module.named_parameters()}
        args, kwargs = tuple(map(self._cast, args)), {key: self._cast(value) for key, value in kwargs.items()}
        return torch.func.functional_call(self.module, parameters, args, kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@functools.cache
def graph_of(name: str, precision: str) -> Graph:
    return autopar.capture(*getattr(models, name)(), precision=precision)


def parallel(name: str, precision: str, degrees: dict[str, Any]) -> tuple[autopar.Model, Any, nn.Module, Any]:
    module, example, loss = getattr(models, name)()
    reduction = degrees.pop("reduction", "float32")
    plan = random_plan(graph_of(name, precision), **degrees)
    plan = replace(plan, precision=precision, reduction=reduction)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)
    model = autopar.parallelize(module, example, loss, plan=plan, cluster=cluster)
    return model, example, module, loss


def compare(name: str, precision: str, plans: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(loss error, worst gradient error against the norm of all gradients) per plan, over two steps of SGD."""
    found = []
    for degrees in plans:
        model, example, module, loss = parallel(name, precision, dict(degrees))
        cast = Cast(module, HALF[precision])
        sides = [torch.optim.SGD(side.parameters(), lr=0.1) for side in (model, module)]
        worst = [0.0, 0.0]
        for _ in range(2):
            value, expected = call(model, example), call(cast, example, loss)
            value.backward()
            expected.backward()
            assert value.dtype == torch.float32
            worst[0] = max(worst[0], abs(value.item() - expected.item()) / abs(expected.item()))
            oracle = dict(module.named_parameters())
            whole = torch.stack([p.grad.norm() for p in oracle.values() if p.grad is not None]).norm()
            for fqn, parameter in model.named_parameters():
                ownership: Ownership = parameter.autopar.ownership
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                want = ownership.take(oracle[fqn].grad, model.runtime.groups.rank)
                worst[1] = max(worst[1], float((local_tensor(parameter.grad).cpu() - want).norm() / whole))
            for optimizer in sides:
                optimizer.step()
                optimizer.zero_grad()
        found.append(tuple(worst))
    return found


PLANS = [
    dict(data=2, tensor=2, pipeline=1, microbatches=2, zero=0, seed=1),
    dict(data=2, tensor=1, pipeline=2, microbatches=4, zero=1, recompute="selective", seed=2),
    dict(data=4, tensor=1, pipeline=1, microbatches=2, zero=2, zero_group=2, seed=3),
    dict(data=2, tensor=2, pipeline=1, microbatches=1, zero=3, reduction="bfloat16", seed=4),
    dict(data=4, tensor=1, pipeline=1, microbatches=2, zero=0, reduction="bfloat16", seed=5),
]


@pytest.mark.parametrize("name", ["build_llama", "build_mlp"])
def test_bfloat16_equals_one_process_with_the_same_casts(pool, name: str) -> None:
    for found in pool.run(compare, name, "bfloat16", PLANS, world_size=4, timeout_s=240):
        for plan, (loss, gradient) in zip(PLANS, found, strict=True):
            # A loss that the module leaves in bfloat16 has 8 bits, in each microbatch's share too.
            most = 5e-3 if name == "build_llama" else 1.5e-2
            assert loss < most and gradient < 3e-2, (plan, loss, gradient)


def test_one_rank_computes_the_very_same(pool) -> None:
    """No sum is split, so only the order inside the loss differs."""
    plan = dict(data=1, tensor=1, pipeline=1, microbatches=1)
    ((loss, gradient),) = pool.run(compare, "build_llama", "bfloat16", [plan], world_size=1)[0]
    assert loss < 1e-4 and gradient < 5e-3, (loss, gradient)


def test_the_module_casts_what_it_wants() -> None:
    """Norms that compute in float32 still do; buffers and integer inputs stay; parameters keep their dtype at rest."""
    graph = graph_of("build_llama", "bfloat16")
    assert {t.dtype for t in graph.parameters} == {torch.bfloat16}
    assert {t.at_rest for t in graph.parameters} == {torch.float32}
    powers = [op for op in graph.ops if op.target.startswith("aten.pow")]
    assert powers and all(graph.tensors[op.outputs[0]].dtype == torch.float32 for op in powers)
    products = [op for op in graph.ops if op.target.startswith("aten.linear")]
    assert products and all(graph.tensors[op.outputs[0]].dtype == torch.bfloat16 for op in products)
    assert graph.fingerprint != graph_of("build_llama", "float32").fingerprint


def test_plan_and_capture_must_agree() -> None:
    graph = graph_of("build_mlp", "bfloat16")
    plan = random_plan(graph, data=1, tensor=1, pipeline=1, microbatches=1)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=1)
    with pytest.raises(ValueError, match="plan.precision is 'float32', but .* in 'bfloat16'"):
        plan.validate(graph, cluster)
    with pytest.raises(ValueError, match="precision 'half': expected one of 'float32', 'bfloat16', 'float16'"):
        autopar.capture(*models.build_mlp(), precision="half")
    found = autopar.search(graph, cluster, progress=False)
    assert found.precision == "bfloat16" and autopar.Plan.from_json(found.to_json()) == found


def scaled_steps(degrees: dict[str, Any], clip: bool) -> list[tuple[float, float, bool]]:
    """float16 with torch's scaler: (loss, scale, whether parameters moved) of each step; a bad batch is the third."""
    model, example, module, loss = parallel("build_mlp", "float16", dict(degrees))
    sides = []
    cast = Cast(module, torch.float16)
    for side, run in ((model, lambda batch: call(model, batch)), (module, lambda batch: call(cast, batch, loss))):
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(next(side.parameters()).device.type, init_scale=2.0**14, growth_interval=2)
        found = []
        for step in range(6):
            batch = poisoned(example) if step == 2 else example
            before = [local_tensor(p.detach()).clone() for p in side.parameters()]
            value = run(batch)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            if clip:
                (autopar.clip_grad_norm_ if side is model else nn.utils.clip_grad_norm_)(side.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            after = [local_tensor(p.detach()) for p in side.parameters()]
            moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel())
            found.append((value.item(), scaler.get_scale(), moved))
        sides.append(found)
    return sides


def poisoned(example: Any) -> Any:
    """The batch with one row that overflows float16; it lies on one data rank and in one microbatch."""
    first, *rest = example
    first = first.clone()
    first[-1] = 6e4
    return (first, *rest)


@pytest.mark.parametrize(
    "plan",
    [
        dict(data=2, tensor=1, pipeline=2, microbatches=2, zero=0, seed=1),
        dict(data=2, tensor=2, pipeline=1, microbatches=2, zero=3, seed=2),
        dict(data=1, tensor=2, pipeline=2, microbatches=4, zero=0, seed=3),
    ],
)
def test_float16_with_a_scaler(pool, plan: dict[str, Any]) -> None:
    """All ranks skip the step that overflowed, and no other; losses and scales are those of one process."""
    for rank, (ours, expected) in enumerate(pool.run(scaled_steps, plan, plan["data"] == 2, world_size=4)):
        assert [moved for *_, moved in expected] == [True, True, False, True, True, True]
        for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            assert mine[1:] == theirs[1:], (rank, step, ours, expected)
            assert step == 2 or abs(mine[0] - theirs[0]) <= 1e-2 * abs(theirs[0]), (rank, step, ours, expected)
