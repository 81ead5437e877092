"""All ranks of an axis in one process: placements and conversions on lists of local values, differentiable.

The oracle of tests. Everything goes through the whole tensor, so nothing here can be wrong in the way that a collective
can: a conversion combines the ranks' values to the whole and hands the whole out again.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..graph import Shape
from .axes import Places
from .placement import PARTIAL, REPLICATED, SHARED, Placement, Split

Placed = Sequence[tuple[Placement, int]]


def dual(placement: Placement) -> Placement:
    """The placement of the gradient of a tensor so placed."""
    return {SHARED: PARTIAL, PARTIAL: REPLICATED}.get(placement, placement)  # type: ignore[call-overload]


def hand_out(whole: Tensor, placement: Placement, degree: int) -> list[Tensor]:
    """The local value of every rank; a PARTIAL lies wholly on rank 0."""
    if isinstance(placement, Split):
        shape, dim = whole.shape, placement.dim
        rest = shape[dim] // (placement.blocks * degree)
        viewed = whole.reshape(*shape[:dim], placement.blocks, degree, rest, *shape[dim + 1 :])
        flat = (*shape[:dim], placement.blocks * rest, *shape[dim + 1 :])
        return [part.reshape(flat) for part in viewed.unbind(dim + 1)]
    if placement == PARTIAL:
        return [whole, *(torch.zeros_like(whole) for _ in range(degree - 1))]
    return [whole] * degree


def combine(values: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole tensor of which these are the local values (the first rank's, where all have it)."""
    if isinstance(placement, Split):
        dim, blocks = placement.dim, placement.blocks
        shape = values[0].shape
        viewed = [v.reshape(*shape[:dim], blocks, shape[dim] // blocks, *shape[dim + 1 :]) for v in values]
        joined = torch.stack(viewed, dim + 1)
        return joined.reshape(*shape[:dim], shape[dim] * len(values), *shape[dim + 1 :])
    if placement == PARTIAL:
        return torch.stack(list(values)).sum(0) if len(values) > 1 else values[0]
    return values[0]


def hand_out_all(whole: Tensor, placed: Placed) -> list[Tensor]:
    """The local value of every rank of several axes, in row-major order, by (placement, degree) on each.

    Of cuts of one dim, those with fewer blocks are made first, and of equal ones those of earlier axes.
    """
    parts: dict[tuple[int, ...], Tensor] = {(): whole}
    order = _by_blocks(placed)
    for axis in order:
        place, degree = _left(placed, axis), placed[axis][1]
        parts = {(*at, r): part for at, value in parts.items() for r, part in enumerate(hand_out(value, place, degree))}
    return [parts[tuple(at[axis] for axis in order)] for at in _coordinates(placed)]


def combine_all(values: Sequence[Tensor], placed: Placed) -> Tensor:
    """The inverse of `hand_out_all`."""
    order = _by_blocks(placed)
    parts = {tuple(at[axis] for axis in order): v for at, v in zip(_coordinates(placed), values, strict=True)}
    for axis in reversed(order):
        place, degree = _left(placed, axis), placed[axis][1]
        outer = dict.fromkeys(at[:-1] for at in parts)
        parts = {at: combine([parts[*at, r] for r in range(degree)], place) for at in outer}
    return parts[()]


def _coordinates(placed: Placed) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(degree) for _, degree in placed))


def _by_blocks(placed: Placed) -> list[int]:
    return sorted(range(len(placed)), key=lambda i: (getattr(placed[i][0], "blocks", 0), i))


