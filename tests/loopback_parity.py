"""A plan's loss and gradients against the untouched module's, all ranks in one process (see loopback.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import loopback
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.graph import Graph
from autopar.plan import Plan
from autopar.runtime.build import build_runtime
from autopar.runtime.model import ParallelModule
from autopar.runtime.random import Seeds
from autopar.runtime.storage import ParameterSpec
from autopar.runtime.torch_private import local_tensor

# A parameter whose gradient is zero but for rounding (a bias that a softmax forgets) has no norm to compare with, so
# that an error is held against the parameter's own norm plus this share of the norm of all gradients together.
FLOOR = 1e-3


@dataclass(frozen=True)
class Reference:
    """What the module gives on one device: its loss, gradients by name (None where there are none), state before."""

    loss: float
    gradients: Mapping[str, Tensor | None]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

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
    parameters = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    live = dict(module.named_buffers(remove_duplicate=False))
    buffers = {name: b.clone() for name, b in live.items()}
    module.train()
    module.zero_grad()
    loss = module(**example).loss
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters(remove_duplicate=False)}
    module.zero_grad()
    with torch.no_grad():
        for name, value in buffers.items():
            live[name].copy_(value)
    return Reference(float(loss.detach()), gradients, parameters, buffers)


def errors(graph: Graph, plan: Plan, example: Mapping[str, Any], expected: Reference) -> Errors:
    """Run one step of `plan` on all its ranks and compare."""
    total = expected.norm

    def rank_errors() -> Errors:
        rank, device, seeds = dist.get_rank(), torch.device("cpu"), Seeds(0)

        def values(specs: Sequence[ParameterSpec]) -> dict[str, Tensor]:
            return {s.fqn: s.ownership.take(expected.parameters[s.fqn], rank).clone() for s in specs}

        state = {name: value.clone() for name, value in graph.constants.items()}
        state |= {t.name: expected.buffers[t.fqn].clone() for t in graph.tensors.values() if t.role == "buffer"}
        runtime = build_runtime(graph, plan, values, state, device, lambda key: seeds.stream(key, device))
        model = ParallelModule(graph, runtime, None, device)  # type: ignore[arg-type]
        result = model(**example)
        loss = result if isinstance(result, Tensor) else result.loss
        loss.backward()
        found = Errors(abs(loss.item() - expected.loss) / abs(expected.loss), 0.0)
        for name, parameter in model.named_parameters():
            whole = expected.gradients[name]
            whole = torch.zeros_like(expected.parameters[name]) if whole is None else whole
            if parameter.grad is None:
                assert not parameter.requires_grad or not bool(whole.any()), f"no gradient for {name}"
                continue
            part = parameter.autopar.ownership.take(whole, rank)
            error = float((local_tensor(parameter.grad) - part).norm()) / (float(whole.norm()) + FLOOR * total)
            if not error <= found.gradient:
                found = Errors(found.loss, error, name)
        return found

    ranks = loopback.run(rank_errors, plan.world_size)
    worst = max(ranks, key=lambda e: e.gradient)
    return Errors(max(e.loss for e in ranks), worst.gradient, worst.parameter)
