"""Ring attention: queries, keys and values split along the sequence on one axis (Liu, Zaharia and Abbeel 2023, Ring
Attention with Blockwise Transformers; the backward as in FlashAttention, Dao et al. 2022, algorithm 4).

Each rank keeps its rows of queries. Keys and values travel around the axis, one block at a time, and the softmax over
all keys is built up block by block from the blocks' log-sum-exps. In the backward they travel once more, and the sums of
their gradients with them, one step behind. A block that causality masks out is passed on without being computed, and
what travels does so while a block is computed.

    q rows of queries here, k rows of keys in a block, h heads, g key-value heads (a divisor of h), d, e head sizes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..torch_private import flash_attention, flash_attention_backward, has_flash_attention


class Ring(Protocol):
    """An axis whose ranks pass tensors on."""

    rank: int
    size: int

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start sending to the next rank what the one before sends here alike; the result waits for that."""


def ring_attention(
    axis: Ring,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of this rank's queries [.., h, q, d] to all ranks' keys [.., g, k, d] and values [.., g, k, e].

    attn_mask: this rank's rows (where it has rows), all columns. Its gradient is not computed.
    """
    assert dropout_p == 0.0
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _RingAttention.apply(query, key, value, attn_mask, axis, is_causal, scale)


@dataclass(frozen=True)
class _Blocks:
    """Which part of the scores a rank computes with the keys of each source rank."""

    rank: int
    size: int
    is_causal: bool
    mask: Tensor | None

    def source(self, step: int) -> int:
        return (self.rank - step) % self.size

    def of(self, source: int, query: Tensor, key: Tensor) -> tuple[bool, bool, Tensor | None]:
        """(whether there is anything to compute, whether the block is causal in itself, its additive mask)."""
        rows, columns = query.shape[-2], key.shape[-2]
        if self.is_causal:
            if source * columns > self.rank * rows + rows - 1:
                return False, False, None
            if rows == columns:
                return True, source == self.rank, None
            row = torch.arange(rows, device=query.device)[:, None] + self.rank * rows
            column = torch.arange(columns, device=query.device) + source * columns
            hidden = torch.zeros(rows, columns, dtype=query.dtype, device=query.device)
            return True, False, hidden.masked_fill_(column > row, -math.inf)
        if self.mask is None or self.mask.shape[-1] == 1:
            return True, False, self.mask
        return True, False, self.mask.narrow(-1, source * columns, columns)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        axis: Ring,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        blocks = _Blocks(axis.rank, axis.size, is_causal, mask)
        wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
        largest = query.new_full((*query.shape[:-1], 1), -math.inf, dtype=wide)
        total = torch.zeros_like(largest)
        # Rows outside heads in memory, as fused attention has it: joining the heads again is then a view.
        *outer, heads, rows, _ = query.shape
        out = query.new_zeros((*outer, rows, heads, value.shape[-1]), dtype=wide).transpose(-2, -3)
        here = [key.contiguous(), value.contiguous()]
        for step in range(axis.size):
            arriving = axis.pass_on(here) if step < axis.size - 1 else None
            wanted, causal, part = blocks.of(blocks.source(step), query, here[0])
            if wanted:
                found, lse = _forward(query, *here, part, causal, scale)
                # The sum of exponentials is kept apart from the largest: rows that a mask of large negative numbers
                # hides in every block keep equal weights so.
                higher = torch.maximum(largest, lse)
                safe = higher.masked_fill(higher == -math.inf, 0.0)
                old, new = (largest - safe).exp(), (lse - safe).exp()
                # `found` is not written into: selective recomputation has kept what the kernel returned.
                out = out.mul_(old).add_(found.to(wide) * new)
                total = total.mul_(old).add_(new)
                largest = higher
            if arriving is not None:
                here = arriving()
        out.div_(total.masked_fill(total == 0, 1.0))
        lse = (largest + total.log()).squeeze(-1)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, out, lse.masked_fill_(lse == -math.inf, 0.0))
        ctx.axis, ctx.is_causal, ctx.scale = axis, is_causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse = ctx.saved_tensors
        axis: Ring = ctx.axis
        blocks = _Blocks(axis.rank, axis.size, ctx.is_causal, mask)
        of_query = torch.zeros_like(query)
        here = [key.contiguous(), value.contiguous()]
        sums: Callable[[], list[Tensor]] | None = None
        for step in range(axis.size):
            arriving = axis.pass_on(here) if step < axis.size - 1 else None
            wanted, causal, part = blocks.of(blocks.source(step), query, here[0])
            found = [torch.zeros_like(t) for t in here]
            if wanted:
                more, *found = _backward(gradient, query, *here, out, lse, part, causal, ctx.scale)
                of_query += more
            if sums is not None:
                found = [a + b for a, b in zip(sums(), found, strict=True)]
            sums = axis.pass_on([t.contiguous() for t in found])
            if arriving is not None:
                here = arriving()
        assert sums is not None
        # The last to add to the sums of a block is the rank before the block's own.
        return of_query, *sums(), None, None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [.., h, q, e], log-sum-exp [.., h, q, 1] of the scores) of one block; -inf where a row is hidden."""
    key, value = _repeated(key, query), _repeated(value, query)
    if has_flash_attention(query, key, value):
        out, lse = flash_attention(query, key, value, mask, causal, scale)
        lse = lse.unsqueeze(-1)
        if mask is not None:
            lse = lse.masked_fill((mask == -math.inf).all(-1, keepdim=True), -math.inf)
        return out, lse
    scores = _scores(query, key, mask, causal, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    return weights.to(value.dtype) @ value, lse


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from one block, given output and log-sum-exp [.., h, q] over all blocks."""
    heads = key.shape[-3] if key.dim() > 3 else 1
    key, value = _repeated(key, query), _repeated(value, query)
    if has_flash_attention(query, key, value):
        found = flash_attention_backward(gradient, query, key, value, out, lse, mask, causal, scale)
    else:
        weights = (_scores(query, key, mask, causal, scale) - lse.unsqueeze(-1)).exp()
        wide = gradient.to(weights.dtype)
        pulls = wide @ value.to(weights.dtype).mT - (wide * out).sum(-1, keepdim=True)
        of_scores = weights * pulls * scale
        found = (
            (of_scores @ key.to(weights.dtype)).to(query.dtype),
            (of_scores.mT @ query.to(weights.dtype)).to(key.dtype),
            (weights.mT @ wide).to(value.dtype),
        )
    of_query, of_key, of_value = found
    if key.dim() > 3 and heads != query.shape[-3]:
        of_key, of_value = (t.unflatten(-3, (heads, -1)).sum(-3) for t in (of_key, of_value))
    return of_query, of_key, of_value


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    scores = (query.to(wide) @ key.to(wide).mT) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Key-value heads, each as often as query heads share it."""
    if tensor.dim() < 4 or tensor.shape[-3] == query.shape[-3]:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)
