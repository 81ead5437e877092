"""Tensors moved from one layout to another, in memory: each rank receives exactly the boxes that it lacks.

For every tensor and every rank of the new layout, the ranks of the old layout that together hold the tensor once are
chosen, replicas by nearness; the boxes that both sides hold are what travels. Nobody ever holds a whole tensor that its
layout does not give it. Tensors go in batches of bounded size, one message per pair of ranks and batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .ownership import Overlap, Ownership, overlaps

BATCH_BYTES = 256 * 2**20
_ALIGNMENT_BYTES = 16  # of every box inside a message, so that it can be seen as its own dtype


@dataclass(frozen=True)
class Moves:
    """What one rank does for one tensor. In every Overlap `mine` is the receiver's side and `theirs` the sender's.

    kept: its old part is its new part, bit for bit. copies: boxes of its own. sends, receives: boxes by peer.
    """

    kept: bool
    copies: tuple[Overlap, ...]
    sends: Mapping[int, tuple[Overlap, ...]]
    receives: Mapping[int, tuple[Overlap, ...]]


def sources(old: Ownership, rank: int) -> tuple[int, ...]:
    """Ranks that together hold the tensor exactly once: `rank` itself where it helps, else the nearest by number.

    Neighbouring numbers share a host, and different receivers spread over different replicas.
    """

    def distance(candidate: int) -> tuple[int, int]:
        return abs(candidate - rank), candidate

    holder = min(old.holders, key=lambda h: min(distance(r) for r in h.ranks))
    nearest: dict[tuple[int, ...], int] = {}
    for candidate in sorted(holder.ranks, key=distance):
        places = holder.model_coordinates(candidate)
        part = (holder.shard(candidate) if old.shape else 0, *(places[axis] for axis, _ in holder.splits))
        nearest.setdefault(part, candidate)
    return tuple(sorted(nearest.values()))


def moves(old: Ownership, new: Ownership, rank: int) -> Moves:
    """What `rank` keeps, copies, sends and receives to bring one tensor from `old` to `new`."""
    assert old.shape == new.shape, (old.shape, new.shape)
    segments = {r: old.segments(r) for r in old.ranks}
    sends: dict[int, tuple[Overlap, ...]] = {}
    if rank in segments:
        for receiver in new.ranks:
            if receiver != rank and rank in sources(old, receiver):
                boxes = tuple(overlaps(new.segments(receiver), segments[rank]))
                if boxes:
                    sends[receiver] = boxes
    if rank not in new.ranks:
        return Moves(False, (), sends, {})
    wanted = new.segments(rank)
    if segments.get(rank) == wanted:
        return Moves(True, (), sends, {})
    found = {sender: tuple(overlaps(wanted, segments[sender])) for sender in sources(old, rank)}
    copies = found.pop(rank, ())
    return Moves(False, copies, sends, {sender: boxes for sender, boxes in found.items() if boxes})


@torch.no_grad()
def reshard(
    tensors: Mapping[str, Tensor],
    old: Mapping[str, Ownership],
    new: Mapping[str, Ownership],
    dtypes: Mapping[str, torch.dtype],
    rank: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> dict[str, Tensor]:
    """This rank's parts under `new`, given its parts `tensors` under `old` (global rank numbers in both).

    All ranks that hold something before or after call it with equal `old`, `new` (in equal order) and `dtypes`. Parts
    that do not change are returned as they are, not copied. On NCCL, `group` must have been used before.
    """
    plans: dict[tuple[Ownership, Ownership], Moves] = {}
    results: dict[str, Tensor] = {}
    for batch in _batches(new, dtypes, batch_bytes):
        jobs = []
        for name in batch:
            pair = (old[name], new[name])
            if pair not in plans:
                plans[pair] = moves(*pair, rank)
            job = plans[pair]
            if job.kept:
                results[name] = tensors[name]
            elif rank in new[name].ranks:
                results[name] = torch.empty(new[name].local_shape(rank), dtype=dtypes[name], device=device)
                for box in job.copies:
                    _box(results[name], box.mine, box).copy_(_box(tensors[name], box.theirs, box))
            jobs.append((name, job))
        _exchange(jobs, tensors, results, dtypes, device, group)
    return results


def _batches(new: Mapping[str, Ownership], dtypes: Mapping[str, torch.dtype], batch_bytes: int) -> list[list[str]]:
    """Names cut by their global sizes, hence alike on all ranks."""
    batches: list[list[str]] = [[]]
    filled_bytes = 0
    for name, ownership in new.items():
        size_bytes = torch.Size(ownership.shape).numel() * dtypes[name].itemsize
        if batches[-1] and filled_bytes + size_bytes > batch_bytes:
            batches.append([])
            filled_bytes = 0
        batches[-1].append(name)
        filled_bytes += size_bytes
    return batches


def _exchange(
    jobs: Sequence[tuple[str, Moves]],
    tensors: Mapping[str, Tensor],
    results: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> None:
    """One batch: pack, send and receive one message per peer, unpack. Both sides walk names and boxes in one order."""
    outgoing = _messages([(name, job.sends) for name, job in jobs], dtypes, device)
    incoming = _messages([(name, job.receives) for name, job in jobs], dtypes, device)
    for _, pieces in outgoing.values():
        for name, box, view in pieces:
            view.copy_(_box(tensors[name], box.theirs, box))
    operations = []
    for peer in sorted({*outgoing, *incoming}):
        if peer in outgoing:
            operations.append(dist.P2POp(dist.isend, outgoing[peer][0], peer, group))
        if peer in incoming:
            operations.append(dist.P2POp(dist.irecv, incoming[peer][0], peer, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    for _, pieces in incoming.values():
        for name, box, view in pieces:
            _box(results[name], box.mine, box).copy_(view)


_Message = tuple[Tensor, list[tuple[str, Overlap, Tensor]]]


def _messages(
    parts: Sequence[tuple[str, Mapping[int, tuple[Overlap, ...]]]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[int, _Message]:
    """Per peer, a byte buffer and the views of the boxes inside it."""
    lists: dict[int, list[tuple[str, Overlap, int, int]]] = {}
    lengths: dict[int, int] = {}
    for name, by_peer in parts:
        for peer, boxes in by_peer.items():
            for box in boxes:
                start = lengths.get(peer, 0)
                stop = start + box.numel * dtypes[name].itemsize
                lists.setdefault(peer, []).append((name, box, start, stop))
                lengths[peer] = -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    messages: dict[int, _Message] = {}
    for peer, pieces in lists.items():
        buffer = torch.empty(lengths[peer], dtype=torch.uint8, device=device)
        views = [(name, box, buffer[start:stop].view(dtypes[name]).view(box.size)) for name, box, start, stop in pieces]
        messages[peer] = (buffer, views)
    return messages


def _box(tensor: Tensor, starts: tuple[int, ...], box: Overlap) -> Tensor:
    for dim, (start, length) in enumerate(zip(starts, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
