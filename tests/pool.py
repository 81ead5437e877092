"""One pool of worker processes for a whole pytest session: `pool.run(function, world_size=4)` is a test on 4 ranks.

Workers are forked from a server that has imported torch once, and only when a run asks for that many. They outlive the
run, so that a test costs its own work and not four interpreters; every run has a fresh process group over a FileStore,
hence no ports. A run in which a rank raises, dies or hangs leaves its peers inside a collective: the pool kills all
workers and forks new ones for the next run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

COLLECTIVE_TIMEOUT_S = 30
RUN_TIMEOUT_S = 60
MAX_WORLD_SIZE = 8
# Runs that a set of workers serves: what process groups leave behind in a process (threads of gloo) slows later ones down.
RUNS_PER_WORKER = 12

# What most ranks use and what is slow to import; none of these starts a thread, which a fork would lose.
PRELOADED = [
    "__main__",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "torch",
    "torch.export._trace",  # with networkx, which `torch.export.export` imports when it is first called
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "autopar",
    "captured",
    "plan_cases",
]


class RankError(Exception):
    """A rank raised, died or did not end; the message has the rank and its traceback or stacks."""


@dataclass(frozen=True)
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    world_size: int
    cuda: bool
    store_path: str
    collective_timeout_s: float


@dataclass(frozen=True)
class _Worker:
    process: ForkServerProcess
    pipe: connection.Connection
    stacks_path: Path


class Pool:
    """At most 8 workers. Not safe to share between threads or between pytest-xdist workers."""

    def __init__(self, cuda: bool = False, captures: Path | None = None) -> None:
        """cuda: ranks are on the machine's CUDA devices in turn, over NCCL; else on its CPU, over gloo.
        captures: a folder for the graphs that ranks trace, which several pools may share; default: one of its own."""
        self._cuda = cuda
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._folder = Path(tempfile.mkdtemp(prefix="autopar-pool-"))
        self._captures = captures or self._folder / "captures"
        self._captures.mkdir(exist_ok=True)
        self._workers: list[_Worker] = []
        self._num_spawned = 0
        self._num_runs = self._runs_served = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        timeout_s: float = RUN_TIMEOUT_S,
        collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
        **kwargs: Any,
    ) -> list[Any]:
        """The results of `function(*args, **kwargs)` on `world_size` ranks, in order of rank.

        `function` is importable (defined at the top of a test module); it runs under an initialised gloo process group.
        Arguments and results are pickled by value, tensors too.

        Raises:
            ValueError: no such world size, or something that cannot be pickled.
            RankError: the first rank that failed, or the ranks that were still running after `timeout_s`.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size={world_size}: the pool runs 1 to {MAX_WORLD_SIZE} ranks")
        store_path = self._folder / f"store-{self._num_runs}"
        self._num_runs += 1
        try:
            jobs = [
                pickle.dumps(
                    _Job(function, args, kwargs, rank, world_size, self._cuda, str(store_path), collective_timeout_s)
                )
                for rank in range(world_size)
            ]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"{function} or its arguments cannot be sent to another process: {error}") from error
        if self._runs_served >= RUNS_PER_WORKER:
            self._kill()
        self._spawn(world_size)
        self._runs_served += 1
        workers = self._workers[:world_size]
        try:
            for worker, job in zip(workers, jobs, strict=True):
                worker.pipe.send_bytes(job)
            return self._collect(workers, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            self._kill()
            raise
        finally:
            store_path.unlink(missing_ok=True)

    def close(self) -> None:
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, num_workers: int) -> None:
        while len(self._workers) < num_workers:
            ours, theirs = self._context.Pipe()
            stacks_path = self._folder / f"stacks-{self._num_spawned}"
            self._num_spawned += 1
            arguments = (theirs, str(stacks_path), str(self._captures))
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            # Read by the fork server when it starts, with the first worker.
            # A check for devices must not start CUDA in the server: its forks could not use it then.
            settings = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTORCH_NVML_BASED_CUDA_CHECK="1")
            with mock.patch.dict(os.environ, settings):
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stacks_path))

    def _collect(self, workers: list[_Worker], deadline_s: float, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        pipes = {worker.pipe: rank for rank, worker in enumerate(workers)}
        while pipes:
            ready = connection.wait(pipes, timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                ranks = sorted(pipes.values())
                stacks = "\n".join(f"rank {rank}:\n{_stacks(workers[rank])}" for rank in ranks)
                raise RankError(f"ranks {ranks} of {len(workers)} still ran after {timeout_s:g} s\n{stacks}")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    failed, payload = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    failed, payload = True, "the pipe to it closed"
                if failed:
                    _raise_if_one_died(workers)
                    raise RankError(f"rank {rank} of {len(workers)} raised:\n{payload}")
                results[rank] = payload
        return [results[rank] for rank in range(len(workers))]

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers, self._runs_served = [], 0


def _raise_if_one_died(workers: list[_Worker]) -> None:
    """A rank that dies makes its peers raise, often before its own end is seen: name the cause, not the consequence."""
    for sentinel in connection.wait([worker.process.sentinel for worker in workers], timeout=0.2):
        rank = [worker.process.sentinel for worker in workers].index(sentinel)
        raise RankError(f"rank {rank} of {len(workers)} died, exit code {workers[rank].process.exitcode}")


def _stacks(worker: _Worker) -> str:
    """Python stacks of a worker that hangs, as it writes them on a signal even from inside a collective."""
    os.kill(worker.process.pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + 2
    while time.monotonic() < deadline_s:
        text = worker.stacks_path.read_text()
        if text.endswith("\n"):
            return text
        time.sleep(0.01)
    return "(no answer)"


def _serve(pipe: connection.Connection, stacks_path: str, captures: str) -> None:
    import captured
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    gc.freeze()  # what the server has imported
    captured.install(captures)
    # An interrupt from the keyboard reaches the whole process group; the pool decides what it means.
    signal.signal(signal.SIGINT, _ignore)
    with open(stacks_path, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        while True:
            try:
                job = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(job))


def _ignore(signum: int, frame: FrameType | None) -> None:
    pass


def _answer(pickled_job: bytes) -> bytes:
    """(False, result) or (True, traceback), pickled."""
    try:
        job: _Job = pickle.loads(pickled_job)
        with _process_group(job):
            return pickle.dumps((False, job.function(*job.args, **job.kwargs)))
    except BaseException:
        return pickle.dumps((True, traceback.format_exc()))


@contextlib.contextmanager
def _process_group(job: _Job):
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.manual_seed(0)
    if job.cuda:
        torch.cuda.set_device(job.rank % torch.cuda.device_count())
        torch.backends.cudnn.allow_tf32 = False  # ranks are held against a CPU in float32
        # NCCL refuses two ranks on one device of a host, and takes these for ranks on hosts of their own.
        os.environ["NCCL_HOSTID"] = f"rank-{job.rank}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if job.cuda else "gloo",
        store=dist.FileStore(job.store_path, job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.collective_timeout_s),
    )
    # Else a rank that fails at once would make its peers fail to connect, and their errors could be seen first.
    dist.barrier()
    yield
    # Only after success: a worker whose run failed is killed, and its peers' collectives are better left alone.
    # Cached sharding decisions hold meshes, which name groups that the next run gives to other ranks.
    _clear_sharding_prop_cache()
    if dist.is_initialized():  # a run in which a rank failed on purpose has closed it
        dist.destroy_process_group()
