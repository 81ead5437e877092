"""Ranks forked from this very process: `run(function, num_ranks)` on gloo, with everything in memory at hand.

tests/pool.py keeps workers and sends them what they need; a fork has it already, which is what captured graphs and
modules that cannot be pickled want. Only for a process that has started no thread: a fork would lose it.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class ForkError(Exception):
    """A rank raised or died; the message has its traceback."""


def run(function: Callable[[], T], num_ranks: int, timeout_s: float = 60.0) -> list[T]:
    """`function()` of every rank, in order of rank; ForkError with the first failing rank's traceback."""
    context = mp.get_context("fork")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="autopar-fork-") as folder:
        pipes, workers = {}, []
        for rank in range(num_ranks):
            receive, send = context.Pipe(duplex=False)
            worker = context.Process(target=_serve, args=(function, rank, num_ranks, Path(folder), timeout_s, send))
            worker.start()
            send.close()
            pipes[receive] = rank
            workers.append(worker)
        try:
            return _collect(pipes, num_ranks, time.monotonic() + timeout_s)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(pipes: dict[Connection, int], num_ranks: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ForkError(f"ranks {sorted(pipes.values())} of {num_ranks} did not end in time")
        for pipe in ready:
            rank = pipes.pop(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                error = f"rank {rank} died"
            if error:
                raise ForkError(error)
    return [results[rank] for rank in range(num_ranks)]


def _serve(
    function: Callable[[], Any], rank: int, num_ranks: int, folder: Path, timeout_s: float, pipe: Connection
) -> None:
    answer: tuple[str, Any] = ("", None)
    signal.alarm(int(timeout_s) + 5)  # an orphan ends by itself
    with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
        try:
            torch.set_num_threads(1)
            store = dist.FileStore(str(folder / "store"), num_ranks)
            limit = timedelta(seconds=timeout_s)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=limit)
            answer = ("", function())
        except BaseException as error:
            # The error itself stands in the first line: reports show that one.
            answer = (f"{type(error).__name__}: {error}\non rank {rank}\n{traceback.format_exc()}", None)
    pipe.send(answer)
    pipe.close()
    # Nothing of the parent's is to be finalised here, and its peers may still be in a collective.
    os._exit(0)
