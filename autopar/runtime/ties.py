"""Gradients of parameters that several stages hold (tied embeddings), summed over these stages.

The stages may lay the parameter out differently, so each sends its gradient in the layout of every other one, as
`reshard` moves any tensor; and each adds the summands in stage order, so that all copies stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .ownership import Ownership
from .reshard import reshard


@torch.no_grad()
def sum_tied(
    gradients: dict[str, Tensor],
    tied: Mapping[str, Ownership],
    dtypes: Mapping[str, torch.dtype],
    rank: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Replace this rank's gradients of tied parameters by the sums over the stages; returns the bytes it received.

    gradients: local gradients at rest, reduced inside the stage. tied: the trainable parameters of the whole plan that
    have more than one holder, alike on every rank. Every rank of a stage that holds one calls this once per step.
    A stage whose uses gave no gradient counts as zeros.
    """
    parts: dict[str, Tensor] = {}
    old: dict[str, Ownership] = {}
    new: dict[str, Ownership] = {}
    kinds: dict[str, torch.dtype] = {}
    for fqn, ownership in tied.items():
        for index, holder in enumerate(ownership.holders):
            key = f"{fqn}#{index}"
            old[key] = Ownership(ownership.shape, (holder,))
            new[key] = Ownership(ownership.shape, tuple(h for h in ownership.holders if h is not holder))
            kinds[key] = dtypes[fqn]
            if rank in holder.ranks:
                if fqn not in gradients:
                    gradients[fqn] = torch.zeros(ownership.local_shape(rank), dtype=dtypes[fqn], device=device)
                parts[key] = gradients[fqn]
    received = reshard(parts, old, new, kinds, rank, device, group)
    for fqn, ownership in tied.items():
        if fqn in gradients:
            summands = [parts.get(key, received.get(key)) for key in _keys(fqn, ownership)]
            total = summands[0].to(device, copy=True)
            for summand in summands[1:]:
                total += summand.to(device)
            # The gradient may be a view of a bucket, whose memory stays in place.
            gradients[fqn].copy_(total)
    return sum(t.numel() * t.element_size() for t in received.values())


def _keys(fqn: str, ownership: Ownership) -> list[str]:
    return [f"{fqn}#{index}" for index in range(len(ownership.holders))]
