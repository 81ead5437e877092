"""Collectives of a plan timed by themselves, at the sizes that the plan uses: what ran hidden behind compute before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .axis import synchronize
from .build import Runtime
from .recorder import CollectiveSample
from .replicas import BUCKET_BYTES

_REPEATS = 5


def time_collectives(runtime: Runtime, device: torch.device) -> tuple[CollectiveSample, ...]:
    """Time the data axis's collectives and the messages between stages; all ranks of the world must call it."""
    samples: list[CollectiveSample] = []
    groups, stage = runtime.groups, runtime.plan.stages[runtime.groups.stage]

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

    data = groups.data
    if data.size > 1:
        blocks = [sum(_local_bytes(runtime, t) for t, _ in block.parameters) for block in runtime.compiled.blocks]
        if stage.zero:
            copies, shards = groups.hybrid or (None, data)
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
    # Every boundary in turn, so that both of its sides meet and nobody waits for a third.
    for boundary in range(len(runtime.plan.stages) - 1):
        if groups.stage not in (boundary, boundary + 1):
            continue
        peer = boundary + 1 if groups.stage == boundary else boundary
        names = runtime.compiled.sends if groups.stage == boundary else runtime.compiled.receives
        tensors = [
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in map(runtime.compiled.specs.get, names)
        ]
        size_bytes = sum(t.numel() * t.element_size() for t in tensors)
        other = groups.counterpart(peer)

        def there_and_back(tensors=tensors, other=other, peer=peer, first=groups.stage == boundary) -> None:
            for sends in (first, not first):
                for tensor in tensors:
                    (dist.send if sends else dist.recv)(tensor, other, group=groups.forward[peer])

        sample("send", (groups.rank, other), size_bytes, there_and_back, times=2)
    return tuple(samples)


def _local_bytes(runtime: Runtime, tensor: str) -> int:
    fqn = runtime.executor.graph.tensors[tensor].fqn
    for spec in runtime.specs:
        if spec.fqn == fqn:
            shape = spec.ownership.tensor_shape(runtime.groups.rank)
            return torch.Size(shape).numel() * spec.dtype.itemsize
    raise AssertionError(fqn)
