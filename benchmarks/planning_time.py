"""How long `autopar.search` takes on models of known size: median process seconds, and peak memory of the process.

    python benchmarks/planning_time.py                      all instances, five searches each
    python benchmarks/planning_time.py llama-3-8b --runs 1  one of them, once
    python benchmarks/planning_time.py --piper FOLDER       Piper's own inputs, against the times of its own program:
                                                            FOLDER has its *.json and optima.csv

Models are built from configs on the meta device, so neither weights nor devices are needed. Capture does not count.
Each instance has a process of its own, so that its peak memory is its own; torch and transformers are part of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autopar import capture  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from autopar.planner.inputs.layer_dag import LayerMachine  # noqa: E402
from autopar.planner.inputs.piper_json import read_piper  # noqa: E402
from autopar.planner.methods.piper_dag import piper_dag  # noqa: E402
from autopar.planner.search import search  # noqa: E402

Built = tuple[nn.Module, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Instance:
    """target_s: what a search may take."""

    name: str
    target_s: float
    build: Callable[[], Built]
    cluster: Callable[[], Cluster]


def llama(hidden: int, intermediate: int, layers: int, heads: int, batch: int, seq: int) -> Built:
    """Llama 3 with its 8 key-value heads and 128,256 tokens (Dubey et al., 2024, table 3)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=seq,
    )
    return _on_meta(LlamaForCausalLM, config, torch.bfloat16, batch, seq)


def gpt(hidden: int, layers: int, heads: int, batch: int, seq: int) -> Built:
    """GPT-3 as Alpa scales it (Zheng et al., OSDI 2022, table 4)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=51200,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=seq,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    return _on_meta(GPT2LMHeadModel, config, torch.float16, batch, seq)


def mixtral(hidden: int, intermediate: int, layers: int, heads: int, batch: int, seq: int) -> Built:
    """Mixtral with its 8 experts, of which 2 take a token, and 8 key-value heads (Jiang et al., 2024, table 1)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=seq,
        use_cache=False,
    )
    return _on_meta(MixtralForCausalLM, config, torch.bfloat16, batch, seq)


def _on_meta(kind: type[nn.Module], config: Any, dtype: torch.dtype, batch: int, seq: int) -> Built:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            module = kind(config)
    finally:
        torch.set_default_dtype(before)
    ids = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    return module, {"input_ids": ids, "labels": ids.clone()}


INSTANCES = {
    one.name: one
    for one in (
        Instance("llama-3-8b", 2, lambda: llama(4096, 14336, 32, 32, 256, 8192), lambda: _preset("h100-80gb", 8)),
        Instance("gpt-39b", 2, lambda: gpt(8192, 48, 64, 1024, 1024), lambda: _preset("v100-16gb", 8)),
        Instance("llama-3-70b", 4, lambda: llama(8192, 28672, 80, 64, 1024, 8192), lambda: _preset("h100-80gb", 64)),
        Instance("mixtral-8x22b", 5, lambda: mixtral(6144, 16384, 56, 48, 512, 4096), lambda: _preset("h100-80gb", 32)),
        Instance(
            "llama-3-405b", 10, lambda: llama(16384, 53248, 126, 128, 2048, 8192), lambda: _preset("h100-80gb", 2048)
        ),
        Instance("unequal-13b", 10, lambda: gpt(5120, 40, 40, 512, 1024), lambda: _four_kinds()),
    )
}


def _preset(name: str, hosts: int) -> Cluster:
    return Cluster.preset(name, hosts=hosts, devices_per_host=8)


def _four_kinds() -> Cluster:
    """64 devices in 16 hosts: 4 hosts of 4 of each kind."""
    names = ("a100-80gb", "a100-40gb", "v100-16gb", "t4-16gb")
    return Cluster.join(*(Cluster.preset(name, hosts=4, devices_per_host=4) for name in names))


def measure(instance: Instance, runs: int) -> dict[str, Any]:
    """Process seconds of each search, the peak memory of this process, and what was chosen."""
    begin = time.process_time()
    graph, cluster = capture(*instance.build()), instance.cluster()
    capture_s = time.process_time() - begin
    seconds, plan = [], None
    for _ in range(runs):
        begin = time.process_time()
        plan = search(graph, cluster, progress=False)
        seconds.append(time.process_time() - begin)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    chosen = next(one for one in plan.candidates if one.verdict.startswith("chosen"))
    return {
        "seconds": seconds,
        "capture_s": capture_s,
        "peak_bytes": peak_bytes,
        "plan": chosen.name,
        "step_time_s": chosen.step_time_s,
    }


def piper_rows(folder: Path, runs: int) -> None:
    """Print each row of Piper's tables, the given one and `piper_own.csv`: seconds and optimum of its program, and of ours."""
    print(
        f"{'model':>10} {'devices':>7} {'GiB':>4} {'median':>10} {'its own':>10} {'ratio':>6}  optimum against its own"
    )
    tables = (folder / "optima.csv", Path(__file__).with_name("piper_own.csv"))
    for row in (row for table in tables for row in csv.DictReader(table.open())):
        dag, _ = read_piper(folder / f"{row['model']}.json")
        devices, memory_gib = int(row["devices"]), float(row["memory_GiB"])
        bandwidth = float(row["bandwidth_GiB_per_s"]) * 2**30
        machine = LayerMachine(devices, memory_gib * 2**30, bandwidth, int(row["microbatches"]))
        seconds, plan = [], None
        for _ in range(runs):
            begin = time.process_time()
            plan = piper_dag(dag, machine)
            seconds.append(time.process_time() - begin)
        median_s, theirs_s, wanted_s = (
            statistics.median(seconds),
            float(row["planner_s"]),
            float(row["time_per_sample"]),
        )
        if plan is None or wanted_s < 0:
            same = "nothing fits" if plan is None and wanted_s < 0 else f"{plan} against {wanted_s}"
        else:
            same = f"{plan.time_s / wanted_s - 1:+.4%}"
        figures = f"{median_s:8.4f} s {theirs_s:8.4f} s {median_s / theirs_s:6.3f}"
        print(f"{row['model']:>10} {devices:7} {memory_gib:4g} {figures}  {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instances", nargs="*", choices=[[], *INSTANCES], help="by default all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="measure one instance in this process, print JSON")
    parser.add_argument("--piper", type=Path, metavar="FOLDER", help="rows of Piper's table instead")
    given = parser.parse_args()
    if given.piper is not None:
        piper_rows(given.piper, given.runs)
        return
    if given.here:
        print(json.dumps(measure(INSTANCES[given.instances[0]], given.runs)))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; process seconds")
    print(f"{'instance':14} {'median':>8} {'target':>8} {'peak':>10} {'capture':>8}  plan")
    for name in given.instances or INSTANCES:
        command = [sys.executable, __file__, name, "--here", "--runs", str(given.runs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name:14} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        median_s, mib = statistics.median(found["seconds"]), found["peak_bytes"] / 2**20
        print(
            f"{name:14} {median_s:6.2f} s {INSTANCES[name].target_s:6.0f} s {mib:6.0f} MiB "
            f"{found['capture_s']:6.1f} s  {found['plan']}, {found['step_time_s']:.4g} s per step"
        )


if __name__ == "__main__":
    main()
