"""Ranks that hang, freeze or die end the run on all ranks, and the rank, the instruction and the stage are named.

And the watch leaves nothing behind: neither a thread nor a connection that would outlive its model or its world.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import random_plan
from torch import nn

import autopar
from autopar.cluster.spec import Cluster

pytestmark = [pytest.mark.processes, pytest.mark.alone]

# Two ranks, one stage each; in the third step the one with the opaque module does something bad in its forward.
SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from torch import nn
import autopar
from autopar.cluster.spec import Cluster

how, rank, store, timeout_s = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)

step = -1

def say():
    with open(store + ".bad.part", "w") as file:
        file.write(str(rank))
    os.rename(store + ".bad.part", store + ".bad")

class Bad(nn.Module):
    def forward(self, x):
        if step == 2 and how != "sleeps outside":
            say()
            if how == "hangs":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGSTOP if how == "freezes" else signal.SIGKILL)
        return x * 2

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(8, 8), autopar.opaque(Bad()), nn.Linear(8, 8))
model = autopar.parallelize(
    module, (torch.randn(8, 8), torch.randn(8, 8)), nn.functional.mse_loss,
    cluster=Cluster.preset("cpu", hosts=1, devices_per_host=2), pipeline=2, data=1, tensor=1, microbatches=1,
    timeout_s=timeout_s,
)
# Rests after one step, and must not speak for its ranks.
other = autopar.parallelize(
    nn.Linear(8, 8), (torch.randn(8, 8), torch.randn(8, 8)), nn.functional.mse_loss,
    cluster=Cluster.preset("cpu", hosts=1, devices_per_host=2), data=2, timeout_s=timeout_s,
)
other(torch.randn(8, 8), torch.randn(8, 8)).backward()
for step in range(5):
    if how == "sleeps outside" and step == 2 and rank == 1:
        say()
        time.sleep(600)
    model(torch.randn(8, 8), torch.randn(8, 8)).backward()
"""

SAID = {
    "hangs": ("rank {0} hangs: it has been in {0}F0, stage {0}",),
    "freezes": ("rank {0} has died or is frozen; it was last seen in", "stage {0}"),
    "dies": ("rank {0} has died or is frozen; it was last seen in", "stage {0}"),
    "sleeps outside": ("rank {0} hangs: it has been in the training loop, outside of the model",),
}


@pytest.mark.parametrize(
    "how", [how if how in ("hangs", "dies") else pytest.param(how, marks=pytest.mark.slow) for how in SAID]
)
def test_every_rank_stops_and_the_guilty_one_is_named(tmp_path: Path, how: str) -> None:
    timeout_s = 4.0
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), how, str(rank), str(tmp_path / "store"), str(timeout_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = tmp_path / "store.bad"
        while not said.exists():
            ended = [process.communicate() for process in ranks if process.poll() is not None]
            assert not ended, ended
            time.sleep(0.05)
        start, guilty = time.monotonic(), int(said.read_text())
        for rank in range(2):
            if rank == guilty and how == "freezes":
                continue
            _, errors = ranks[rank].communicate(timeout=60)
            assert ranks[rank].returncode != 0
            if rank != guilty or how != "dies":
                assert all(words.format(guilty) in errors for words in SAID[how]), (rank, guilty, errors)
        assert time.monotonic() - start < timeout_s + 25
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


def trained(timeout_s: float, **options: Any) -> autopar.Model:
    """A model after one step and one evaluation on two ranks."""
    torch.manual_seed(0)
    module, example = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (torch.randn(8, 8), torch.randn(8, 8))
    graph = autopar.capture(module, example, nn.functional.mse_loss)
    plan = random_plan(graph, microbatches=2, **options)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    model = autopar.parallelize(
        module, example, nn.functional.mse_loss, plan=plan, cluster=cluster, timeout_s=timeout_s
    )
    model(*example).backward()
    with torch.no_grad():
        model(*example)
    return model


def threads_left(wait_s: float) -> int:
    """Watchdogs that are still there after so many seconds."""
    deadline = time.monotonic() + wait_s
    while (found := sum(t.name == "autopar-watchdog" for t in threading.enumerate())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def after_deletion(options: dict[str, Any]) -> tuple[int, int, bool, bool, bool]:
    """Watchdogs while there is a model; after its deletion, without the garbage collector's help; and whether the model,
    its store and, once garbage is collected, its parameters have gone too."""
    gc.collect()
    gc.disable()
    try:
        # At this timeout a pulse comes every two seconds, for which the thread must not wait.
        model = trained(60.0, **options)
        running = threads_left(0.0)
        gone = weakref.ref(model)
        store, kept = weakref.ref(model.watchdog._store), weakref.ref(model.runtime.storage)
        dist.barrier()
        del model
        left = threads_left(1.5)
        return running, left, gone() is None, store() is None, gc.collect() >= 0 and kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options",
    [
        dict(data=2, tensor=1, pipeline=1),
        dict(data=2, tensor=1, pipeline=1, zero=3),
        dict(data=1, tensor=1, pipeline=2, schedule="zb-h1"),
    ],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
def test_nothing_is_left_of_a_deleted_model(pool, options: dict[str, Any]) -> None:
    for found in pool.run(after_deletion, options):
        assert found == (1, 0, True, True, True)


def after_the_world() -> tuple[int, int]:
    """Watchdogs of a model that lives on when its process group is destroyed: before, and within some pulses."""
    model = trained(2.0, data=2, tensor=1, pipeline=1)
    running = threads_left(0.0)
    dist.barrier()
    dist.destroy_process_group()
    left = threads_left(5.0)
    assert model.plan.world_size == 2
    return running, left


def test_nothing_watches_without_a_world(pool) -> None:
    assert pool.run(after_the_world) == [(1, 0)] * 2
