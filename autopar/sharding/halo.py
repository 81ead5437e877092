"""Ops over windows on a part of their space: each rank fetches the borders that its outputs need from its neighbours.
Convolutions by a part of their kernel: each rank sums over its own taps, and fetches nothing.

Dims are worked off one after the other, so that what is fetched along the second holds the corners fetched along the
first. In the backward the borders' gradients travel back and are added to those of the rows that they are copies of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import Shape
from .window import Part, Window

Fill = float | Literal["edge", "end"]
"""What stands outside of the whole: a value, the nearest element inside, or nothing, so that the tensor ends there."""


Finish = Callable[[Tensor, int, int, int, Window], Tensor]
"""(output, rank, ranks, dim, window) -> the finished output."""


class Line(Protocol):
    """An axis whose ranks stand in a line and give to the ranks next to them."""

    rank: int
    size: int

    def swap(
        self,
        to_previous: Tensor | None,
        to_next: Tensor | None,
        from_previous: Shape | None,
        from_next: Shape | None,
        like: Tensor,
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Start sending to and receiving from both neighbours, tensors of these shapes and of `like`'s kind; the
        result waits for what arrives. None: nothing goes there or comes from there."""


@dataclass(frozen=True, slots=True)
class Windowed:
    """`function` on this rank's part of its first argument, given where each axis cuts it.

    dims, windows: per axis. padding: for F.pad, of dims that no axis cuts, where the function cannot do it.
    finish: per axis, what is left to do with the output, or None.
    """

    function: Callable[..., Tensor]
    dims: tuple[int, ...]
    windows: tuple[Window, ...]
    fill: Fill = 0.0
    padding: tuple[int, ...] = ()
    finish: tuple[Finish | None, ...] = ()

    def __call__(self, *given: Any, **kwargs: Any) -> Tensor:
        count = len(self.dims)
        axes, input, rest = given[:count], given[count], given[count + 1 :]
        cuts = list(zip(axes, self.dims, self.windows, strict=True))
        for axis, dim, window in cuts:
            input = extend(input, axis, dim, window, self.fill)
        if self.padding:
            assert not isinstance(self.fill, str)
            input = F.pad(input, self.padding, value=self.fill)
        output = self.function(input, *rest, **kwargs)
        for finish, (axis, dim, window) in zip(self.finish, cuts, strict=bool(self.finish)):
            if finish is not None:
                output = finish(output, axis.rank, axis.size, dim, window)
        return output


@dataclass(frozen=True, slots=True)
class Crop:
    """Keeps this rank's outputs of a function whose first output, for inputs from `low` on, is `low up + shift`."""

    shift: int

    def __call__(self, output: Tensor, rank: int, size: int, dim: int, window: Window) -> Tensor:
        count = window.out // size
        low, _ = window.needs(rank * count, (rank + 1) * count)
        return output.narrow(dim, rank * count - (low * window.up + self.shift), count).contiguous()


