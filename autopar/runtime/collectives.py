"""Conversions between placements on a model axis, as differentiable functions of plain local tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sharding.placement import Action, Placement, Split, conversion
from .axis import Axis

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})
"""The actions that communicate."""


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
    actions = conversion(have, want)
    source = (have.dim, have_blocks) if isinstance(have, Split) else None
    target = (want.dim, want_blocks) if isinstance(want, Split) else None
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return _act(actions.forward, tensor, axis, source, target, in_place)
    return _Convert.apply(tensor, axis, actions.forward, actions.backward, source, target, in_place)


_Side = tuple[int, int] | None


def _act(action: Action, tensor: Tensor, axis: Axis, source: _Side, target: _Side, in_place: bool) -> Tensor:
    """One action from a tensor split as `source` to one split as `target` (None: not split)."""
    match action:
        case "":
            return tensor
        case "all_reduce":
            if in_place and tensor.is_contiguous():
                return axis.all_reduce(tensor.detach())
            return axis.all_reduce(tensor.detach().clone(memory_format=torch.contiguous_format))
        case "mask":
            return axis.mask(tensor)
    if action == "all_to_all":
        assert source and target
        return axis.all_to_all(tensor, *source, *target)
    side = source if action in ("all_gather", "pad") else target
    assert side
    return getattr(axis, action)(tensor, *side)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        axis: Axis,
        forward: Action,
        backward: Action,
        source: _Side,
        target: _Side,
        in_place: bool,
    ) -> Tensor:
        ctx.axis, ctx.backward_action, ctx.source, ctx.target = axis, backward, source, target
        out = _act(forward, tensor, axis, source, target, in_place)
        return out.view_as(out) if out is tensor else out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient runs the other way: from the placement wanted to the placement that was there.
        out = _act(ctx.backward_action, gradient, ctx.axis, ctx.target, ctx.source, False)
        return out, None, None, None, None, None, None
