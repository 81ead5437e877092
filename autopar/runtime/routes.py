"""The messages of one hand-over between two stages: which pieces of which tensors each rank sends and receives.

Planned once per pair of stages and direction. A piece that lies in one run of memory on both sides travels from and to
that memory; what does not, and what is small, is packed, into one message per peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Shape
from .boundary import Handover
from .ownership import Overlap

# Below this a copy into a common message costs less than a message of its own (some 20 us on gloo).
SMALL_BYTES = 16 * 1024
_ALIGNMENT_BYTES = 16  # of every piece inside a message, so that it can be seen as its own dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one of the tensors, in local coordinates of the side that the route belongs to.

    start_byte: of the piece in a packed message.
    """

    tensor: int
    starts: tuple[int, ...]
    size: Shape
    start_byte: int = 0

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        found = tensors[self.tensor]
        for dim, (start, length) in enumerate(zip(self.starts, self.size, strict=True)):
            if length != found.shape[dim]:
                found = found.narrow(dim, start, length)
        return found


@dataclass(frozen=True, slots=True)
class Message:
    """What goes to or comes from one peer at once. num_bytes: 0 where the one piece travels without being packed."""

    peer: int
    pieces: tuple[Piece, ...]
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """One rank's side of a hand-over.

    outputs: shape, dtype of each tensor that the rank gets, none on a sender. sums: which of them begin as zeros, and
    add up what arrives.
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    outputs: tuple[tuple[Shape, torch.dtype], ...]
    sums: frozenset[int]


def route(handovers: Sequence[Handover], dtypes: Sequence[torch.dtype], rank: int) -> Route:
    """What `rank` does to hand over tensors of these dtypes, all between the same two meshes."""
    if not handovers:
        return Route((), (), (), frozenset())
    sender, receiver = handovers[0].sender, handovers[0].receiver
    sends: list[Message] = []
    receives: list[Message] = []
    if rank in sender.ranks:
        for taker in receiver.ranks:
            sends += _messages(handovers, dtypes, rank, taker, sending=True)
    if rank not in receiver.ranks:
        return Route(tuple(sends), (), (), frozenset())
    for source in sorted({source for h in handovers for source in h.sources(rank)}):
        receives += _messages(handovers, dtypes, source, rank, sending=False)
    shapes = [h.receiver.local_shape(rank) for h in handovers]
    return Route(
        tuple(sends),
        tuple(receives),
        tuple(zip(shapes, dtypes, strict=True)),
        frozenset(i for i, h in enumerate(handovers) if h.adds(rank)),
    )


def _messages(
    handovers: Sequence[Handover], dtypes: Sequence[torch.dtype], source: int, taker: int, sending: bool
) -> list[Message]:
    """The messages between two ranks, in an order that both compute alike, with pieces of the one side or the other."""
    boxes = [(i, box) for i, handover in enumerate(handovers) for box in handover.boxes(source, taker)]
    peer = taker if sending else source
    found: list[Message] = []
    packed: list[Piece] = []
    num_bytes = 0
    for i, box in boxes:
        starts = box.theirs if sending else box.mine
        large = len(boxes) == 1 or box.numel * dtypes[i].itemsize >= SMALL_BYTES
        if large and _is_direct(handovers[i], box, source, taker):
            found.append(Message(peer, (Piece(i, starts, box.size),)))
            continue
        start = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        packed.append(Piece(i, starts, box.size, start))
        num_bytes = start + box.numel * dtypes[i].itemsize
    if packed:
        found.append(Message(peer, tuple(packed), num_bytes))
    return found


def _is_direct(handover: Handover, box: Overlap, source: int, taker: int) -> bool:
    """Whether the box lies in one run of memory on both sides, and is all that its place receives."""
    shapes = handover.sender.local_shape(source), handover.receiver.local_shape(taker)
    return all(_in_one_run(box.size, shape) for shape in shapes) and not handover.adds(taker)


def _in_one_run(size: Shape, shape: Shape) -> bool:
    """Whether a box of this size lies contiguously in a contiguous tensor."""
    cut = next((dim for dim, length in enumerate(size) if length != 1), len(size))
    return all(a == b for a, b in zip(size[cut + 1 :], shape[cut + 1 :], strict=True))
