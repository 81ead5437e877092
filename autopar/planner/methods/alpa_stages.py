"""Alpa's inter-operator pass: layers to stages to submeshes, by enumeration of the slowest stage's time.

c(i, k, m) is the time of one microbatch through layers [i, k) on submesh m, and max_succ(i, k, m) how many stages may
stand behind it before its memory overflows. With B microbatches a pipeline takes the sum of its stages' times and
B - 1 times the slowest. For a cap t on that slowest time,

    F(s, i, j) = min over k, m with c(i, k, m) <= t and s - 1 <= max_succ(i, k, m)
                 of c(i, k, m) + F(s - 1, k, j - |m|)                                    `_pipeline`
    total      = min over t, s of F(s, 0, D) + (B - 1) t                                 `assign_stages`

where s stages cover layers i.. on j devices. t runs over the values of c in ascending order and stops once
(B - 1) t >= best; values within a share `gap` of each other are tried as one, which costs at most that share.

Reference: Zheng et al., "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning",
OSDI 2022, section 5, equations 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Assigned:
    """Layers [start, stop) on submesh number `mesh`."""

    start: int
    stop: int
    mesh: int


@dataclass(frozen=True, slots=True)
class Assignment:
    stages: tuple[Assigned, ...]
    total_s: float


def submeshes(num_hosts: int, devices_per_host: int) -> tuple[int, ...]:
    """Sizes of the submeshes that tile a cluster: powers of two within a host, or whole hosts."""
    inside = [2**e for e in range(devices_per_host.bit_length()) if 2**e < devices_per_host]
    return (*inside, *(devices_per_host * n for n in range(1, num_hosts + 1)))


def assign_stages(
    costs_s: np.ndarray,
    max_succ: np.ndarray,
    sizes: Sequence[int],
    num_devices: int,
    microbatches: int,
    num_stages: int | None = None,
    gap: float = 0.0,
) -> Assignment | None:
    """The pipeline of least total time that uses all devices; None if none fits.

    costs_s, max_succ: [first layer, last layer + 1, submesh]; infinite costs forbid. num_stages: exactly so many.
    """
    num_layers = costs_s.shape[0]
    caps = np.unique(costs_s[np.isfinite(costs_s)])
    best: Assignment | None = None
    most = num_stages or max(1, min(num_layers, num_devices // min(sizes)))
    next_cap = 0
    while next_cap < len(caps):
        least_t = caps[next_cap]
        if best is not None and (microbatches - 1) * least_t >= best.total_s:
            break
        next_cap = int(np.searchsorted(caps, least_t * (1 + gap), "right"))
        t = caps[next_cap - 1]
        found = _pipeline(np.where(costs_s <= t, costs_s, math.inf), max_succ, sizes, num_devices, most, num_stages)
        if found is None:
            continue
        stages, sums_s = found
        slowest_s = max(costs_s[one.start, one.stop, one.mesh] for one in stages)
        total_s = sums_s + (microbatches - 1) * slowest_s
        if best is None or total_s < best.total_s:
            best = Assignment(stages, float(total_s))
    return best


def _pipeline(
    costs_s: np.ndarray, max_succ: np.ndarray, sizes: Sequence[int], num_devices: int, most: int, exactly: int | None
) -> tuple[tuple[Assigned, ...], float] | None:
    """The stages of least total time under the cap that is already in costs_s, and that time."""
    num_layers = costs_s.shape[0]
    tables = [np.full((num_layers + 1, num_devices + 1), math.inf)]
    tables[0][num_layers, 0] = 0.0
    choices = []
    for s in range(1, most + 1):
        now = np.full_like(tables[0], math.inf)
        chosen = np.full((num_layers + 1, num_devices + 1, 2), -1, np.int32)
        for mesh, size in enumerate(sizes):
            if size > num_devices:
                continue
            legal = np.where(max_succ[:, :, mesh] >= s - 1, costs_s[:, :, mesh], math.inf)
            behind = tables[-1][:, : num_devices + 1 - size]
            columns = np.flatnonzero(np.isfinite(behind).any(0))
            if not len(columns) or not np.isfinite(legal).any():
                continue
            ways = legal[:, :, None] + behind[None][:, :, columns]
            least, which = ways.min(1), ways.argmin(1)
            target = columns + size
            better = least < now[:num_layers, target]
            rows, at = np.nonzero(better)
            now[rows, target[at]] = least[rows, at]
            chosen[rows, target[at], 0] = which[rows, at]
            chosen[rows, target[at], 1] = mesh
        tables.append(now)
        choices.append(chosen)
    counts = [exactly] if exactly else range(1, most + 1)
    count = min(counts, key=lambda s: tables[s][0, num_devices])
    total_s = float(tables[count][0, num_devices])
    if not math.isfinite(total_s):
        return None
    stages, layer, devices = [], 0, num_devices
    for s in range(count, 0, -1):
        stop, mesh = (int(v) for v in choices[s - 1][layer, devices])
        stages.append(Assigned(layer, stop, mesh))
        layer, devices = stop, devices - sizes[mesh]
    return tuple(stages), total_s
