"""Local algorithms of `autopar.routed_rows`: experts on a part of the ranks, with and without an exchange of rows.

No capacity: every row is treated, however many a group gets, none or all of them.

    N tokens here, K groups chosen by each, S = N K rows, E groups over all ranks, L = E / n of them here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..routed import counts_of, treat


class Exchange(Protocol):
    """An axis whose ranks send rows to each other."""

    rank: int
    size: int

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """`rows` begins with sent[0] rows for rank 0, and so on; the rows from all ranks in order, received[r] from r."""


def own_groups(
    axis: Exchange,
    tokens: Tensor,
    groups: Tensor,
    operands: Sequence[Tensor],
    weights: Sequence[Tensor],
    shared_weights: Sequence[Tensor],
    body: Any,
    repeat: int,
    num_groups: int,
) -> Tensor:
    """The rows of this rank's groups, and zeros in the place of all others; weights [L, ..]."""
    count = num_groups // axis.size
    local = groups - axis.rank * count
    counts = counts_of(local, count)
    elsewhere = (local < 0) | (local >= count)
    picked = local.masked_fill(elsewhere, count).argsort()[: int(counts.sum())]
    rows = treat(
        body,
        tokens[picked // repeat],
        local[picked],
        counts.cumsum(0).to(torch.int32),
        [t[picked] for t in operands],
        weights,
        shared_weights,
    )
    return rows.new_zeros((len(groups), *rows.shape[1:])).index_copy(0, picked, rows)


def exchanged_groups(
    axis: Exchange,
    tokens: Tensor,
    groups: Tensor,
    operands: Sequence[Tensor],
    weights: Sequence[Tensor],
    shared_weights: Sequence[Tensor],
    body: Any,
    repeat: int,
    num_groups: int,
) -> Tensor:
    """All rows of this rank's tokens, each treated on the rank of its group; weights [L, ..].

    The counts of rows travel first: one exchange of E numbers, and a wait for them.
    """
    count = num_groups // axis.size
    order = groups.argsort()
    counts = counts_of(groups, num_groups)
    arriving = axis.exchange(counts, [count] * axis.size, [count] * axis.size).view(axis.size, count)
    sent, received = counts.view(axis.size, count).sum(1).tolist(), arriving.sum(1).tolist()

    def there(tensor: Tensor) -> Tensor:
        return _Exchanged.apply(tensor, axis, sent, received)

    # From each rank rows come sorted by group; together they must be.
    of_group = torch.arange(count, device=groups.device).repeat(axis.size)
    arrived = of_group.repeat_interleave(arriving.flatten(), output_size=sum(received))
    sorting = arrived.argsort()
    rows = treat(
        body,
        there(tokens[order // repeat])[sorting],
        arrived[sorting],
        arriving.sum(0).cumsum(0).to(torch.int32),
        [there(t[order])[sorting] for t in operands],
        weights,
        shared_weights,
    )
    back = _Exchanged.apply(rows[sorting.argsort()], axis, received, sent)
    return back[order.argsort()]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Exchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return axis.exchange(rows.contiguous(), sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.exchange(gradient.contiguous(), ctx.received, ctx.sent), None, None, None
