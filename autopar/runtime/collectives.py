"""Conversions between placements on a model axis, as differentiable functions of plain local tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..sharding.placement import Action, Placement, Split, conversion
from .axis import Arrive, Axis

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})
"""The actions that communicate."""

_Side = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is done to a tensor, and to its gradient on the way back.

    source, target: (dim, local number of blocks) of the split before and after; None: not split. in_place: whether an
    all-reduce may overwrite the tensor.
    """

    axis: Axis
    forward: Action
    backward: Action
    source: _Side
    target: _Side
    in_place: bool

    @staticmethod
    def of(
        axis: Axis, have: Placement, want: Placement, have_blocks: int = 1, want_blocks: int = 1, in_place: bool = False
    ) -> Conversion:
        """From `have` to `want`; arguments as those of `convert`."""
        actions = conversion(have, want)
        source = (have.dim, have_blocks) if isinstance(have, Split) else None
        target = (want.dim, want_blocks) if isinstance(want, Split) else None
        return Conversion(axis, actions.forward, actions.backward, source, target, in_place)

    @property
    def dual(self) -> Conversion:
        """A gradient runs the other way: from the placement wanted to the placement that was there."""
        return replace(
            self, forward=self.backward, backward=self.forward, source=self.target, target=self.source, in_place=False
        )


@torch.compiler.disable
def convert(
    tensor: Tensor,
    axis: Axis,
    have: Placement,
    want: Placement,
    have_blocks: int = 1,
    want_blocks: int = 1,
    in_place: bool = False,
) -> Tensor:
    """The value of `tensor` placed as `want`, given that it lies as `have`; backward runs the dual action.

    have_blocks, want_blocks: local counts of the splits' blocks (another axis may already have cut them).
    in_place: the caller knows that nobody else reads `tensor`, so an all-reduce may overwrite it.
    """
    made = Conversion.of(axis, have, want, have_blocks, want_blocks, in_place)
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return start(made, tensor, ahead=False)()
    return _Convert.apply(tensor, made)


def start(made: Conversion, tensor: Tensor, ahead: bool = True) -> Arrive:
    """Start the forward action of a conversion; the result waits for it. ahead: as in `Axis`."""
    action, axis = made.forward, made.axis
    match action:
        case "all_reduce":
            tensor = tensor.detach()
            if not (made.in_place and tensor.is_contiguous()):
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            return axis.start_all_reduce(tensor, ahead=ahead)
        case "all_gather":
            assert made.source
            return axis.start_all_gather(tensor, *made.source, ahead)
        case "reduce_scatter":
            assert made.target
            return axis.start_reduce_scatter(tensor, *made.target, ahead)
        case "all_to_all":
            assert made.source and made.target
            return axis.start_all_to_all(tensor, *made.source, *made.target, ahead)
    result = _local(made, tensor)
    return lambda: result


def _local(made: Conversion, tensor: Tensor) -> Tensor:
    """An action that does not communicate."""
    match made.forward:
        case "":
            return tensor
        case "mask":
            return made.axis.mask(tensor)
        case "pad":
            assert made.source
            return made.axis.pad(tensor, *made.source)
        case "slice":
            assert made.target
            return made.axis.slice(tensor, *made.target)
    raise AssertionError(made.forward)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, made: Conversion) -> Tensor:
        ctx.made = made
        out = start(made, tensor, ahead=False)()
        return out.view_as(out) if out is tensor else out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return start(ctx.made.dual, gradient, ahead=False)(), None
