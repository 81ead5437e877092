"""Whale's hardware-aware load balance: shares of work for devices that differ.

`batch_shares`   replicate: the rows of a batch in proportion to flops/s, by largest remainder; what overflows a
                 device's memory goes to those that have room, fastest first
`shard_sizes`    split: the units of a dim in proportion to flops/s, likewise
`stage_order`    devices with more memory to earlier stages, where more microbatches are in flight
`idle_s`         what the balance is about: how long devices wait for the slowest

Reference: Jia et al., "Whale: Efficient Giant Model Training over Heterogeneous GPUs", USENIX ATC 2022, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .bench import split_rows


def batch_shares(rows: int, flops_per_s: Sequence[float], most_rows: Sequence[int]) -> tuple[int, ...]:
    """Rows per device. most_rows: what each device's memory holds.

    ValueError when the rows do not fit in all of them together, or there are fewer rows than devices.
    """
    if sum(most_rows) < rows or min(most_rows) < 1:
        raise ValueError(f"{rows} rows, but the devices hold {list(most_rows)}; use more devices, or more microbatches")
    shares = list(split_rows(rows, flops_per_s))
    over = 0
    for i, most in enumerate(most_rows):
        over += max(0, shares[i] - most)
        shares[i] = min(shares[i], most)
    while over:
        # the next row goes where it is done first
        with_room = [i for i in range(len(shares)) if shares[i] < most_rows[i]]
        shares[min(with_room, key=lambda i: (shares[i] + 1) / flops_per_s[i])] += 1
        over -= 1
    return tuple(shares)


def shard_sizes(units: int, flops_per_s: Sequence[float], most_units: Sequence[int]) -> tuple[int, ...]:
    """Units of a split dim per device; as `batch_shares`."""
    return batch_shares(units, flops_per_s, most_units)


def stage_order(memory_bytes: Sequence[float]) -> tuple[int, ...]:
    """Devices (or groups of them) in the order of the stages they should run."""
    return tuple(sorted(range(len(memory_bytes)), key=lambda i: -memory_bytes[i]))


def idle_s(shares: Sequence[int], flops_per_s: Sequence[float], flops_per_row: float) -> float:
    """Device seconds spent waiting for the slowest device."""
    times_s = [share * flops_per_row / rate for share, rate in zip(shares, flops_per_s, strict=True)]
    return math.fsum(max(times_s) - time_s for time_s in times_s)
