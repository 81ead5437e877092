"""The measured side of the Timeline: when each instruction ran, what collectives took, how much memory was live."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..timeline import Event


@dataclass(frozen=True, slots=True)
class CollectiveSample:
    """One collective as it was measured: kind, ranks that took part, size of the whole tensor, seconds."""

    kind: str
    ranks: tuple[int, ...]
    size_bytes: int
    seconds: float


@dataclass(eq=False)
class Recorder:
    """Collects the events of one step on one rank; times are relative to `begin()`.

    On CUDA, instructions are bracketed by events on the current stream and read once the step is over, so recording
    never waits for the device.
    """

    rank: int
    device: torch.device
    events: list[Event] = field(default_factory=list)
    samples: list[CollectiveSample] = field(default_factory=list)
    transfers: list[Event] = field(default_factory=list)
    waits: list[Event] = field(default_factory=list)
    _origin: float = 0.0
    _pending: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _cuda_origin: torch.cuda.Event | None = None

    def begin(self) -> None:
        # New lists: what was started in the step before may still report its end.
        self.events, self.samples, self.transfers, self.waits, self._pending = [], [], [], [], []
        self._origin = time.perf_counter()
        if self.device.type == "cuda":
            self._cuda_origin = _mark()

    def run(self, token: str, handler: Callable[..., int], *args: Any) -> None:
        """Run `handler(*args)`, which returns the bytes it moved, as the instruction `token`."""
        ended = self.started(token)
        ended(handler(*args))

    def started(self, token: str) -> Callable[[int], None]:
        """The instruction `token` starts; call the result, with the bytes it has moved, when it ends."""
        if self.device.type == "cuda":
            start = _mark()
            return lambda size_bytes: self._pending.append((token, size_bytes, start, _mark()))
        start_s = self.now_s()
        return lambda size_bytes: self.events.append(Event(self.rank, token, start_s, self.now_s(), size_bytes))

    def transfer(self, token: str, size_bytes: int) -> Callable[[], None]:
        """Something begins to travel beside the instructions, as the host sees it; call the result when it has arrived, from
        any thread."""
        return self._beside(self.transfers, token, size_bytes)

    def wait(self, token: str) -> Callable[[], None]:
        """The host begins to wait for a transfer; call the result when it goes on."""
        return self._beside(self.waits, token, 0)

    def _beside(self, found: list[Event], token: str, size_bytes: int) -> Callable[[], None]:
        origin = self._origin
        start_s = time.perf_counter() - origin

        def ended() -> None:
            found.append(Event(self.rank, token, start_s, time.perf_counter() - origin, size_bytes))

        return ended

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, seconds: float) -> None:
        self.samples.append(CollectiveSample(kind, ranks, size_bytes, seconds))

    def now_s(self) -> float:
        """Seconds since `begin()` as the host sees it."""
        return time.perf_counter() - self._origin

    def lap(self) -> Callable[[], float]:
        """What gives the seconds from `begin()` to this call: on CUDA those that the device took, once it is there."""
        if self.device.type != "cuda":
            passed_s = self.now_s()
            return lambda: passed_s
        start, end = self._cuda_origin, _mark()
        assert start is not None

        def passed() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return passed

    def finished_events(self) -> tuple[Event, ...]:
        """The events so far; on CUDA waits for the device."""
        if self._pending:
            torch.cuda.synchronize(self.device)
            assert self._cuda_origin is not None
            for token, size_bytes, start, end in self._pending:
                start_s = self._cuda_origin.elapsed_time(start) / 1e3
                self.events.append(
                    Event(self.rank, token, start_s, self._cuda_origin.elapsed_time(end) / 1e3, size_bytes)
                )
            self._pending = []
        return tuple(self.events)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