@dataclass(frozen=True, slots=True)
class Inside:
    """Keeps this rank's outputs of a function that makes one for each input, borders among them."""

    def __call__(self, output: Tensor, rank: int, size: int, dim: int, window: Window) -> Tensor:
        parts = window.parts(size)
        assert parts is not None
        return output.narrow(dim, parts[rank].from_previous, window.out // size).contiguous()


@dataclass(frozen=True, slots=True)
class Recount:
    """Makes averages over `kernel` places, padding among them, averages over those that count.

    padding: places on either side that count, of those outside of the whole (0: none does).
    """

    kernel: int
    padding: int

    def counts(self, window: Window, start: int, stop: int) -> list[int]:
        """How many places count for each of the outputs [start, stop)."""
        firsts = [y * window.down + window.first for y in range(start, stop)]
        return [min(f + self.kernel, window.size + self.padding) - max(f, -self.padding) for f in firsts]

    def __call__(self, output: Tensor, rank: int, size: int, dim: int, window: Window) -> Tensor:
        made = window.out // size
        counts = output.new_tensor(self.counts(window, rank * made, (rank + 1) * made))
        return output * (self.kernel / counts).view(-1, *(1,) * (output.dim() - dim - 1))


@dataclass(frozen=True, slots=True)
class Taps:
    """A convolution by this rank's taps along one dim of the kernel, of an input that is whole.

    convolve: without padding along `dim` of the input. window: of the whole kernel, which is `kernel` long.
    """

    convolve: Callable[..., Tensor]
    dim: int
    window: Window
    kernel: int
    dilation: int
    padding: tuple[int, ...] = ()

    def __call__(self, axis: Line, input: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        taps = self.kernel // axis.size
        first = self.window.first + axis.rank * taps * self.dilation
        length = (self.window.out - 1) * self.window.down + self.dilation * (taps - 1) + 1
        behind = first + length - self.window.size
        # Negative amounts cut off what only other taps read.
        input = F.pad(input, (0, 0) * (input.dim() - self.dim - 1) + (-first, behind))
        return self.convolve(F.pad(input, self.padding) if self.padding else input, weight, *rest, **kwargs)


@torch.compiler.disable
def extend(tensor: Tensor, axis: Line, dim: int, window: Window, fill: Fill) -> Tensor:
    """This rank's part [.., size / n, ..] with everything along `dim` that its outputs need."""
    parts = window.parts(axis.size)
    assert parts is not None, f"{window} on {axis.size} ranks"
    part = parts[axis.rank]
    return _Extend.apply(tensor, axis, dim, replace(part, before=0, behind=0) if fill == "end" else part, fill)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Line, dim: int, part: Part, fill: Fill) -> Tensor:
        ctx.axis, ctx.dim, ctx.part, ctx.fill, ctx.size = axis, dim, part, fill, tensor.shape[dim]
        last = tensor.shape[dim] - part.to_next
        wait = axis.swap(
            _run(tensor, dim, 0, part.to_previous),
            _run(tensor, dim, last, part.to_next),
            _resized(tensor, dim, part.from_previous),
            _resized(tensor, dim, part.from_next),
            tensor,
        )
        out = tensor.new_empty(_resized(tensor, dim, part.length) or ())
        before, previous, own, following, behind = out.split(_lengths(part), dim)
        own.copy_(tensor.narrow(dim, part.start, part.stop - part.start))
        for place, arrived in zip((previous, following), wait(), strict=True):
            if arrived is not None:
                place.copy_(arrived)
        if fill == "edge":
            before.copy_(out.narrow(dim, part.before, 1).expand_as(before))
            behind.copy_(out.narrow(dim, out.shape[dim] - part.behind - 1, 1).expand_as(behind))
        elif part.before or part.behind:
            before.fill_(fill), behind.fill_(fill)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dim, part = ctx.dim, ctx.part
        if ctx.fill == "edge" and (part.before or part.behind):
            gradient = gradient.clone()
            for start, count, edge in (
                (0, part.before, part.before),
                (gradient.shape[dim] - part.behind, part.behind, gradient.shape[dim] - part.behind - 1),
            ):
                gradient.narrow(dim, edge, 1).add_(gradient.narrow(dim, start, count).sum(dim, keepdim=True))
        _, previous, own, following, _ = gradient.split(_lengths(part), dim)
        wait = ctx.axis.swap(
            previous.contiguous() if part.from_previous else None,
            following.contiguous() if part.from_next else None,
            _resized(gradient, dim, part.to_previous),
            _resized(gradient, dim, part.to_next),
            gradient,
        )
        out = gradient.new_zeros(_resized(gradient, dim, ctx.size) or ())
        out.narrow(dim, part.start, part.stop - part.start).copy_(own)
        to_previous, to_next = wait()
        if to_previous is not None:
            out.narrow(dim, 0, part.to_previous).add_(to_previous)
        if to_next is not None:
            out.narrow(dim, ctx.size - part.to_next, part.to_next).add_(to_next)
        return out, None, None, None, None


def _lengths(part: Part) -> Sequence[int]:
    return [part.before, part.from_previous, part.stop - part.start, part.from_next, part.behind]


def _run(tensor: Tensor, dim: int, start: int, count: int) -> Tensor | None:
    return tensor.narrow(dim, start, count).contiguous() if count else None


def _resized(tensor: Tensor, dim: int, count: int) -> Shape | None:
    """The shape of `count` places of the tensor along `dim`; None for none."""
    return (*tensor.shape[:dim], count, *tensor.shape[dim + 1 :]) if count else None
