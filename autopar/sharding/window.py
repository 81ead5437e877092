"""Windows that slide over a dim: which inputs the outputs need, and what ranks that split the dim fetch from neighbours.

Output y needs the inputs from ceil((y down + first) / up) to floor((y down + last) / up), both included:

    convolution, pooling      up = 1, down = stride,  first = -padding,             last = first + extent - 1
    transposed convolution    up = stride, down = 1,  first = padding - extent + 1, last = padding
    upsampling by a factor    up = factor, down = 1,  first = -reach factor,        last = reach factor

where extent = dilation (kernel - 1) + 1. Of n ranks each holds size / n inputs and makes out / n outputs, in order. What a
rank's outputs need besides its own inputs it fetches from the two ranks next to it; what lies before the first input
or behind the last is filled in. Splits by which some rank would need more than its neighbours have are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Window:
    """size, out: inputs and outputs along the dim."""

    size: int
    out: int
    down: int
    first: int
    last: int
    up: int = 1

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that outputs [start, stop) need; they may lie outside of [0, size)."""
        return -((-start * self.down - self.first) // self.up), ((stop - 1) * self.down + self.last) // self.up + 1

    @property
    def apart(self) -> bool:
        """Whether every equal part of the outputs needs just the same part of the inputs."""
        if self.up == 1:
            return self.first == 0 and self.last < self.down and self.size == self.down * self.out
        return self.last == 0 and -self.first < self.up and self.out == self.up * self.size

    def parts(self, num_ranks: int) -> tuple[Part, ...] | None:
        """What each of `num_ranks` ranks has and needs; None where they cannot split the dim."""
        return _parts(self, num_ranks)

    def border(self, num_ranks: int) -> int:
        """Inputs that a rank fetches, at most: from both neighbours together."""
        return max(part.from_previous + part.from_next for part in _parts(self, num_ranks) or ())


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank needs, in order: `before` places outside of the whole, `from_previous` inputs of the rank before, its own
    from `start` to `stop`, `from_next` of the rank behind, and `behind` places outside again.

    to_previous, to_next: how many of its own, the first and the last, the neighbours need.
    """

    before: int
    from_previous: int
    start: int
    stop: int
    from_next: int
    behind: int
    to_previous: int = 0
    to_next: int = 0

    @property
    def length(self) -> int:
        return self.before + self.from_previous + self.stop - self.start + self.from_next + self.behind


@lru_cache(maxsize=10_000)
def _parts(window: Window, num_ranks: int) -> tuple[Part, ...] | None:
    if window.size % num_ranks or window.out % num_ranks:
        return None
    own, made = window.size // num_ranks, window.out // num_ranks
    found: list[tuple[int, ...]] = []
    for rank in range(num_ranks):
        low, high = window.needs(rank * made, (rank + 1) * made)
        inside = max(low, 0), min(high, window.size)
        mine = rank * own, (rank + 1) * own
        # The needed inputs are one run, which must touch the rank's own and end within its neighbours'.
        if inside[0] >= inside[1] or inside[0] > mine[1] or inside[1] < mine[0]:
            return None
        previous, following = max(0, mine[0] - inside[0]), max(0, inside[1] - mine[1])
        if max(previous, following) > own:
            return None
        start, stop = max(inside[0], mine[0]) - mine[0], min(inside[1], mine[1]) - mine[0]
        found.append((inside[0] - low, previous, start, stop, following, high - inside[1]))
    return tuple(
        Part(
            *part,
            to_previous=found[rank - 1][4] if rank else 0,
            to_next=found[rank + 1][1] if rank + 1 < num_ranks else 0,
        )
        for rank, part in enumerate(found)
    )
