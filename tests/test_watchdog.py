"""Ranks that hang, freeze or die end the run on all ranks, and the rank, the instruction and the stage are named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

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
