"""The inner choice of Piper at one tensor degree: which layers of a stage run their slower, smaller choice.

A stage starts from its fastest choices; while y samples in flight do not fit, layers are swapped in the order of least
time per byte freed, and the last swap is the cheapest one that suffices.                                   `Swaps`

A layer v frees a_v y + b_v bytes, so along one order of the layers the first n that are in a tail free A_n y + B_n. A
stage is the difference of two tails, and frees the difference: where enough is freed is found by bisection over n, for
all stages and y that share the order at once, without a row of layers per stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

# Numbers in a table that is worked on at once: what the processor's own memory holds.
_AT_ONCE = 2**17
# Bytes are compared to this share.
_ROUNDING = 1e-12


class Swaps:
    """members [tails, layers]; a piece is the tail `outer` without the tail `inner` [pieces]; each, rest [pieces]: its
    bytes with the fastest choices are y * each + rest; saved [3, layers]: seconds (at most 0), bytes per sample, and
    bytes that the smaller choice saves."""

    def __init__(
        self,
        members: np.ndarray,
        outer: np.ndarray,
        inner: np.ndarray,
        each: np.ndarray,
        rest: np.ndarray,
        saved: np.ndarray,
        memory_bytes: float,
        most: int,
    ) -> None:
        self.members, self.outer, self.inner = members.astype(bool), outer, inner
        self.each, self.rest, self.memory_bytes = each, rest, memory_bytes
        self.slower_s, self.freed_each, self.freed_rest = -saved[0], saved[1], saved[2]
        self.ways = np.zeros(most + 1, np.int64)
        self.orders: list[np.ndarray] = []
        self.last_line: dict[int, _Line] = {}
        self._order(most)
        self.fits_fast = self._most_with_fastest(most)
        self.fits = self._most_with_smallest(most)

    def _order(self, most: int) -> None:
        """ways[y]: the index in `orders` of the layers that free bytes at y, least time per byte first."""
        freed = self.freed_each * np.arange(1, most + 1)[:, None] + self.freed_rest
        price = np.where(freed > 0, self.slower_s / np.maximum(freed, 1e-300), np.inf)
        table = np.argsort(price, axis=1, kind="stable")
        useful = (freed > 0).sum(1)
        self.least_price = float(price.min(initial=math.inf))
        known: dict[bytes, int] = {}
        for y in range(1, most + 1):
            order = table[y - 1, : useful[y - 1]]
            self.ways[y] = known.setdefault(order.tobytes(), len(known))
            if len(known) > len(self.orders):
                self.orders.append(order)

    def _most_with_fastest(self, most: int) -> np.ndarray:
        room = self.memory_bytes - self.rest
        fits = np.clip(_floor(room / np.maximum(self.each, 1e-30)), 0, most)
        return np.where(room < 0, 0, fits).astype(np.int32)

    def _most_with_smallest(self, most: int) -> np.ndarray:
        fits = self.fits_fast.copy()
        rows = np.flatnonzero(fits < most)
        outer, inner, low, high = self.outer[rows], self.inner[rows], fits[rows], np.full(len(rows), most, np.int32)
        each, rest = (
            np.stack([self.members[:, order] @ per[order] for order in self.orders])
            for per in (self.freed_each, self.freed_rest)
        )
        while (low < high).any():
            middle = (low + high + 1) // 2
            way = self.ways[middle]
            freed = (each[way, outer] - each[way, inner]) * middle + rest[way, outer] - rest[way, inner]
            need = self.each[rows] * middle + self.rest[rows] - self.memory_bytes
            ok = freed >= need * (1 - _ROUNDING)
            low, high = np.where(ok, middle, low), np.where(ok, high, middle - 1)
        fits[rows] = low
        return fits

    def affordable(self, rows: np.ndarray, budget_s: np.ndarray) -> np.ndarray:
        """No more samples in flight than these are had for so much extra time: every byte at the cheapest layer's price."""
        if not math.isfinite(self.least_price):
            return self.fits_fast[rows]
        room = self.memory_bytes - self.rest[rows] + budget_s / max(self.least_price, 1e-300)
        return _floor(room / np.maximum(self.each[rows], 1e-30) * (1 + 1e-9)).astype(np.int64)

    def cost_s(self, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Extra seconds of pieces `rows` that hold y samples in flight, fits_fast < y <= fits."""
        found = np.zeros(len(rows))
        ways = self.ways[y]
        for way in np.unique(ways):
            at = np.flatnonzero(ways == way)
            line = self._line(way)
            for part in _parts(len(at), self.members.shape[1]):
                found[at[part]] = line.least(rows[at[part]], y[at[part]])[0]
        return found

    def swapped(self, row: int, y: int) -> np.ndarray:
        """[layers] whether its smaller choice is taken, of one piece with y samples in flight."""
        line = self._line(self.ways[y])
        _, before, last = line.least(np.array([row]), np.array([y]))
        first = line.order[: before[0]]
        taken = np.zeros(self.members.shape[1], bool)
        taken[first] = self.members[self.outer[row], first] & ~self.members[self.inner[row], first]
        taken[last[0]] = True
        return taken

    def _line(self, way: int) -> _Line:
        # often one order serves all y
        if way not in self.last_line:
            self.last_line = {way: _Line(self, self.orders[way])}
        return self.last_line[way]


class _Line:
    """One order of the layers: what the first n of them in a tail free and cost, [tails, n + 1] each."""

    def __init__(self, swaps: Swaps, order: np.ndarray) -> None:
        self.swaps, self.order = swaps, order
        among = swaps.members[:, order]
        self.each, self.rest, self.slower_s = (
            np.concatenate([np.zeros((len(among), 1)), np.cumsum(among * per[order], axis=1)], axis=1)
            for per in (swaps.freed_each, swaps.freed_rest, swaps.slower_s)
        )
        # places of the order, cheapest layer first
        self.by_time = np.argsort(swaps.slower_s[order], kind="stable").astype(np.int32)
        self.cheapest = order[self.by_time]
        self.among = among[:, self.by_time]

    def least(self, rows: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """(extra seconds, how many of `order` are swapped if inside, and the layer that is swapped last), per entry."""
        swaps, outer, inner = self.swaps, self.swaps.outer[rows], self.swaps.inner[rows]
        need = (swaps.each[rows] * y + swaps.rest[rows] - swaps.memory_bytes) * (1 - _ROUNDING)

        def freed(n: np.ndarray) -> np.ndarray:
            return (self.each[outer, n] - self.each[inner, n]) * y + self.rest[outer, n] - self.rest[inner, n]

        low, high = np.zeros(len(rows), np.int32), np.full(len(rows), len(self.order) - 1, np.int32)
        while (low < high).any():
            middle = (low + high) // 2
            enough = freed(middle + 1) >= need
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        left = need - freed(low) - _ROUNDING * swaps.memory_bytes
        # the cheapest of those from there on that frees what is left
        able = swaps.freed_each[self.cheapest] * y[:, None]
        able += swaps.freed_rest[self.cheapest]
        able = able >= left[:, None]
        able &= self.among[outer] > self.among[inner]
        able &= self.by_time >= low[:, None]
        last = self.cheapest[able.argmax(1)]
        before_s = self.slower_s[outer, low] - self.slower_s[inner, low]
        return before_s + swaps.slower_s[last], low, last


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of one value begin."""
    starts = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return np.flatnonzero(starts)


def least_from_here(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """values[i], or the least of those from i to ends[i] - 1, the end of its run."""
    step, here = 1, np.arange(len(values))
    longest = int((ends - here).max(initial=0))
    while step < longest:
        values = np.minimum(values, values[np.minimum(here + step, ends - 1)])
        step *= 2
    return values


def _parts(num: int, width: int) -> Iterator[slice]:
    size = max(1, _AT_ONCE // max(1, width))
    for begin in range(0, num, size):
        yield slice(begin, min(num, begin + size))


def _floor(values: np.ndarray) -> np.ndarray:
    return np.floor(np.minimum(values * (1 + _ROUNDING), 2.0**31))
