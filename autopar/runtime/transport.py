"""Activations and gradients between neighbouring stages, point to point, along planned routes.

Sends are started and left behind, and let go of once they are known to have arrived; a receive is posted ahead of its use,
so that the bytes travel while the stage computes: one receive of its kind ahead, or on NCCL as schedule/posting.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..schedule.instructions import (
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from ..schedule.posting import Postings
from .axis import Transfer
from .groups import Groups
from .routes import Message, Piece, Route

Receive = ReceiveActivation | ReceiveGradient
Send = SendActivation | SendGradient
Way = tuple[int, int]
"""(sending stage, receiving stage): activations go to the next stage, gradients to the one before."""
_Operation = tuple[Callable[..., dist.Work | None], Tensor, int, dist.ProcessGroup]
"""dist.isend or dist.irecv, buffer, peer, group."""


@dataclass(eq=False)
class _Arriving:
    """A receive under way: its outputs, and the messages that are still to be unpacked into them."""

    outputs: list[Tensor]
    packed: list[tuple[Message, Tensor]]
    works: list[dist.Work]
    arrived: Callable[[], None]


@dataclass(eq=False)
class _Leaving:
    """Sends under way, and their buffers."""

    works: list[dist.Work]
    buffers: list[Tensor]
    arrived: Callable[[], None]

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        self.arrived()


@dataclass(eq=False)
class Transport:
    """routes: this rank's side of every hand-over that it takes part in. delivered(receive): the sends that have arrived when
    this receive has (schedule/delivered.py). on_transfer(token, bytes): hears of what begins to travel, and gives what to
    call when it has arrived."""

    groups: Groups
    device: torch.device
    routes: Mapping[Way, Route]
    delivered: Callable[[Receive], Iterable[Instruction]] = lambda receive: ()
    on_transfer: Transfer = lambda token, size_bytes: lambda: None
    _sends: dict[Instruction, _Leaving] = field(default_factory=dict)
    _posted: dict[Receive, _Arriving] = field(default_factory=dict)
    _ahead: dict[type, Iterator[Receive]] = field(default_factory=dict)
    _postings: Postings | None = None

    def connect(self) -> None:
        """Have the backend set up connections; all ranks of the world call it, before anything else.

        NCCL makes a group's communicator at its first use, and then wants all of its ranks there. It connects a pair at
        their first message, and the host waits for the other side: two ranks that first post a receive from each other
        would wait for good. So a byte goes over every pair, boundary by boundary in one order on all ranks.
        """
        if self.device.type != "cuda":
            return
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        dist.all_reduce(byte)  # over this group some ranks alone will exchange gradients of tied parameters
        for way in sorted(self.groups.boundaries, key=lambda way: (min(way), way)):
            group, route = self.groups.boundaries[way], self.routes[way]
            dist.all_reduce(byte, group=group)
            operations: list[_Operation] = [(dist.isend, byte, message.peer, group) for message in route.sends]
            operations += [(dist.irecv, torch.empty_like(byte), message.peer, group) for message in route.receives]
            for work in _started(operations, self.device):
                work.wait()

    def begin(self, actions: Sequence[Instruction], postings: Postings | None = None) -> None:
        """Start a program: post the first receive of each direction, or, given `postings`, none but as they say."""
        self._postings = postings
        if postings is not None:
            assert not self._posted and not self._sends
            return
        kinds = (ReceiveActivation, ReceiveGradient)
        self.begin_with({kind: iter([a for a in actions if isinstance(a, kind)]) for kind in kinds})

    def about_to(self, action: Instruction) -> None:
        """Call it before each instruction of a program."""
        for receive in self._postings(action) if self._postings is not None else ():
            self._post(receive)

    def begin_with(self, receives: Mapping[type, Iterator[Receive]]) -> None:
        """Start a program of which only the receives are given, each kind in order; asked one ahead of its use."""
        assert not self._posted and not self._sends
        for kind, coming in receives.items():
            self._ahead[kind] = coming
            self._post_next(kind)

    def send(self, action: Send, tensors: Sequence[Tensor]) -> int:
        """Start sending; returns the bytes on their way."""
        way = (action.stage, action.peer)
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        operations, kept = [], []
        for message in self.routes[way].sends:
            buffer = _pack(message, tensors, self.device)
            operations.append((dist.isend, buffer, message.peer, self.groups.boundaries[way]))
            kept.append(buffer)
        # What the backend itself says to be done (NCCL does) need not wait for news of it.
        while self._sends and all(work.is_completed() for work in next(iter(self._sends.values())).works):
            self._sends.pop(next(iter(self._sends))).arrived()
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        if operations:
            arrived = self.on_transfer(str(action), size_bytes)
            self._sends[action] = _Leaving(_started(operations, self.device), kept, arrived)
        return size_bytes

    def receive(self, action: Receive) -> list[Tensor]:
        """The tensors of `action`, complete; posts the next receive of its kind."""
        if self._postings is not None and action not in self._posted:
            self._post(action)
        assert action in self._posted, f"{action} has not been posted"
        way = (action.peer, action.stage)
        route, arriving = self.routes[way], self._posted.pop(action)
        for work in arriving.works:
            work.wait()
        arriving.arrived()
        for send in self.delivered(action):
            if send in self._sends:
                self._sends.pop(send).finish()
        for message, buffer in arriving.packed:
            for piece in message.pieces:
                place, value = piece.of(arriving.outputs), _seen(buffer, piece, arriving.outputs)
                if piece.tensor in route.sums:
                    place.add_(value)
                else:
                    place.copy_(value)
        if self._postings is None:
            self._post_next(type(action))
        return arriving.outputs

    def finish(self) -> None:
        """Wait for all sends of the program."""
        for leaving in self._sends.values():
            leaving.finish()
        self._sends.clear()
        assert not self._posted

    def abandon(self) -> None:
        """Forget what is under way after a failure."""
        self._sends.clear()
        self._posted.clear()

    def _post_next(self, kind: type) -> None:
        action = next(self._ahead[kind], None)
        if action is not None:
            self._post(action)

    def _post(self, action: Receive) -> None:
        way = (action.peer, action.stage)
        route = self.routes[way]
        outputs = [
            (torch.zeros if i in route.sums else torch.empty)(shape, dtype=dtype, device=self.device)
            for i, (shape, dtype) in enumerate(route.outputs)
        ]
        operations, packed = [], []
        for message in route.receives:
            if message.num_bytes:
                buffer = torch.empty(message.num_bytes, dtype=torch.uint8, device=self.device)
                packed.append((message, buffer))
            else:
                buffer = message.pieces[0].of(outputs)
            operations.append((dist.irecv, buffer, message.peer, self.groups.boundaries[way]))
        size_bytes = sum(buffer.numel() * buffer.element_size() for _, buffer, _, _ in operations)
        arrived = self.on_transfer(str(action), size_bytes)
        self._posted[action] = _Arriving(outputs, packed, _started(operations, self.device), arrived)


def _started(operations: list[_Operation], device: torch.device) -> list[dist.Work]:
    """On NCCL one transfer on the group's own communicator, where sends and receives of a pair keep their order; called
    one by one they would make a communicator for every pair, at the first message and waiting for the peer."""
    if not operations:
        return []
    if device.type == "cuda":
        return dist.batch_isend_irecv([dist.P2POp(*operation) for operation in operations])
    works = [function(buffer, peer, group=group) for function, buffer, peer, group in operations]
    return [work for work in works if work is not None]


def _pack(message: Message, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    if not message.num_bytes:
        return message.pieces[0].of(tensors)
    buffer = torch.empty(message.num_bytes, dtype=torch.uint8, device=device)
    for piece in message.pieces:
        _seen(buffer, piece, tensors).copy_(piece.of(tensors))
    return buffer


def _seen(buffer: Tensor, piece: Piece, tensors: Sequence[Tensor]) -> Tensor:
    """The piece inside a packed message."""
    dtype = tensors[piece.tensor].dtype
    stop = piece.start_byte + torch.Size(piece.size).numel() * dtype.itemsize
    return buffer[piece.start_byte : stop].view(dtype).view(piece.size)
