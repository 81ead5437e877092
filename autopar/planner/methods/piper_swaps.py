"""The inner choice of Piper at one tensor degree: which layers of a stage run their slower, smaller choice.

A stage starts from its fastest choices; while y samples in flight do not fit, layers are swapped in the order of least
time per byte freed, and the last swap is the cheapest one that suffices.                                   `Swaps`

A layer v frees a_v y + b_v bytes, so along one order of the layers the bytes freed by the first n of a piece are
A_n y + B_n, with running sums A and B of the piece alone: where enough is freed is found by bisection over n, for
all pieces and y that share the order at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Numbers in a table that is worked on at once: what the processor's own memory holds.
_AT_ONCE = 2**17
# Bytes are compared to this share.
_ROUNDING = 1e-12


class Swaps:
    """inside [pieces, layers]: 1 where a layer is in a piece; each, rest [pieces]: bytes with the fastest choices, y * each
    + rest; saved [3, layers]: seconds (at most 0), bytes per sample, bytes, that the smaller choice saves."""

    def __init__(
        self,
        inside: np.ndarray,
        each: np.ndarray,
        rest: np.ndarray,
        saved: np.ndarray,
        memory_bytes: float,
        most: int,
    ) -> None:
        self.inside, self.each, self.rest, self.memory_bytes = inside, each, rest, memory_bytes
        self.slower_s, self.freed_each, self.freed_rest = -saved[0], saved[1], saved[2]
        self.fits_fast = self._most_with_fastest(most)
        self.fits = self._most_with_smallest(most)
        self.ways = np.zeros(most + 1, np.int64)
        self.orders: list[np.ndarray] = []
        self._order(most)

    def _most_with_fastest(self, most: int) -> np.ndarray:
        room = self.memory_bytes - self.rest
        fits = np.clip(_floor(room / np.maximum(self.each, 1e-30)), 0, most)
        return np.where(room < 0, 0, fits).astype(np.int32)

    def _most_with_smallest(self, most: int) -> np.ndarray:
        fits = self.fits_fast.copy()
        rows = np.flatnonzero(fits < most)
        low, high = fits[rows].astype(np.int64), np.full(len(rows), most)
        freed = np.maximum(self.freed_each * np.arange(most + 1)[:, None] + self.freed_rest, 0.0)
        while (low < high).any():
            middle = (low + high + 1) // 2
            need = self.each[rows] * middle + self.rest[rows] - self.memory_bytes
            ok = np.einsum("pv,pv->p", self.inside[rows], freed[middle]) >= need * (1 - _ROUNDING)
            low, high = np.where(ok, middle, low), np.where(ok, high, middle - 1)
        fits[rows] = low
        return fits

    def _order(self, most: int) -> None:
        """ways[y]: the index in `orders` of the layers that free bytes at y, least time per byte first."""
        freed = self.freed_each * np.arange(1, most + 1)[:, None] + self.freed_rest
        price = np.where(freed > 0, self.slower_s / np.maximum(freed, 1e-300), np.inf)
        table = np.argsort(price, axis=1, kind="stable")
        useful = (freed > 0).sum(1)
        known: dict[bytes, int] = {}
        for y in range(1, most + 1):
            order = table[y - 1, : useful[y - 1]]
            self.ways[y] = known.setdefault(order.tobytes(), len(known))
            if len(known) > len(self.orders):
                self.orders.append(order)

    def cost_s(self, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Extra seconds of pieces `rows` (ascending) that hold y samples in flight, fits_fast < y <= fits."""
        found = np.zeros(len(rows))
        for part in _parts(len(rows), self.inside.shape[1]):
            ways = self.ways[y[part]]
            for way in np.unique(ways):
                at = part.start + np.flatnonzero(ways == way)
                found[at] = self._least(self.orders[way], rows[at], y[at])[0]
        return found

    def swapped(self, row: int, y: int) -> np.ndarray:
        """[layers] whether its smaller choice is taken, of one piece with y samples in flight."""
        order = self.orders[self.ways[y]]
        _, before, last = self._least(order, np.array([row]), np.array([y]))
        first = order[: before[0]]
        taken = np.zeros(self.inside.shape[1], bool)
        taken[first] = self.inside[row, first] > 0
        taken[last[0]] = True
        return taken

    def _least(self, order: np.ndarray, rows: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """(extra seconds, how many of `order` are swapped if inside, and the layer that is swapped last), per entry."""
        heads = run_starts(rows)
        owner = np.repeat(np.arange(len(heads)), np.diff(heads, append=len(rows)))
        inside = self.inside[rows[heads]][:, order]
        each, rest, slower_s = (
            np.cumsum(inside * per[order], axis=1) for per in (self.freed_each, self.freed_rest, self.slower_s)
        )
        need = (self.each[rows] * y + self.rest[rows] - self.memory_bytes) * (1 - _ROUNDING)
        low, high = np.zeros(len(rows), np.int64), np.full(len(rows), len(order) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            enough = each[owner, middle] * y + rest[owner, middle] >= need
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        before = np.maximum(low - 1, 0)
        freed = np.where(low > 0, each[owner, before] * y + rest[owner, before], 0.0)
        left = need - freed - _ROUNDING * need
        # the cheapest of those from there on that frees what is left
        by_time = np.argsort(self.slower_s[order], kind="stable")
        able = self.freed_each[order[by_time]] * y[:, None]
        able += self.freed_rest[order[by_time]]
        able = able >= left[:, None]
        able &= (inside[:, by_time] > 0)[owner]
        able &= by_time.astype(np.int32) >= low.astype(np.int32)[:, None]
        last = order[by_time[able.argmax(1)]]
        cost_s = np.where(low > 0, slower_s[owner, before], 0.0) + self.slower_s[last]
        return cost_s, low, last


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
