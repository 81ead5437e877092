"""Latency, bandwidth and overlap of the collectives over one process group.

t(n) = steps * latency + volume(n) / bandwidth, fitted by least squares of the relative error over several sizes; steps
and volume are those of cluster/ring.py, so bandwidth is nccl-tests' bus bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .probe_compute import Sampler, lower_quartile
from .ring import COLLECTIVES, ring
from .spec import Link

# torch 2.13 renames these two and warns about the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Bytes of the whole tensor of each collective.
_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
_CUDA_SIZES = (*_SIZES, 64 << 20, 256 << 20)


def probe_link(sampler: Sampler, group: dist.ProcessGroup | None) -> Link:
    """Measure every collective over `group` (None: the default group); all its ranks must call together."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = _CUDA_SIZES if sampler.device.type == "cuda" else _SIZES
    collectives: dict[str, tuple[float, float]] = {}
    for kind in COLLECTIVES:
        steps, volume = ring(kind, ranks)
        points = []
        for size in sizes:
            call = _call(kind, size, ranks, rank, sampler.device, group)
            points.append((volume * size, _seconds(sampler, call, group)))
        latency_s, bandwidth = fit(points)
        collectives[kind] = (latency_s / steps, bandwidth)
    latency_s, bandwidth = collectives["send"]
    return Link(latency_s, bandwidth, _overlap(sampler, group), collectives)


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(latency_s, bytes_per_s) of t = latency + bytes / bandwidth, by least squares of the relative error.

    points: (bytes, seconds). Neither figure is negative: a fit with latency below zero is repeated through the origin.
    """
    volume = np.array([v for v, _ in points])
    seconds = np.array([t for _, t in points])
    weighted = np.stack([1 / seconds, volume / seconds], axis=1)
    latency_s, inverse = np.linalg.lstsq(weighted, np.ones(len(points)), rcond=None)[0]
    if latency_s < 0 or inverse <= 0:
        largest = int(np.argmax(volume))
        latency_s, inverse = float(max(0.0, min(seconds))), seconds[largest] / volume[largest]
        if latency_s >= seconds[largest] / 2:
            latency_s = 0.0
    return float(latency_s), float(1 / inverse)


def _call(
    kind: str, size: int, ranks: int, rank: int, device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[], object]:
    """The collective on a float32 tensor of `size` bytes in all."""
    numel = max(size // 4 // (ranks * ranks), 1) * ranks * ranks
    whole = torch.zeros(numel, device=device)
    part = torch.zeros(numel // ranks, device=device)
    received = torch.zeros_like(part)
    match kind:
        case "all_reduce":
            return lambda: dist.all_reduce(whole, group=group)
        case "all_gather":
            return lambda: _ALL_GATHER(whole, part, group=group)
        case "reduce_scatter":
            return lambda: _REDUCE_SCATTER(part, whole, group=group)
        case "all_to_all":
            return lambda: dist.all_to_all_single(received, part, group=group)
        case "send":
            return lambda: _send(whole, rank, ranks, group)
    raise AssertionError(kind)


def _send(whole: Tensor, rank: int, ranks: int, group: dist.ProcessGroup | None) -> None:
    """Neighbours in pairs: even ranks send, odd ranks receive; a last rank without a partner rests."""
    if rank ^ 1 >= ranks:
        return
    if rank % 2 == 0:
        work = dist.isend(whole, group=group, group_dst=rank ^ 1)
    else:
        work = dist.irecv(whole, group=group, group_src=rank ^ 1)
    assert work is not None
    work.wait()


def _seconds(sampler: Sampler, call: Callable[[], object], group: dist.ProcessGroup | None) -> float:
    """Seconds per call, over several in a row. All ranks run equally many, so the count is fixed by the first calls."""
    call()
    count = torch.tensor([max(1, min(20, int(0.01 / max(sampler.seconds_once(call), 1e-7))))], device=sampler.device)
    dist.all_reduce(count, op=dist.ReduceOp.MIN, group=group)
    repeats = int(count)
    samples = []
    for _ in range(5):
        samples.append(sampler.seconds_once(lambda: [call() for _ in range(repeats)]) / repeats)
    return lower_quartile(samples)


def _overlap(sampler: Sampler, group: dist.ProcessGroup | None) -> float:
    """The share of an asynchronous all-reduce that hides behind matrix products of about the same length."""
    numel = (8 << 20) if sampler.device.type == "cuda" else (1 << 20)
    gradient = torch.zeros(numel, device=sampler.device)
    width = 4096 if sampler.device.type == "cuda" else 256
    left, right = (torch.ones(width, width, device=sampler.device) for _ in range(2))

    def compute(repeats: int) -> None:
        for _ in range(repeats):
            torch.mm(left, right)

    def both(repeats: int) -> None:
        work = dist.all_reduce(gradient, group=group, async_op=True)
        compute(repeats)
        assert work is not None
        work.wait()

    reduce_s = _agreed(_seconds(sampler, lambda: dist.all_reduce(gradient, group=group), group), sampler, group)
    sampler.seconds_once(lambda: compute(1))
    one_s = _agreed(sampler.seconds_once(lambda: compute(8)) / 8, sampler, group)
    repeats = max(1, min(2000, round(1.5 * reduce_s / one_s)))
    compute_s = _agreed(_typical(sampler, lambda: compute(repeats)), sampler, group)
    both_s = _agreed(_typical(sampler, lambda: both(repeats)), sampler, group)
    hidden_s = compute_s + reduce_s - both_s
    return min(1.0, max(0.0, hidden_s / min(reduce_s, compute_s)))


def _typical(sampler: Sampler, call: Callable[[], object]) -> float:
    return lower_quartile([sampler.seconds_once(call) for _ in range(5)])


def _agreed(seconds: float, sampler: Sampler, group: dist.ProcessGroup | None) -> float:
    """The slowest rank's figure."""
    value = torch.tensor([seconds], device=sampler.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return float(value)
