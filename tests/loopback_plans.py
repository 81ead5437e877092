"""Whole plans in one process: every rank's real runtime, on the loopback of tests/loopback.py.

What needs more of torch.distributed than the loopback answers is replaced: device meshes have no process groups (the
runtime uses them to describe parameters at rest), and no watchdog runs. ZeRO is fully_shard's work and stays out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from loopback import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.graph import Graph
from autopar.plan import Plan
from autopar.runtime import model as model_module
from autopar.runtime import storage as storage_module
from autopar.runtime.build import Row, build_runtime
from autopar.runtime.model import ParallelModule
from autopar.runtime.ownership import Ownership
from autopar.runtime.random import Seeds
from autopar.runtime.storage import ParameterSpec, StageAxes
from autopar.runtime.torch_private import local_tensor
from autopar.schedule.instructions import Program

CPU = torch.device("cpu")


class _Idle:
    """In place of the watchdog."""

    def __init__(self, *_: Any) -> None: ...

    def step(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None: ...


def _mesh(axes: StageAxes) -> DeviceMesh:
    kept = [axis for axis in (*axes.model, axes.data) if axis.size > 1]
    mesh = torch.tensor(axes.stage.ranks).view(axes.data.size, *(axis.size for axis in axes.model))
    ranks = mesh.movedim(0, -1).reshape([axis.size for axis in kept]).contiguous()
    names = tuple(axis.name for axis in kept)
    return DeviceMesh("cpu", ranks, mesh_dim_names=names, _init_backend=False, _rank=axes.rank)


def parallel_step(
    graph: Graph, module: nn.Module, example: Mapping[str, Any], plan: Plan, program: Program | None = None
) -> tuple[float, float]:
    """One training step of `plan` on all ranks: (relative error of the loss, worst relative error of a gradient).

    program: in place of the plan's own.
    """
    wholes = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())
    expected = module(**example)
    module.zero_grad()
    expected.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}

    def on_rank() -> tuple[float, dict[str, tuple[Ownership, Tensor | None]]]:
        seeds = Seeds(0)
        rank = torch.distributed.get_rank()
        state = {t.name: buffers[t.fqn] for t in graph.tensors.values() if t.role == "buffer"}

        def values(specs: Sequence[ParameterSpec]) -> dict[str, Tensor]:
            return {spec.fqn: spec.ownership.take(wholes[spec.fqn], rank) for spec in specs}

        def random(key: str) -> contextlib.AbstractContextManager[Any]:
            return seeds.stream(key, CPU)

        runtime = build_runtime(graph, plan, values, state | dict(graph.constants), CPU, random)
        if program is not None:
            group = plan.groups.index(plan.stages[runtime.groups.stage].ranks)
            runtime = dataclasses.replace(runtime, training=Row(program.actions[group], None))
        parallel = ParallelModule(graph, runtime, None, CPU)
        loss = parallel(**example)
        loss.backward()
        found = {
            name: (p.autopar.ownership, None if p.grad is None else local_tensor(p.grad).clone())
            for name, p in parallel.named_parameters()
        }
        return loss.item(), found

    with (
        mock.patch.object(storage_module, "stage_mesh", _mesh),
        mock.patch.object(model_module, "Watchdog", _Idle),
        mock.patch.object(model_module, "stop_everyone", lambda error, *_: error),
    ):
        results = run(on_rank, plan.world_size)
    worst_loss = max(abs(loss - expected.item()) / abs(expected.item()) for loss, _ in results)
    worst = 0.0
    for rank, (_, found) in enumerate(results):
        for name, (ownership, part) in found.items():
            whole = gradients[name]
            if whole is None:
                assert part is None, f"{name} is frozen, and got a gradient"
                continue
            wanted = ownership.take(whole, rank)
            part = torch.zeros_like(wanted) if part is None else part
            worst = max(worst, float((part - wanted).norm() / whole.norm().clamp(min=1e-12)))
    return worst_loss, worst
