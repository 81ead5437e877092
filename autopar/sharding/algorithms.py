"""Local algorithms of ops whose split form is not the op itself on smaller tensors.

Those that take an axis take it first, then the op's own arguments at their own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(Protocol):
    """Where a rank stands on an axis, and reductions over it (which autograd does not see)."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """A mean over this rank's elements, times their share of all elements: the parts then add up to the mean."""

    function: Callable[..., Tensor]
    share: float

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs) * self.share


@dataclass(frozen=True, slots=True)
class ArangeRows:
    """This rank's part of an arange; strides: elements between neighbouring ranks, by axis.

    length: how many neighbouring parts of the first axis it has, of which a second axis cuts each.
    """

    strides: tuple[int, ...]
    length: int = 1

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        axes, (start, step, count) = args[: len(self.strides)], args[len(self.strides) :]
        first = sum(axis.rank * stride for axis, stride in zip(axes, self.strides, strict=True))
        rows = torch.arange(first, first + count // self.length, **kwargs)
        if self.length > 1:
            rows = (torch.arange(self.length, **kwargs).unsqueeze(1) * self.strides[0] + rows).flatten()
        return rows * step + start


def inverse_order(_: Axis, tensor: Tensor, numbers: Any, *__: Any, **___: Any) -> Tensor:
    """The permutation that undoes `numbers`, those of this chunk's rows; stands for tensor[numbers] = arange."""
    (order,) = numbers if isinstance(numbers, tuple | list) else (numbers,)
    inverse = torch.empty_like(tensor)
    inverse[order] = torch.arange(len(order), dtype=tensor.dtype, device=tensor.device)
    return inverse


@dataclass(frozen=True, slots=True)
class IndexRows:
    """self[.., rows, ..] where `rows` counts the rows of dim `dim` and both are split alike: numbers become local.

    strides, length: as in `ArangeRows`.
    """

    dim: int
    strides: tuple[int, ...]
    length: int = 1

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        axes, (tensor, indices) = args[: len(self.strides)], args[len(self.strides) :]
        first = sum(axis.rank * stride for axis, stride in zip(axes, self.strides, strict=True))
        local = list(indices)
        numbers = local[self.dim] - first
        if self.length > 1:
            numbers = numbers // self.strides[0] * self.strides[-1] + numbers % self.strides[0]
        local[self.dim] = numbers
        return torch.ops.aten.index.Tensor(tensor, local)


def causal_rows(
    axis: Axis,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention of this rank's rows of queries [.., q / n, d] to all keys [.., k, d] up to their own place."""
    assert is_causal and attn_mask is None
    rows = query.shape[-2]
    first = axis.rank * rows
    seen = min(first + rows, key.shape[-2])
    mask = torch.ones(rows, seen, dtype=torch.bool, device=query.device).tril(first)
    return F.scaled_dot_product_attention(
        query, key[..., :seen, :], value[..., :seen, :], mask, dropout_p, scale=scale, enable_gqa=enable_gqa
    )


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """batch_norm of a part of each channel (rows of the batch, places), of some channels, or of both.

    inside: for each axis, whether it cuts channels' insides, over which statistics run, and not the channels.

    Running statistics come whole and are whole again afterwards. In evaluation nothing is communicated.
    """

    inside: tuple[bool, ...]

    def __call__(self, *given: Any) -> Tensor:
        axes, (input, weight, bias, mean, variance, training, momentum, eps, *_) = (
            given[: len(self.inside)],
            given[len(self.inside) :],
        )
        over_rows = [axis for axis, inside in zip(axes, self.inside, strict=True) if inside]
        over_channels = next((axis for axis, inside in zip(axes, self.inside, strict=True) if not inside), None)
        statistics = [mean, variance]
        if over_channels is not None and mean is not None:
            size = mean.shape[0] // over_channels.size
            # copies, because autograd keeps them and the whole is written below
            statistics = [s.narrow(0, over_channels.rank * size, size).clone() for s in statistics]
        if not training or not over_rows:
            output = F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
        else:
            output, batch_mean, batch_variance, count = _BatchNormRows.apply(input, weight, bias, over_rows, eps)
            if mean is not None:
                with torch.no_grad():
                    statistics[0].lerp_(batch_mean.to(mean.dtype), momentum)
                    statistics[1].lerp_((batch_variance * (count / (count - 1))).to(mean.dtype), momentum)
        if training and over_channels is not None and mean is not None:
            with torch.no_grad():
                for whole, own in zip((mean, variance), statistics, strict=True):
                    padded = torch.zeros_like(whole)
                    padded.narrow(0, over_channels.rank * own.shape[0], own.shape[0]).copy_(own)
                    whole.copy_(over_channels.all_reduce(padded))
        return output


def _all_reduce(axes: Sequence[Axis], tensor: Tensor) -> Tensor:
    """The sum over the ranks of all these axes."""
    for axis in axes:
        tensor = axis.all_reduce(tensor)
    return tensor


class _BatchNormRows(torch.autograd.Function):
    """Normalises [n, c, ..] by mean and variance over all but channels, on all ranks (Ioffe and Szegedy 2015, algorithm 1).

    Gives the output, mean and biased variance [c], and the number of elements per channel []. Gradients of weight and bias
    are this rank's summands.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Sequence[Axis], eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [i for i in range(input.dim()) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(input.dim())]
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = _all_reduce(axes, torch.cat([values.sum(dims), count]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean.view(shape)
        variance = _all_reduce(axes, centred.square().sum(dims)) / count
        inverse = (variance + eps).rsqrt()
        normal = centred * inverse.view(shape)
        output = normal if weight is None else normal * weight.view(shape)
        output = output if bias is None else output + bias.view(shape)
        ctx.save_for_backward(normal, inverse, weight, count)
        ctx.axes, ctx.dims, ctx.shape, ctx.has_bias = axes, dims, shape, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normal, inverse, weight, count = ctx.saved_tensors
        given = gradient.to(normal.dtype)
        to_bias, to_weight = given.sum(ctx.dims), (given * normal).sum(ctx.dims)
        of_all = _all_reduce(ctx.axes, torch.cat([to_bias, to_weight])) / count
        shift, scale = (part.view(ctx.shape) for part in of_all.chunk(2))
        to_input = (given - shift - normal * scale) * inverse.view(ctx.shape)
        if weight is not None:
            to_input = to_input * weight.view(ctx.shape)
        return (
            to_input.to(gradient.dtype),
            to_weight.to(weight.dtype) if weight is not None else None,
            to_bias if ctx.has_bias else None,
            None,
            None,
        )


def vocab_embedding(
    axis: Axis,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of this rank's part of the table [v / n, h]; zeros for indices that other ranks hold (Megatron-LM, 2019)."""
    assert not scale_grad_by_freq and not sparse
    rows = weight.shape[0]
    local = indices - axis.rank * rows
    elsewhere = (local < 0) | (local >= rows)
    padding = padding_idx - axis.rank * rows if padding_idx >= 0 else -1
    found = torch.ops.aten.embedding.default(
        weight, local.masked_fill(elsewhere, 0), padding if 0 <= padding < rows else -1
    )
    return found.masked_fill(elsewhere.unsqueeze(-1), 0)


def vocab_cross_entropy(
    axis: Axis,
    logits: Tensor,
    target: Tensor,
    weight: None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Summed cross entropy of logits whose classes are split, [n, v / n, ..] with class numbers [n, ..] -> [].

    The loss of a row is log sum exp z - (1 - e) z[target] - e / v sum z, with smoothing e. The sums over classes are
    all-reduced, after the maximum; the gradient, softmax minus the smoothed target, is local. Half-precision logits
    give a float32 loss.
    """
    assert weight is None
    return _VocabCrossEntropy.apply(logits, target, axis, ignore_index, label_smoothing)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, axis: Axis, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        dim = 0 if logits.dim() == 1 else 1
        size = logits.shape[dim]
        classes = size * axis.size
        scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        largest = axis.all_reduce(scores.amax(dim, keepdim=True), "max")
        exponentials = (scores - largest).exp_()
        local = target.unsqueeze(dim) - axis.rank * size
        elsewhere = (local < 0) | (local >= size)
        local = local.masked_fill(elsewhere, 0)
        at_target = (scores.gather(dim, local) - largest).masked_fill_(elsewhere, 0)
        sums = [exponentials.sum(dim, keepdim=True), at_target]
        if label_smoothing:
            sums.append((scores - largest).sum(dim, keepdim=True))
        total, at_target, *shifted = axis.all_reduce(torch.stack(sums)).unbind()
        loss = total.log() - (1 - label_smoothing) * at_target
        if label_smoothing:
            loss -= label_smoothing / classes * shifted[0]
        ignored = (target == ignore_index).unsqueeze(dim)
        loss = loss.masked_fill(ignored, 0).sum()
        exponentials /= total
        ctx.save_for_backward(exponentials, local, elsewhere, ignored)
        ctx.dim, ctx.classes, ctx.label_smoothing, ctx.dtype = dim, classes, label_smoothing, logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax, local, elsewhere, ignored = ctx.saved_tensors
        weight = (1 - ctx.label_smoothing) * (~elsewhere).to(softmax.dtype)
        out = softmax - ctx.label_smoothing / ctx.classes if ctx.label_smoothing else softmax.clone()
        out.scatter_add_(ctx.dim, local, -weight)
        out.mul_(gradient).masked_fill_(ignored, 0)
        return out.to(ctx.dtype), None, None, None, None
