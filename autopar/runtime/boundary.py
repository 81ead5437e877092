"""What two stages hand over between them: which box of a tensor each rank sends to which. Pure geometry, no processes.

A stage lays a microbatch of a tensor out over its mesh by one placement per axis, the data axis first. Where the next
stage has another mesh or other placements, the forward value and the gradient each go by the same rule, because the
gradient of a tensor placed `p` lies as `dual(p)` does (sharding/placement.py):

- along an axis of the senders that splits, every rank has boxes of its own, and sends those that a receiver holds too;
- along one where all hold the same (REPLICATED, SHARED), one of them sends: the one at the receiver's own coordinate;
  where the meshes differ, receivers take turns among the senders;
- along one where each holds a summand (PARTIAL), all send, and the receivers that want summands share these out.

So a gradient that is whole on every receiver of the value (R) is returned by one of them, and one that lies in summands
(H) by all. Both stages cut the batch in time first and into the same microbatches, so what holds for the first
microbatch holds, in local coordinates, for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from ..graph import Shape
from ..sharding.axes import Places, absolute
from ..sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split
from .ownership import Overlap, Segment, Segments, overlaps


def dual(placement: Placement) -> Placement:
    """How the gradient of a tensor so placed lies."""
    return {SHARED: PARTIAL, PARTIAL: REPLICATED}.get(placement, placement)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Spread:
    """How one microbatch of a tensor lies on `ranks`, a row-major mesh of `degrees`, by a placement per axis.

    shape: of the whole tensor. microbatches: into how many the batch is cut, by placements[0], before the data axis.
    shares: units of a microbatch per rank of the data axis, the first one (sharding/rows.py); () where they are equal.
    """

    shape: Shape
    microbatches: int
    ranks: tuple[int, ...]
    degrees: tuple[int, ...]
    placements: Places
    shares: tuple[int, ...] = ()

    def of_gradient(self) -> Spread:
        return Spread(
            self.shape, self.microbatches, self.ranks, self.degrees, tuple(map(dual, self.placements)), self.shares
        )

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The rank's place on each axis."""
        rest, found = self.ranks.index(rank), []
        for degree in reversed(self.degrees):
            rest, place = divmod(rest, degree)
            found.append(place)
        return tuple(reversed(found))

    def rank_at(self, coordinates: tuple[int, ...]) -> int:
        index = 0
        for place, degree in zip(coordinates, self.degrees, strict=True):
            index = index * degree + place
        return self.ranks[index]

    def segments(self, rank: int) -> Segments:
        """Per dim, the runs of the whole tensor that the rank has of the first microbatch."""
        data, *model = self.coordinates(rank)
        shares = self.shares or (1,) * self.degrees[0]
        # Units of the first microbatch, and of the whole batch.
        counts = [(sum(shares[:data]), shares[data], self.microbatches * sum(shares))]
        counts += [(place, 1, degree) for place, degree in zip(model, self.degrees[1:], strict=True)]
        places = absolute(self.placements, [units for _, _, units in counts])
        cuts = [(p.blocks, p.dim, count) for p, count in zip(places, counts, strict=True) if isinstance(p, Split)]
        dims = [(Segment(0, 0, size),) if size else () for size in self.shape]
        outside = [Fraction(1)] * len(dims)
        # Of several cuts of one dim the coarser ones lie outside, and cut the blocks of the finer ones.
        for blocks, dim, (start, length, units) in sorted(cuts):
            dims[dim] = _cut(dims[dim], blocks / outside[dim], start, length, units)
            outside[dim] *= Fraction(units, length)
        return tuple(dims)

    def local_shape(self, rank: int) -> Shape:
        return tuple(sum(s.length for s in dim) for dim in self.segments(rank))


@dataclass(frozen=True, slots=True)
class Handover:
    """One tensor going from `sender` to `receiver`."""

    sender: Spread
    receiver: Spread

    def __post_init__(self) -> None:
        # Else a microbatch would not be the same rows on both sides.
        on_batch = [side.placements[0] for side in (self.sender, self.receiver)]
        assert len({place if isinstance(place, Split) else None for place in on_batch}) == 1, on_batch

    def of_gradient(self) -> Handover:
        return Handover(self.receiver.of_gradient(), self.sender.of_gradient())

    def sources(self, rank: int) -> tuple[int, ...]:
        """The senders of which receiver `rank` takes what both hold; several hold the same only where it is summed."""
        return tuple(self.sender.rank_at(place) for place in self._sources(rank))

    def _sources(self, rank: int) -> Iterator[tuple[int, ...]]:
        sender, receiver = self.sender, self.receiver
        there = receiver.coordinates(rank)
        choices = []
        for axis, (placement, degree) in enumerate(zip(sender.placements, sender.degrees, strict=True)):
            if isinstance(placement, Split) or placement == PARTIAL:
                choices.append(tuple(range(degree)))
            else:
                others = [(p, n) for i, (p, n) in enumerate(zip(there, receiver.degrees, strict=True)) if i != axis]
                turn = 0
                for place, size in others:
                    turn = turn * size + place
                same, size = (there[axis], receiver.degrees[axis]) if axis < len(there) else (0, 1)
                choices.append(((same + size * turn) % degree,))
        mine, takers = _index(there, receiver)
        for place in itertools.product(*choices):
            summand, _ = _index(place, sender)
            if summand % takers == mine:
                yield place

    def boxes(self, source: int, rank: int) -> tuple[Overlap, ...]:
        """What receiver `rank` takes from `source`: `mine` are places in the receiver's part, `theirs` in the source's."""
        if source not in self.sources(rank):
            return ()
        return tuple(overlaps(self.receiver.segments(rank), self.sender.segments(source)))

    def adds(self, rank: int) -> bool:
        """Whether each element of the receiver's part comes from several senders or from none: all elements do alike."""
        arriving = sum(box.numel for source in self.sources(rank) for box in self.boxes(source, rank))
        return arriving != math.prod(self.receiver.local_shape(rank))


def _index(place: tuple[int, ...], spread: Spread) -> tuple[int, int]:
    """Which of the summands stands at these coordinates, and how many there are."""
    index, count = 0, 1
    for coordinate, placement, degree in zip(place, spread.placements, spread.degrees, strict=True):
        if placement == PARTIAL:
            index, count = index * degree + coordinate, count * degree
    return index, count


def _cut(segments: tuple[Segment, ...], blocks: Fraction, start: int, length: int, units: int) -> tuple[Segment, ...]:
    """The part [:, start : start + length] of the covered positions seen as (blocks, units, rest), renumbered from 0."""
    if length == units:
        return segments
    size = sum(s.length for s in segments)
    assert blocks.denominator == 1 and size % (blocks * units) == 0, (size, blocks, units)
    rest = size // (int(blocks) * units)
    wanted = length * rest
    kept: list[Segment] = []
    for block in range(int(blocks)):
        low = (block * units + start) * rest
        for s in segments:
            first, last = max(low, s.local), min(low + wanted, s.local + s.length)
            if first < last:
                kept.append(Segment(s.start + first - s.local, block * wanted + first - low, last - first))
    return tuple(kept)
