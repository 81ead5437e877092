"""Activations and gradients between neighbouring stages, point to point.

Sends are started and left behind; a receive is posted one instruction ahead of its use, so that the bytes travel while
the stage computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..graph import Shape
from ..schedule.instructions import (
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)
from .groups import Groups

TensorSpec = tuple[Shape, torch.dtype]
Receive = ReceiveActivation | ReceiveGradient
Send = SendActivation | SendGradient


@dataclass(eq=False)
class Transport:
    """arriving: shapes and dtypes of what this rank receives, in order, by (sending stage, receiving stage)."""

    groups: Groups
    device: torch.device
    arriving: dict[tuple[int, int], Sequence[TensorSpec]]
    _sends: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    _posted: dict[Receive, tuple[list[Tensor], list[dist.Work]]] = field(default_factory=dict)
    _ahead: dict[type, Iterator[Receive]] = field(default_factory=dict)

    def begin(self, actions: Sequence[Instruction]) -> None:
        """Start a program: post the first receive of each direction."""
        assert not self._posted and not self._sends
        for kind in (ReceiveActivation, ReceiveGradient):
            self._ahead[kind] = iter([a for a in actions if isinstance(a, kind)])
            self._post_next(kind)

    def send(self, action: Send, tensors: Sequence[Tensor]) -> int:
        """Start sending; returns the bytes on their way."""
        group = self.groups.boundaries[action.stage, action.peer]
        peer = self.groups.counterpart(action.peer)
        size_bytes = 0
        for tensor in tensors:
            tensor = tensor.detach().contiguous()
            size_bytes += tensor.numel() * tensor.element_size()
            self._sends.append((dist.isend(tensor, peer, group=group), tensor))
        return size_bytes

    def receive(self, action: Receive) -> list[Tensor]:
        """The tensors of `action`, complete; posts the next receive of its kind."""
        assert action in self._posted, f"{action} was not the next receive of its kind"
        tensors, works = self._posted.pop(action)
        for work in works:
            work.wait()
        self._post_next(type(action))
        return tensors

    def finish(self) -> None:
        """Wait for all sends of the program."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        assert not self._posted

    def abandon(self) -> None:
        """Forget what is under way after a failure."""
        self._sends.clear()
        self._posted.clear()

    def _post_next(self, kind: type) -> None:
        action = next(self._ahead[kind], None)
        if action is None:
            return
        way = (action.peer, action.stage)
        peer, group = self.groups.counterpart(action.peer), self.groups.boundaries[way]
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.arriving[way]]
        works = [dist.irecv(tensor, peer, group=group) for tensor in tensors]
        self._posted[action] = (tensors, [w for w in works if w is not None])
