"""Collectives of a plan timed by themselves, at the sizes that the plan uses: what ran hidden behind compute before."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .axis import synchronize
from .buckets import BUCKET_BYTES
from .build import Runtime
from .groups import Mesh
from .recorder import CollectiveSample
from .stage import handovers

_REPEATS = 5


def time_collectives(runtime: Runtime, device: torch.device) -> tuple[CollectiveSample, ...]:
    """Time the data axis's collectives and the messages between stages; all ranks of the world must call it."""
    samples: list[CollectiveSample] = []
    groups = runtime.groups

    def sample(kind: str, ranks: tuple[int, ...], size_bytes: int, call: Callable[[], object], times: int = 1) -> None:
        """times: how many such collectives one call makes."""
        seconds = []
        for _ in range(_REPEATS + 1):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        # The first one may set up connections.
        samples.append(CollectiveSample(kind, ranks, size_bytes, statistics.median(seconds[1:]) / times))

    for s, mesh in groups.meshes.items():
        if mesh.data.size > 1:
            _sample_data_axis(runtime, s, mesh, device, sample)
    # Every boundary in turn, so that both of its sides meet and nobody waits for a third.
    for boundary in range(len(runtime.plan.stages) - 1):
        pair = _pair(runtime, boundary)
        if pair is None:
            continue
        size_bytes = _boundary_bytes(runtime, boundary)
        message = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        mine, other = groups.rank, pair[1] if groups.rank == pair[0] else pair[0]
        group = groups.boundaries[boundary, boundary + 1]

        def there_and_back(message=message, other=other, group=group, first=mine == pair[0]) -> None:
            for sends in (first, not first):
                (dist.send if sends else dist.recv)(message, other, group=group)

        sample("send", (mine, other), size_bytes, there_and_back, times=2)
    return tuple(samples)


def _pair(runtime: Runtime, boundary: int) -> tuple[int, int] | None:
    """The two ranks, this one among them, that stand for a boundary's messages; None where this rank has no partner."""
    first, second = runtime.plan.stages[boundary].ranks, runtime.plan.stages[boundary + 1].ranks
    pairs = [pair for pair in zip(first, second, strict=False) if runtime.groups.rank in pair and pair[0] != pair[1]]
    return pairs[0] if pairs else None


def _boundary_bytes(runtime: Runtime, boundary: int) -> int:
    """What one rank of the earlier stage hands over per microbatch."""
    graph, plan = runtime.executor.graph, runtime.plan
    crossing = handovers(graph, plan, boundary)
    return sum(
        math.prod(h.sender.local_shape(plan.stages[boundary].ranks[0])) * graph.tensors[name].dtype.itemsize
        for name, h in crossing.items()
    )


def _sample_data_axis(
    runtime: Runtime, stage: int, mesh: Mesh, device: torch.device, sample: Callable[..., None]
) -> None:
    data = mesh.data
    blocks = [sum(_local_bytes(runtime, t) for t, _ in block.parameters) for block in runtime.compiled[stage].blocks]
    if runtime.plan.stages[stage].zero:
        copies, shards = mesh.hybrid or (None, data)
        part = torch.zeros(max(1, max(blocks) // 4 // shards.size), device=device)
        whole = torch.zeros(part.numel() * shards.size, device=device)
        size_bytes = whole.numel() * 4
        sample("all_gather", shards.ranks, size_bytes, lambda: shards.all_gather(part, 0))
        sample("reduce_scatter", shards.ranks, size_bytes, lambda: shards.reduce_scatter(whole, 0))
        if copies is not None:
            sample("all_reduce", copies.ranks, part.numel() * 4, lambda: copies.all_reduce(part))
    else:
        bucket = torch.zeros(max(1, min(sum(blocks), BUCKET_BYTES) // 4), device=device)
        sample("all_reduce", data.ranks, bucket.numel() * 4, lambda: data.all_reduce(bucket))


def _local_bytes(runtime: Runtime, tensor: str) -> int:
    fqn = runtime.executor.graph.tensors[tensor].fqn
    for spec in runtime.specs:
        if spec.fqn == fqn:
            shape = spec.ownership.tensor_shape(runtime.groups.rank)
            return torch.Size(shape).numel() * spec.compute_dtype.itemsize
    raise AssertionError(fqn)
