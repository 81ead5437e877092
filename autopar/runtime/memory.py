"""Peak memory of a region, as the allocator sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..torch_private import allocation_deltas


@dataclass
class Peak:
    """bytes: peak above what was allocated when the region began (CPU), or in all (CUDA); set when the region ends."""

    bytes: int = 0


@contextmanager
def allocation_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the region's peak: from the CUDA allocator's counters, or from the profiler's record of every allocation.

    On a CPU the counted bytes are those of live tensors; what the C library keeps for later is not in them.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    live = 0
    for delta in allocation_deltas(profile):
        live += delta
        peak.bytes = max(peak.bytes, live)
