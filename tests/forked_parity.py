"""A plan's loss and gradients against the untouched module's, on ranks forked from this process (see forked.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import forked
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.parallelize import Model
from autopar.plan import Plan
from autopar.runtime import initialise
from autopar.runtime.torch_private import local_tensor

# A parameter whose gradient is zero but for rounding (a bias that a softmax forgets) has no norm to compare with, so
# that an error is held against the parameter's own norm plus this share of the norm of all gradients together.
FLOOR = 1e-3


@dataclass(frozen=True)
class Reference:
    """What the module gives on one device: its loss, and its gradients by name (None where there are none)."""

    loss: float
    gradients: Mapping[str, Tensor | None]

    @property
    def norm(self) -> float:
        return float(sum(g.double().square().sum() for g in self.gradients.values() if g is not None) ** 0.5)


@dataclass(frozen=True)
class Errors:
    """The worst over ranks, relative. parameter: whose gradient it is."""

    loss: float
    gradient: float
    parameter: str = ""

    def within(self, loss: float, gradient: float) -> bool:
        return self.loss <= loss and self.gradient <= gradient


def reference(module: nn.Module, example: Mapping[str, Any]) -> Reference:
    """One forward and backward in training mode; the module's tensors are afterwards what they were before."""
    live = dict(module.named_buffers())
    before = {name: b.clone() for name, b in live.items()}
    module.train()
    module.zero_grad()
    loss = module(**example).loss
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters(remove_duplicate=False)}
    module.zero_grad()
    with torch.no_grad():
        for name, value in before.items():
            live[name].copy_(value)
    return Reference(float(loss.detach()), gradients)


def _own_values(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], _: Any, keep: Callable[..., None]) -> None:
    """In place of rank 0 sending its tensors one by one: a forked rank has the same."""
    for name in wanted:
        if name in tensors:
            keep(name, tensors[name].detach())


def errors(
    module: nn.Module,
    example: Mapping[str, Any],
    graph: Graph,
    plan: Plan,
    expected: Reference,
    timeout_s: float = 120.0,
) -> Errors:
    """Run one step of `plan` on all its ranks and compare."""
    total = expected.norm
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)

    def rank_errors() -> Errors:
        with mock.patch.object(initialise, "_deal", _own_values):
            model = Model(
                graph, plan, cluster, module, seed=0, device=torch.device("cpu"), initialise=None, constraints={}
            )
        result = model(**example)
        loss = result if isinstance(result, Tensor) else result.loss
        loss.backward()
        found = Errors(abs(loss.item() - expected.loss) / abs(expected.loss), 0.0)
        for name, parameter in model.named_parameters():
            whole = expected.gradients[name]
            if parameter.grad is None or whole is None:
                # A parameter of which the loss makes no use has no gradient, or one of zeros.
                other = parameter.grad if whole is None else whole
                if other is not None and bool(local_tensor(other).any()):
                    found = Errors(found.loss, float("inf"), name)
                continue
            part = parameter.autopar.ownership.take(whole, dist.get_rank())
            error = float((local_tensor(parameter.grad) - part).norm()) / (float(whole.norm()) + FLOOR * total)
            if not error <= found.gradient:
                found = Errors(found.loss, error, name)
        return found

    plan.validate(graph, cluster)
    ranks = forked.run(rank_errors, plan.world_size, timeout_s)
    worst = max(ranks, key=lambda e: e.gradient)
    return Errors(max(e.loss for e in ranks), worst.gradient, worst.parameter)
