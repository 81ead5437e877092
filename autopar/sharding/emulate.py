"""All ranks of an axis in one process: placements and conversions on lists of local values, differentiable.

The oracle of tests. Everything goes through the whole tensor, so nothing here can be wrong in the way that a collective
can: a conversion combines the ranks' values to the whole and hands the whole out again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .placement import PARTIAL, REPLICATED, SHARED, Placement, Split


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


def convert(values: Sequence[Tensor], have: Placement, want: Placement) -> list[Tensor]:
    """Change the placement of a tensor on all ranks at once; the backward is the dual conversion of the gradients."""
    if have == want:
        return list(values)
    if not any(v.requires_grad for v in values):
        return hand_out(combine(values, have), want, len(values))
    return list(_Convert.apply(have, want, *values))


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, have: Placement, want: Placement, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.have, ctx.want = have, want
        return tuple(v.clone() for v in hand_out(combine(values, have), want, len(values)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        whole = combine(gradients, dual(ctx.want))
        return None, None, *hand_out(whole, dual(ctx.have), len(gradients))


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


def on_every_rank(size: int, function: Callable[[EmulatedAxis], Any], meets: bool) -> list[Any]:
    """`function(axis)` for every rank; in threads where ranks reduce (`meets`), one after the other otherwise."""
    if not meets:
        return [function(EmulatedAxis(rank, size)) for rank in range(size)]
    meeting = _Meeting(threading.Barrier(size), [None] * size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad_enabled):
                results[rank] = function(EmulatedAxis(rank, size, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
