"""Peak memory of one rank of a plan, measured without the others.

The rank runs alone under torch's fake process group: it holds and computes what it does in the real world, and only the
values that others would send are missing. On CUDA the caching allocator says what was allocated at most. On a CPU the
bytes of live tensors are counted, allocation by allocation, from the building of the model on; what the C library keeps
for itself is not in them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.parallelize import Model
from autopar.plan import Plan, same_recompute
from autopar.runtime.torch_private import pretended_world
from autopar.torch_private import allocation_deltas

_DETAILED_STEP = 2  # the model profiles its third step itself


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank in a training step. counted: what the model's own measurement says (`Model.timeline`)."""

    rank: int
    measured_bytes: int
    predicted_bytes: int
    counted_bytes: int

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


class _Live:
    """Bytes of the tensors made and not freed in a region of code; set when it ends."""

    bytes: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        gc.collect()  # what an earlier model has left must not go in here
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            yield
            gc.collect()
        self.bytes = sum(allocation_deltas(profiled))


def rank_memory(
    graph: Graph,
    plan: Plan,
    hardware: Cluster,
    module: nn.Module,
    batch: tuple[Tensor, ...] | dict[str, Tensor],
    rank: int,
    device: torch.device,
    learning_rate: float = 1e-5,
) -> RankMemory:
    """Train some steps of `rank` with AdamW. module: on meta or real. batch: a global one, on any device."""
    with pretended_world(rank, plan.world_size):
        live = _Live()
        if device.type == "cuda":
            gc.collect()  # an earlier model must not go while this one is measured
            torch.cuda.empty_cache()
            before_bytes = torch.cuda.memory_allocated(device)
            step, model = _trainer(graph, plan, hardware, module, batch, device, learning_rate)
            for _ in range(_DETAILED_STEP + 1):
                step()
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
        else:
            with live.counted():
                step, model = _trainer(graph, plan, hardware, module, batch, device, learning_rate)
                for _ in range(_DETAILED_STEP):
                    step()
            step()
            measurement = model.measurement
            peak_bytes = live.bytes + measurement.peak_memory_bytes - measurement.at_rest_bytes
        predicted_bytes = model.prediction.peak_memory_bytes[rank]
        counted_bytes = model.measurement.peak_memory_bytes
        model.watchdog.close()
        model.measurement.close()
        return RankMemory(rank, peak_bytes, predicted_bytes, counted_bytes)


def with_stages(plan: Plan, fields: Mapping[str, Any]) -> Plan:
    """The plan with these fields of its stages instead; `recompute` is one choice for all of their blocks."""
    stages = []
    for stage in plan.stages:
        given = dict(fields)
        if "recompute" in given:
            given["recompute"] = same_recompute(given["recompute"], stage.num_blocks)
        stages.append(replace(stage, **given))
    return replace(plan, stages=tuple(stages))


def _fill(submodule: nn.Module, name: str) -> None:
    """Memory does not depend on values, and drawing billions of them takes minutes."""
    for tensor in (*submodule.parameters(recurse=False), *submodule.buffers(recurse=False)):
        tensor.fill_(1e-3)


def _trainer(graph, plan, hardware, module, batch, device, learning_rate):
    """(step, model): one training step on this rank's rows of the batch."""
    model = Model(
        plan.graph_of(graph), plan, hardware, module,
        seed=0, device=device, initialise=_fill, constraints={}, timeout_s=600,
    )  # fmt: skip
    named = isinstance(batch, dict)
    columns = list(batch.values() if named else batch)
    rows = [dict(zip(batch, row, strict=True)) if named else row for row in zip(*columns, strict=True)]
    batch = next(iter(model.loader(rows, graph.batch_size)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=device.type == "cuda")

    def step() -> None:
        result = model(**batch) if named else model(*batch)
        (result if isinstance(result, Tensor) else result.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model
