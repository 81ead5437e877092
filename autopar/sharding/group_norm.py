"""Group and instance norm of tensors whose space is split: statistics over places that several ranks have.

Wu and He 2018, "Group normalization", equations 2 and 3; first the mean, then the squares of what differs from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .algorithms import Axis


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """group_norm, of `num_axes` axes that split places; takes the op's own arguments behind them."""

    num_axes: int

    def __call__(self, *given: Any, **kwargs: Any) -> Tensor:
        return _group_norm(given[: self.num_axes], *given[self.num_axes :], **kwargs)


@dataclass(frozen=True, slots=True)
class InstanceNorm:
    """instance_norm without running statistics: each channel is a group."""

    num_axes: int

    def __call__(self, *given: Any) -> Tensor:
        input, weight, bias, mean, variance, _, _, eps, *_ = given[self.num_axes :]
        assert mean is None and variance is None
        return _group_norm(given[: self.num_axes], input, input.shape[1], weight, bias, eps)


def _group_norm(
    axes: Sequence[Axis],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """input [b, (g c), *part of space], weight and bias [(g c)] -> the same as input."""
    values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    groups = values.reshape(input.shape[0], num_groups, -1)
    count = groups.shape[2] * math.prod(axis.size for axis in axes)
    centred = groups - _total(axes, groups.sum(2, keepdim=True)) / count
    variance = _total(axes, centred.square().sum(2, keepdim=True)) / count
    output = (centred * (variance + eps).rsqrt()).view(input.shape)
    shape = (1, -1, *(1,) * (input.dim() - 2))
    output = output if weight is None else output * weight.view(shape)
    return (output if bias is None else output + bias.view(shape)).to(input.dtype)


def _total(axes: Sequence[Axis], tensor: Tensor) -> Tensor:
    for axis in axes:
        tensor = _Total.apply(tensor, axis)
    return tensor


class _Total(torch.autograd.Function):
    """The sum over an axis, of which each rank makes its own use: their gradients are summands."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_reduce(gradient.clone(memory_format=torch.contiguous_format)), None
