"""Ends a run in which a rank hangs or has died, on every rank, and says which one and where.

One thread per process. It answers for its rank even while the main thread waits inside a collective:

- every few seconds it writes to the run's store what its rank is doing (its pulse);
- when an instruction of its own rank lasts longer than the bound, or when another rank's connection breaks, it rings the
  alarm in the store; every watchdog then says what its rank has been doing and for how long;
- after a short wait the answers tell who is to blame: ranks without an answer are dead or frozen; else those that were
  not waiting for others; else all wait for each other.

It ends with its model, and with the process group: a store that others have closed answers late, wrongly or (a FileStore
whose file has been deleted and made anew) never. A process may have several models. Those that rest stay silent about it as
long as another one has something to say.

Gloo cannot be made to give up a collective from outside, so a process whose main thread is still stuck after that is
ended, with the finding and its stacks on stderr, as NCCL's own watchdog does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .failure import publish_text, published
from .torch_private import own_connection

TIMEOUT_S = 60.0
_PULSE_S = 2.0
_GRACE_S = 4.0
_ALARM = "autopar/alarm"
_PULSE = "autopar/pulse/"
_ANSWER = "autopar/answer/"
_MOST_NAMED = 4
_COMMUNICATING = frozenset(
    f"autopar.runtime.{name}"
    for name in ("axis", "collectives", "replicas", "shards", "ties", "torch_private", "transport")
)


@dataclass(frozen=True)
class Doing:
    """What a rank is doing: in words, whether it only waits for other ranks, and for how many seconds already."""

    words: str
    waits: bool
    seconds: float

    def dump(self) -> str:
        return json.dumps([self.words, self.waits, self.seconds])

    @classmethod
    def parse(cls, text: str) -> Doing:
        return cls(*json.loads(text))


class Watchdog:
    """Watches the steps of one rank.

    current(): (the instruction that runs, an object of its own each time, or None; the stage); None ends the watch.
    timeout_s: how long one instruction may take, and so how long after a rank stopped the run ends at the latest, but for
    some seconds in which the ranks are asked.
    """

    def __init__(
        self,
        current: Callable[[], tuple[Any, int] | None],
        timeout_s: float = TIMEOUT_S,
        device: torch.device | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}: expected a positive number of seconds")
        self.timeout_s = timeout_s
        self._current = current
        self._device = device
        self._active = False
        self._stepping = 0
        self._tail: torch.cuda.Event | None = None
        self._seen: tuple[Any, float] = (None, time.monotonic())
        self._closed = threading.Event()
        self._store: dist.Store | None = None
        self._world: Callable[[], dist.ProcessGroup | None] = lambda: None
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Watch what runs inside."""
        if self._thread is None and dist.get_world_size() > 1:
            self._store, self._world = own_connection(), weakref.ref(dist.group.WORLD)
        if self._thread is None and self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="autopar-watchdog", daemon=True)
            self._thread.start()
        self._seen = (object(), time.monotonic())
        self._active, self._tail = True, None
        self._stepping = threading.get_ident()
        try:
            yield
            if self._device is not None and self._device.type == "cuda":
                self._tail = torch.cuda.Event()
                self._tail.record()
        except BaseException:
            self._closed.set()  # the failure takes its own way to the others
            raise
        finally:
            self._active = False
            self._seen = (None, time.monotonic())

    def close(self) -> None:
        """End the watch; its thread goes within moments."""
        self._closed.set()

    @property
    def _in_step(self) -> bool:
        return self._active or self._tail is not None

    def _doing(self) -> Doing | None:
        now = time.monotonic()
        current = self._current()
        if current is None:
            return None
        instruction, stage = current
        if self._active:
            marker, waits = instruction, _waits_for_others(self._stepping)
            words = str(instruction) if instruction is not None else "the beginning or the end of a step"
        elif self._tail is not None and not self._tail.query():
            marker, words, waits = self._tail, "the device's part of a step", True
        else:
            self._tail = None
            marker, words, waits = None, "the training loop, outside of the model", False
        if self._seen[0] is not marker:
            self._seen = (marker, now)
        return Doing(f"{words}, stage {stage}", waits, now - self._seen[1])

    def _watch(self) -> None:
        pulse_s = min(_PULSE_S, self.timeout_s / 8)
        rank, told = dist.get_rank(), ""
        # The store is gone when the run is.
        with contextlib.suppress(RuntimeError):
            while not self._closed.is_set() and (doing := self._doing()) is not None and self._world_is_there():
                in_step = self._in_step
                if in_step or doing.words != told:
                    self._store.set(f"{_PULSE}{rank}", doing.dump())
                    told = doing.words
                late = in_step and doing.seconds > self.timeout_s
                if late:
                    self._store.set(_ALARM, f"rank {rank} has been in {doing.words} for {doing.seconds:.0f} s")
                if late or self._store.check([_ALARM]):
                    self._answer(rank, doing, in_step)
                    break
                self._closed.wait(pulse_s)
        self._store = None

    def _world_is_there(self) -> bool:
        world = self._world()
        return world is not None and world is dist.group.WORLD

    def _answer(self, rank: int, doing: Doing, in_step: bool) -> None:
        key = f"{_ANSWER}{rank}"
        if in_step:
            self._store.set(key, doing.dump())
        else:
            self._store.compare_set(key, "", doing.dump())
        self._closed.wait(_GRACE_S)
        finding = published(self._store) or verdict(self._store, dist.get_world_size())
        publish_text(self._store, finding)
        finding = published(self._store) or finding
        # A main thread that gets out by an exception tells the user itself.
        if self._closed.wait(_GRACE_S):
            return
        print(f"autopar: rank {rank} is ended, in {doing.words}: {finding}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)


def _waits_for_others(thread: int) -> bool:
    """Whether the innermost Python function of a thread is one that communicates."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False
    module = frame.f_globals.get("__name__", "")
    return module.startswith("torch.distributed.") or module in _COMMUNICATING


def ring(wait_s: float = _GRACE_S + 2 * _PULSE_S) -> str | None:
    """Ask all ranks what they are doing, because a connection broke; who is to blame, None where that cannot be told.

    Blocks for some seconds.
    """
    store = own_connection()
    if store is None:
        return None
    try:
        store.set(_ALARM, f"rank {dist.get_rank()} lost a connection")
        store.set(f"{_ANSWER}{dist.get_rank()}", Doing("a lost connection", True, 0.0).dump())
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and len(_answers(store, dist.get_world_size())) < dist.get_world_size():
            time.sleep(0.1)
        return published(store) or verdict(store, dist.get_world_size())
    except RuntimeError:
        return None


def _answers(store: dist.Store, world_size: int) -> dict[int, Doing]:
    return {
        rank: Doing.parse(store.get(f"{_ANSWER}{rank}").decode())
        for rank in range(world_size)
        if store.check([f"{_ANSWER}{rank}"])
    }


def verdict(store: dist.Store, world_size: int) -> str:
    """Who is to blame, from the answers to the alarm, in words."""
    answers = _answers(store, world_size)
    silent = [rank for rank in range(world_size) if rank not in answers]
    if silent:
        return "; ".join(map(lambda rank: _last_seen(store, rank), silent[:_MOST_NAMED])) + _more(silent)
    busy = [rank for rank, doing in answers.items() if not doing.waits]
    blamed = busy or list(answers)
    told = "; ".join(
        f"rank {rank} hangs: it has been in {answers[rank].words} for {answers[rank].seconds:.0f} s"
        for rank in blamed[:_MOST_NAMED]
    )
    return told + _more(blamed) + ("" if busy else " (all ranks wait for each other)")


def _last_seen(store: dist.Store, rank: int) -> str:
    key = f"{_PULSE}{rank}"
    where = f"in {Doing.parse(store.get(key).decode()).words}" if store.check([key]) else "before its first step"
    return f"rank {rank} has died or is frozen; it was last seen {where}"


def _more(ranks: list[int]) -> str:
    return f"; and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
