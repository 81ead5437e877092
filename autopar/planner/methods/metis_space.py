"""Metis's space on unequal devices, and how it is pruned.

A plan starts from an order of the device types and a row of groups, one per stage, that tile the devices in that order:

    groups      powers of two that sum to the G devices, none under (G / S) x VARIANCE for S stages, and at most
                `most` orders of one multiset; beyond that the smallest equals are merged first       `device_groups`
    layers      contiguous, in proportion to what each group computes per second; a stage that overflows its memory
                hands layers to the neighbour with most room, and the split is tried again          `split_layers`
    rows        of a microbatch over unequal data ranks, by largest remainder                     `bench.split_rows`
    meshes      data parallel first; then, stage by stage where headroom in memory is least, half the data and twice
                the tensor degree, until no stage can be changed                                  `meshes`

Reference: Um et al., "Metis: Fast Automatic Distributed Training on Heterogeneous GPUs", USENIX ATC 2024, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Metis's default; its smallest allowed group is this share of the mean one.
VARIANCE = 0.5
MAX_PERMUTATIONS = 10


@dataclass(frozen=True, slots=True)
class DeviceType:
    """`count` devices of one kind."""

    name: str
    count: int
    flops_per_s: float
    memory_bytes: float


def type_orders(types: Sequence[DeviceType]) -> Iterator[tuple[DeviceType, ...]]:
    """All orders in which the types may stand along the pipeline."""
    yield from itertools.permutations(types)


def device_groups(
    num_devices: int, num_stages: int, variance: float = VARIANCE, most: int = MAX_PERMUTATIONS
) -> list[tuple[int, ...]]:
    """Rows of group sizes, the most even first. Empty where no powers of two within the bound sum to the devices."""
    least = max(1.0, num_devices / num_stages * variance)
    sizes = [2**e for e in range(num_devices.bit_length()) if least <= 2**e <= num_devices]
    found: list[tuple[int, ...]] = []

    def fill(left: int, stages: int, most_size: int, taken: tuple[int, ...]) -> None:
        if stages == 0:
            if left == 0:
                found.append(taken)
            return
        for size in sizes:
            if size <= most_size and size <= left:
                fill(left - size, stages - 1, size, (*taken, size))

    fill(num_devices, num_stages, num_devices, ())
    found.sort(key=lambda row: max(row) - min(row))
    return [order for row in found for order in _orders(row, most)]


def _orders(row: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Distinct orders of one multiset; while there are too many, two of its smallest equals move as one."""
    units: list[tuple[int, ...]] = [(size,) for size in row]
    while _num_orders(units) > most:
        equal = [unit for unit, count in _counts(units).items() if count > 1]
        if not equal:
            break
        unit = min(equal, key=sum)
        for _ in range(2):
            units.remove(unit)
        units.append((*unit, *unit))
    orders = dict.fromkeys(itertools.islice(_permutations(units), most))
    return list(dict.fromkeys(tuple(itertools.chain(*order)) for order in orders))


def _counts(units: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    return {unit: units.count(unit) for unit in dict.fromkeys(units)}


def _num_orders(units: Sequence[tuple[int, ...]]) -> int:
    return math.factorial(len(units)) // math.prod(math.factorial(count) for count in _counts(units).values())


def _permutations(units: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Distinct permutations, without walking through equal ones."""
    if not units:
        yield ()
        return
    for unit in dict.fromkeys(units):
        rest = list(units)
        rest.remove(unit)
        for order in _permutations(rest):
            yield (unit, *order)


def split_layers(
    work: Sequence[float],
    speeds: Sequence[float],
    fits: Callable[[int, int, int], bool] = lambda stage, start, stop: True,
    retries: int = 16,
) -> tuple[int, ...] | None:
    """Where stages end. work: per layer; speeds: of the stages' groups. fits(stage, start, stop): in memory.

    The most even split (least slowest stage), then layers handed on from stages that overflow. None if that fails.
    """
    num, stages = len(work), len(speeds)
    if num < stages:
        return None
    sums = np.concatenate([[0.0], np.cumsum(work)])
    best = np.full((stages + 1, num + 1), math.inf)
    cut = np.zeros((stages + 1, num + 1), int)
    best[0, 0] = 0.0
    for s in range(1, stages + 1):
        for stop in range(s, num - (stages - s) + 1):
            ways = np.maximum(best[s - 1, s - 1 : stop], (sums[stop] - sums[s - 1 : stop]) / speeds[s - 1])
            cut[s, stop] = s - 1 + int(ways.argmin())
            best[s, stop] = ways.min()
    stops, stop = [], num
    for s in range(stages, 0, -1):
        stops.insert(0, stop)
        stop = int(cut[s, stop])
    return _handed_on(stops, work, speeds, fits, retries)


def _handed_on(stops: list[int], work, speeds, fits, retries: int) -> tuple[int, ...] | None:
    for _ in range(retries):
        edges = list(itertools.pairwise([0, *stops]))
        over = [s for s, (start, stop) in enumerate(edges) if not fits(s, start, stop)]
        if not over:
            return tuple(stops)
        s = over[0]
        start, stop = edges[s]
        if stop - start == 1:
            return None
        load = [sum(work[a:b]) / speed for (a, b), speed in zip(edges, speeds, strict=True)]
        near = [t for t in (s - 1, s + 1) if 0 <= t < len(stops) and t not in over]
        if not near:
            near = [t for t in (s - 1, s + 1) if 0 <= t < len(stops)]
        target = min(near, key=lambda t: load[t], default=None)
        if target is None:
            return None
        # the boundary between the two moves by one layer into s
        stops[min(s, target)] += 1 if target < s else -1
    return None


def meshes(
    groups: Sequence[int], headroom: Callable[[Sequence[tuple[int, int]]], Sequence[float]]
) -> Iterator[tuple[tuple[int, int], ...]]:
    """(data, tensor) per stage: data parallel, then one change after another where headroom is least.

    headroom(meshes): bytes left on each stage; asked after each change.
    """
    now = [(size, 1) for size in groups]
    while True:
        yield tuple(now)
        left = headroom(now)
        changeable = [s for s, (data, _) in enumerate(now) if data % 2 == 0]
        if not changeable:
            return
        s = min(changeable, key=lambda s: left[s])
        data, tensor = now[s]
        now[s] = (data // 2, tensor * 2)
