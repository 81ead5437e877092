"""Where one tensor lies at rest: which box of the global tensor each rank holds. Pure geometry, no processes.

A stage's ranks form a (data, tensor) mesh in row-major order. The tensor axis cuts first, by its placements; where the
stage shards over data (ZeRO 1 to 3), dim 0 of what is left is cut over groups of `shards` consecutive data ranks by
`torch.chunk`'s rule: chunks of ceil(n / shards) rows, the last ones shorter or empty. A tensor that several stages use
(tied parameters) is held whole by each of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from ..sharding.local import local_blocks
from ..sharding.placement import REPLICATED, SHARED, Placement, Split


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` entries along one dim, from `start` in the global tensor and from `local` in the rank's own."""

    start: int
    local: int
    length: int


Segments = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """One stage that holds the tensor: `ranks[d * tensor + t]`, its placement on the tensor axis, and over how many
    consecutive data ranks dim 0 of the tensor-local part is cut as well (1: not at all; fewer than `data`: every such
    group holds a copy). SHARED lies as REPLICATED does; it speaks of the gradient only.

    inner: where the tensor axis consists of several model axes, (placement, degree) of all but the first, of which
    `placement` speaks then; t counts through them, the last fastest.
    """

    ranks: tuple[int, ...]
    data: int
    tensor: int
    placement: Placement
    shards: int = 1
    inner: tuple[tuple[Placement, int], ...] = ()

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(data, tensor) coordinates of a global rank of this stage."""
        return divmod(self.ranks.index(rank), self.tensor)

    def shard(self, rank: int) -> int:
        """Which of the `shards` chunks the rank holds."""
        return self.coordinates(rank)[0] % self.shards

    @property
    def model(self) -> tuple[tuple[Placement, int], ...]:
        """(placement, degree) on each model axis."""
        if not self.inner:
            return ((self.placement, self.tensor),) if self.tensor > 1 else ()
        return ((self.placement, self.tensor // math.prod(n for _, n in self.inner)), *self.inner)

    @property
    def split(self) -> Split | None:
        """The split on the first model axis; the only one where `inner` is empty."""
        return self.placement if isinstance(self.placement, Split) and self.tensor > 1 else None

    @property
    def splits(self) -> tuple[tuple[int, Split], ...]:
        """The model axes that cut, by number, each with the split of what the axes before it have left."""
        model = self.model
        return tuple(
            (i, Split(place.dim, local_blocks((), model[: i + 1], i)))
            for i, (place, _) in enumerate(model)
            if isinstance(place, Split)
        )

    @property
    def summed(self) -> tuple[int, ...]:
        """The model axes on which gradients are summands."""
        return tuple(i for i, (place, _) in enumerate(self.model) if place == SHARED)

    def model_coordinates(self, rank: int) -> tuple[int, ...]:
        """Coordinates of a global rank on each model axis."""
        index, found = self.coordinates(rank)[1], []
        for _, degree in reversed(self.model):
            index, place = divmod(index, degree)
            found.append(place)
        return tuple(reversed(found))

    def with_sums(self, numbers: Collection[int]) -> Holder:
        """SHARED in place of REPLICATED on these model axes."""
        places = [SHARED if i in numbers and place == REPLICATED else place for i, (place, _) in enumerate(self.model)]
        inner = tuple((place, n) for place, (_, n) in zip(places[1:], self.inner, strict=True))
        return replace(self, placement=places[0], inner=inner) if places else self


@dataclass(frozen=True, slots=True)
class Ownership:
    """A global tensor of `shape` and the stages that hold it, in stage order."""

    shape: tuple[int, ...]
    holders: tuple[Holder, ...]

    def holder(self, rank: int) -> Holder:
        """The stage of `rank`; KeyError where the rank holds nothing of the tensor."""
        for holder in self.holders:
            if rank in holder.ranks:
                return holder
        raise KeyError(rank)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(rank for holder in self.holders for rank in holder.ranks)

    def tensor_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the rank's part before the cut over data: what the computation uses."""
        holder = self.holder(rank)
        shape = list(self.shape)
        for axis, split in holder.splits:
            shape[split.dim] //= holder.model[axis][1]
        return tuple(shape)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return tuple(sum(s.length for s in dim) for dim in self.segments(rank))

    def segments(self, rank: int) -> Segments:
        """Per dim, the runs of the global tensor that the rank holds; its part is their cartesian product."""
        holder = self.holder(rank)
        dims = [(Segment(0, 0, size),) if size else () for size in self.shape]
        places = holder.model_coordinates(rank)
        for axis, split in holder.splits:
            dims[split.dim] = _split(dims[split.dim], split, holder.model[axis][1], places[axis])
        if holder.shards > 1 and self.shape:
            size, shard = sum(s.length for s in dims[0]), holder.shard(rank)
            chunk = math.ceil(size / holder.shards)
            dims[0] = _window(dims[0], min(shard * chunk, size), min((shard + 1) * chunk, size))
        return tuple(dims)

    def take(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """This rank's part of the whole tensor, as a contiguous tensor of its own."""
        assert tuple(whole.shape) == self.shape, (tuple(whole.shape), self.shape)
        part = whole
        for dim, segments in enumerate(self.segments(rank)):
            if segments == (Segment(0, 0, self.shape[dim]),):
                continue
            runs = [part.narrow(dim, s.start, s.length) for s in segments]
            part = torch.cat(runs, dim) if runs else part.narrow(dim, 0, 0)
        return part.clone(memory_format=torch.contiguous_format)

    def counts(self, rank: int) -> bool:
        """Whether this rank is the first that holds its part, so that each element counts on exactly one rank."""
        holder = self.holder(rank)
        data_index, _ = holder.coordinates(rank)
        cut = {axis for axis, _ in holder.splits}
        return (
            holder is self.holders[0]
            and data_index < (holder.shards if self.shape else 1)
            and all(place == 0 or axis in cut for axis, place in enumerate(holder.model_coordinates(rank)))
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """A box that two ranks both hold: per dim, where it begins in each one's part, and how long it is."""

    mine: tuple[int, ...]
    theirs: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def overlaps(mine: Segments, theirs: Segments) -> Iterator[Overlap]:
    """All boxes common to two parts, in one order that both sides compute alike (global order, last dim fastest)."""
    pairs = []
    for left, right in zip(mine, theirs, strict=True):
        found = []
        for a in left:
            for b in right:
                start = max(a.start, b.start)
                stop = min(a.start + a.length, b.start + b.length)
                if start < stop:
                    found.append((start, a.local + start - a.start, b.local + start - b.start, stop - start))
        pairs.append(_joined(sorted(found)))
    boxes: list[list[tuple[int, int, int, int]]] = [[]]
    for found in pairs:
        boxes = [[*box, run] for box in boxes for run in found]
    for box in boxes:
        yield Overlap(tuple(r[1] for r in box), tuple(r[2] for r in box), tuple(r[3] for r in box))


def _joined(runs: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Runs (global start, start on one side, on the other, length) that continue each other on both sides, as one."""
    joined: list[tuple[int, int, int, int]] = []
    for start, mine, theirs, length in runs:
        if joined:
            first, before, there, so_far = joined[-1]
            if (before + so_far, there + so_far) == (mine, theirs):
                joined[-1] = (first, before, there, so_far + length)
                continue
        joined.append((start, mine, theirs, length))
    return joined


def _split(segments: tuple[Segment, ...], split: Split, degree: int, index: int) -> tuple[Segment, ...]:
    """Split(dim, blocks): what the segments cover seen as (blocks, degree, rest), of which `index` gets [:, index]."""
    size = sum(s.length for s in segments)
    assert size % (split.blocks * degree) == 0, (segments, split, degree)
    rest = size // (split.blocks * degree)
    kept: list[Segment] = []
    for b in range(split.blocks):
        start = (b * degree + index) * rest
        for s in _window(segments, start, start + rest):
            kept.append(Segment(s.start, b * rest + s.local, s.length))
    return tuple(kept)


def _window(segments: tuple[Segment, ...], start: int, stop: int) -> tuple[Segment, ...]:
    """The part [start, stop) of the local positions that the segments cover, renumbered from 0."""
    kept = []
    for s in segments:
        low, high = max(start, s.local), min(stop, s.local + s.length)
        if low < high:
            kept.append(Segment(s.start + low - s.local, low - start, high - low))
    return tuple(kept)
