"""One step in detail: its peak memory as the allocator sees it, and the seconds of its ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from ..torch_private import allocation_deltas
from .profile import OpSeconds, op_seconds


@dataclass
class Detail:
    """peak_bytes: peak above what was allocated when the region began (CPU), or in all (CUDA). Set when it ends."""

    peak_bytes: int = 0
    op_seconds: OpSeconds = field(default_factory=dict)


@contextmanager
def detailed(device: torch.device) -> Iterator[Detail]:
    """Profile the region.

    On a CPU the counted bytes are those of live tensors; what the C library keeps for later is not in them.
    """
    detail = Detail()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=activities, profile_memory=device.type == "cpu") as profiled:
        yield detail
    detail.op_seconds = op_seconds(profiled)
    if device.type == "cuda":
        detail.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    live = 0
    for delta in allocation_deltas(profiled):
        live += delta
        detail.peak_bytes = max(detail.peak_bytes, live)