def _left(placed: Placed, axis: int) -> Placement:
    """The placement on one axis in terms of what the cuts before it leave."""
    place = placed[axis][0]
    if not isinstance(place, Split):
        return place
    cut = math.prod(n for p, n in placed if isinstance(p, Split) and p.dim == place.dim and p.blocks < place.blocks)
    assert place.blocks % cut == 0, placed
    return Split(place.dim, place.blocks // cut)


def convert(values: Sequence[Tensor], have: Places, want: Places, degrees: Sequence[int]) -> list[Tensor]:
    """Change the placements of a tensor on all ranks at once; the backward is the dual conversion of the gradients."""
    if have == want:
        return list(values)
    if not any(v.requires_grad for v in values):
        whole = combine_all(values, tuple(zip(have, degrees, strict=True)))
        return hand_out_all(whole, tuple(zip(want, degrees, strict=True)))
    return list(_Convert.apply(tuple(zip(have, degrees, strict=True)), tuple(zip(want, degrees, strict=True)), *values))


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, have: Placed, want: Placed, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.have, ctx.want = have, want
        return tuple(v.clone() for v in hand_out_all(combine_all(values, have), want))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        whole = combine_all(gradients, [(dual(p), n) for p, n in ctx.want])
        return None, None, *hand_out_all(whole, [(dual(p), n) for p, n in ctx.have])


@dataclass(eq=False)
class _Meeting:
    """Where the threads of all ranks meet to reduce."""

    barrier: threading.Barrier
    values: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class EmulatedAxis:
    """One rank's view of an emulated axis (see `algorithms.Axis`)."""

    rank: int
    size: int
    meeting: _Meeting | None = None

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        assert self.meeting, "this axis has a rank and a size only"
        self.meeting.values[self.rank] = tensor
        self.meeting.barrier.wait()
        stacked = torch.stack(self.meeting.values)
        self.meeting.barrier.wait()
        return stacked.sum(0) if op == "sum" else stacked.amax(0)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        assert self.meeting, "this axis has a rank and a size only"
        self.meeting.values[self.rank] = rows.split(list(sent))
        self.meeting.barrier.wait()
        arrived = torch.cat([parts[self.rank] for parts in self.meeting.values])
        self.meeting.barrier.wait()
        assert len(arrived) == sum(received)
        return arrived.detach().clone()

    def swap(
        self,
        to_previous: Tensor | None,
        to_next: Tensor | None,
        from_previous: Shape | None,
        from_next: Shape | None,
        like: Tensor,
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        assert self.meeting, "this axis has a rank and a size only"
        self.meeting.values[self.rank] = (to_previous, to_next)
        self.meeting.barrier.wait()
        arrived = (
            self.meeting.values[self.rank - 1][1] if from_previous else None,
            self.meeting.values[self.rank + 1][0] if from_next else None,
        )
        self.meeting.barrier.wait()
        for tensor, shape in zip(arrived, (from_previous, from_next), strict=True):
            assert (None if tensor is None else tuple(tensor.shape)) == shape and (
                tensor is None or tensor.dtype == like.dtype
            )
        return lambda: arrived

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        assert self.meeting, "this axis has a rank and a size only"
        self.meeting.values[self.rank] = list(tensors)
        self.meeting.barrier.wait()
        before = self.meeting.values[self.rank - 1]
        self.meeting.barrier.wait()
        return lambda: before


AxisOf = Callable[[tuple[int, ...]], EmulatedAxis]


def on_every_rank(size: int, function: Callable[[EmulatedAxis], Any], meets: bool) -> list[Any]:
    """`function(axis)` for every rank; in threads where ranks reduce (`meets`), one after the other otherwise."""
    return on_every_rank_of((size,), lambda axes, _: function(axes((0,))), [(0,)] if meets else [])


def on_every_rank_of(
    degrees: Sequence[int], function: Callable[[AxisOf, int], Any], meets: Collection[tuple[int, ...]]
) -> list[Any]:
    """`function(axis_of, rank)` for every rank of several axes, in row-major order.

    axis_of(numbers): these axes as one. meets: those that reduce; the ranks run in threads then, else in turn.
    """
    places = list(itertools.product(*map(range, degrees)))
    meetings: dict[tuple[tuple[int, ...], tuple[int, ...]], _Meeting] = {}
    for numbers in meets:
        size = math.prod(degrees[i] for i in numbers)
        for place in places:
            key = (tuple(numbers), _others(place, numbers))
            meetings.setdefault(key, _Meeting(threading.Barrier(size), [None] * size))

    def axis_of(place: tuple[int, ...], numbers: tuple[int, ...]) -> EmulatedAxis:
        rank = 0
        for i in numbers:
            rank = rank * degrees[i] + place[i]
        size = math.prod(degrees[i] for i in numbers)
        return EmulatedAxis(rank, size, meetings.get((tuple(numbers), _others(place, numbers))))

    if not meetings:
        return [function(partial(axis_of, place), rank) for rank, place in enumerate(places)]
    results: list[Any] = [None] * len(places)
    errors: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad_enabled):
                results[rank] = function(partial(axis_of, places[rank]), rank)
        except BaseException as error:
            errors.append(error)
            for meeting in meetings.values():
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def _others(place: tuple[int, ...], numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(p for i, p in enumerate(place) if i not in numbers)
