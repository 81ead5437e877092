"""Every search method on one suite of models and clusters, judged by the common simulator.

    python benchmarks/planners.py [--only gpt,moe] [--methods auto,alpa] [--limit 20] [--rows FILE] [--record FILE]

prints, and keeps in --record, per instance and method: the predicted step time, whether the plan fits in memory by the
common model, and the planning time. A row is written to --rows as soon as it is known, and what is there already is not
run again. --limit is the planning time that each method other than auto is given. Models are on the meta device; no
GPU and no process group is needed. All times of planning are processor seconds of this process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from planners_plot import plot
from torch import nn
from tqdm import tqdm

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.planner.budget import Budget
from autopar.planner.chains import LayoutChains
from autopar.planner.problem import Constraints, Problem
from autopar.planner.search import METHODS
from autopar.simulate import simulate

GIB = 2**30


@dataclass(frozen=True)
class Instance:
    """A model for one batch, on a cluster; share: of each device's memory that plans may use (scarce where it is small)."""

    name: str
    build: Callable[[], Graph]
    cluster: Cluster
    share: float = 0.9


@dataclass(frozen=True)
class Row:
    """What one method made of one instance; step_time_s None where it found no plan, with the reason."""

    instance: str
    method: str
    step_time_s: float | None
    fits: bool
    planning_s: float
    plan: str


def _language_model(kind: str, rows: int, length: int, **sizes) -> Graph:
    import transformers as hf

    configs = {
        "gpt": (hf.GPT2Config, hf.GPT2LMHeadModel),
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "t5": (hf.T5Config, hf.T5ForConditionalGeneration),
        "moe": (hf.MixtralConfig, hf.MixtralForCausalLM),
    }
    config, model = configs[kind]
    with torch.device("meta"):
        module = model(config(use_cache=False, **sizes))
        tokens = torch.zeros(rows, length, dtype=torch.long)
    return capture(module, {"input_ids": tokens, "labels": tokens})


def gpt(hidden: int, layers: int, heads: int, rows: int, length: int = 1024) -> Graph:
    return _language_model(
        "gpt", rows, length, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length, vocab_size=51200,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM",
    )  # fmt: skip


def llama(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, rows: int, length: int = 4096) -> Graph:
    return _language_model(
        "llama", rows, length, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=32000, max_position_embeddings=length,
    )  # fmt: skip


def t5(width: int, mlp: int, layers: int, heads: int, rows: int, length: int = 512) -> Graph:
    return _language_model(
        "t5", rows, length, d_model=width, d_ff=mlp, num_layers=layers, num_heads=heads, d_kv=width // heads,
        dropout_rate=0.0, vocab_size=32128, decoder_start_token_id=0,
    )  # fmt: skip


def moe(hidden: int, mlp: int, layers: int, heads: int, experts: int, rows: int, length: int = 2048) -> Graph:
    return _language_model(
        "moe", rows, length, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), num_local_experts=experts, vocab_size=32000,
        max_position_embeddings=length,
    )  # fmt: skip


class WideResidual(nn.Module):
    """A bottleneck of a wide ResNet (Zagoruyko and Komodakis 2016), without batch norm, which no microbatch may cut."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        inner = width * factor // 4
        self.reduce, self.expand = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.space = nn.Conv2d(inner, inner, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x):
        y = torch.relu(self.reduce(torch.relu(self.norm(x))))
        return x + self.expand(torch.relu(self.space(y)))


class WideResNet(nn.Module):
    def __init__(self, width: int, layers: int, factor: int, classes: int = 1024) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, stride=4, padding=3)
        self.body = nn.Sequential(*(WideResidual(width, factor) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def wide_resnet(width: int, layers: int, factor: int, rows: int) -> Graph:
    with torch.device("meta"):
        batch = (torch.zeros(rows, 3, 224, 224), torch.zeros(rows, dtype=torch.long))
        return capture(WideResNet(width, layers, factor), batch, nn.functional.cross_entropy)


def _slow(name: str, hosts: int, devices: int) -> Cluster:
    """A preset with a tenth of the network between hosts (and, within a lone host, of that between its devices)."""
    cluster = preset(name, hosts, devices)
    if hosts > 1:
        inter = cluster.inter
        return replace(cluster, inter=replace(inter, bandwidth_bytes_per_s=inter.bandwidth_bytes_per_s / 10))
    intra = cluster.intra
    return replace(cluster, intra=replace(intra, bandwidth_bytes_per_s=intra.bandwidth_bytes_per_s / 10))


def _kinds(hosts: int, devices: int, *names: str) -> Cluster:
    """So many hosts of each kind."""
    return Cluster.join(*(preset(name, hosts, devices) for name in names))


def suite() -> Iterator[Instance]:
    """GPT, Llama, T5, MoE and wide ResNet; 4 to 1,024 devices, equal and not; fast and slow networks; ample and scarce memory."""
    small = ("gpt-350m", lambda: gpt(1024, 24, 16, 64))
    yield Instance("gpt-350m/4 a100", small[1], preset("a100-40gb", 1, 4))
    yield Instance("gpt-350m/4 t4", small[1], preset("t4-16gb", 1, 4))
    yield Instance("gpt-350m/4 v100 slow", small[1], _slow("v100-16gb", 1, 4))
    yield Instance("gpt-350m/4 v100 scarce", small[1], preset("v100-16gb", 1, 4), 0.5)
    yield Instance("gpt-1.3b/8 v100", lambda: gpt(2048, 24, 16, 128), preset("v100-32gb", 1, 8))
    yield Instance("gpt-1.3b/16 v100 slow", lambda: gpt(2048, 24, 16, 128), _slow("v100-32gb", 2, 8))
    yield Instance("gpt-2.6b/8 v100", lambda: gpt(2560, 32, 32, 128), preset("v100-32gb", 1, 8))
    yield Instance("gpt-13b/64 a100", lambda: gpt(5120, 40, 40, 512), preset("a100-40gb", 8, 8))
    yield Instance("gpt-39b/64 v100", lambda: gpt(8192, 48, 64, 512), preset("v100-16gb", 8, 8))
    yield Instance("gpt-39b/256 a100 slow", lambda: gpt(8192, 48, 64, 1024), _slow("a100-80gb", 32, 8))
    yield Instance("llama-1b/4 l40s", lambda: llama(2048, 5632, 22, 32, 4, 64, 2048), preset("l40s-48gb", 1, 4))
    yield Instance("llama-1b/8 t4 scarce", lambda: llama(2048, 5632, 22, 32, 4, 64, 2048), preset("t4-16gb", 1, 8), 0.6)
    yield Instance("llama-8b/16 h100", lambda: llama(4096, 14336, 32, 32, 8, 64), preset("h100-80gb", 2, 8))
    yield Instance("llama-8b/64 h100 slow", lambda: llama(4096, 14336, 32, 32, 8, 256), _slow("h100-80gb", 8, 8))
    yield Instance(
        "llama-8b/64 a100-40 scarce", lambda: llama(4096, 14336, 32, 32, 8, 256), preset("a100-40gb", 8, 8), 0.6
    )
    yield Instance("llama-70b/512 h100", lambda: llama(8192, 28672, 80, 64, 8, 1024), preset("h100-80gb", 64, 8))
    yield Instance("llama-70b/1024 h100", lambda: llama(8192, 28672, 80, 64, 8, 1024), preset("h100-80gb", 128, 8))
    yield Instance("t5-770m/4 v100", lambda: t5(1024, 4096, 24, 16, 64), preset("v100-32gb", 1, 4))
    yield Instance("t5-770m/16 v100 slow", lambda: t5(1024, 4096, 24, 16, 128), _slow("v100-16gb", 2, 8))
    yield Instance("t5-3b/16 a100", lambda: t5(1024, 16384, 24, 32, 128), preset("a100-40gb", 2, 8))
    yield Instance("moe-8x1b/8 a100", lambda: moe(1024, 3584, 16, 16, 8, 64), preset("a100-80gb", 1, 8))
    yield Instance("moe-8x7b/64 h100", lambda: moe(4096, 14336, 32, 32, 8, 128), preset("h100-80gb", 8, 8))
    yield Instance("resnet-500m/4 v100", lambda: wide_resnet(1024, 24, 4, 64), preset("v100-16gb", 1, 4))
    yield Instance("resnet-500m/4 t4 slow", lambda: wide_resnet(1024, 24, 4, 64), _slow("t4-16gb", 1, 4))
    yield Instance("resnet-4b/32 v100", lambda: wide_resnet(2048, 48, 8, 256), preset("v100-32gb", 4, 8))
    yield Instance("gpt-1.3b/8 two kinds", lambda: gpt(2048, 24, 16, 128), _kinds(1, 4, "a100-40gb", "v100-16gb"))
    yield Instance(
        "gpt-2.6b/16 four kinds", lambda: gpt(2560, 32, 32, 128),
        _kinds(1, 4, "a100-80gb", "a100-40gb", "v100-16gb", "t4-16gb"),
    )  # fmt: skip
    yield Instance(
        "gpt-13b/64 four kinds", lambda: gpt(5120, 40, 40, 512),
        _kinds(4, 4, "a100-80gb", "a100-40gb", "v100-16gb", "t4-16gb"),
    )  # fmt: skip


def run(instance: Instance, method: str, graph: Graph, limit_s: float) -> Row:
    """One method on one instance, with a cost model of its own, so that none profits from what another asked."""
    problem = Problem(
        graph, instance.cluster, CostModel(graph, instance.cluster), LayoutChains(),
        Constraints(memory_reserve=1 - instance.share),
        budget=Budget(None if method == "auto" else limit_s, progress=True, clock=time.process_time),
    )  # fmt: skip
    start_s = time.process_time()
    try:
        plan = METHODS[method](problem)
    except ValueError as error:
        return Row(instance.name, method, None, False, time.process_time() - start_s, str(error))
    planning_s = time.process_time() - start_s
    line = simulate(graph, plan, instance.cluster, model=None if plan.rewrites else problem.costs)
    fits = problem.excess_bytes(line.peak_memory_bytes) <= 0
    stages = "; ".join(f"[{s.start}, {s.stop}) {s.data} x {s.tensor}" for s in plan.stages[:4])
    words = f"{len(plan.stages)} stages ({stages}{', ...' if len(plan.stages) > 4 else ''}), {plan.microbatches} mb"
    return Row(instance.name, method, line.step_time_s, fits, planning_s, words)


def table(rows: list[Row], methods: list[str]) -> str:
    """Step time over auto's, per instance and method; what does not fit in brackets; planning seconds at the end."""
    lines = ["| instance | auto | " + " | ".join(m for m in methods if m != "auto") + " |"]
    lines.append("|---" * (len(methods) + 1) + "|")
    by = {(row.instance, row.method): row for row in rows}
    for name in dict.fromkeys(row.instance for row in rows):
        base = by.get((name, "auto"))
        cells = [f"{base.step_time_s:.3g} s" if base and base.step_time_s else "none"]
        for method in methods:
            row = by.get((name, method))
            if method == "auto":
                continue
            if row is None or row.step_time_s is None:
                cells.append("none" if row else "")
            else:
                ratio = (
                    f"{row.step_time_s / base.step_time_s:.3f}"
                    if base and base.step_time_s
                    else f"{row.step_time_s:.3g} s"
                )
                cells.append(ratio if row.fits else f"({ratio})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("Planning, processor seconds, median and most: " + "; ".join(
        f"{method} {sorted(times)[len(times) // 2]:.2f}, {max(times):.2f}"
        for method in methods
        if (times := [row.planning_s for row in rows if row.method == method])
    ))  # fmt: skip
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """Whether auto is never worse, and on how many instances it is strictly better than all."""
    worse, better, judged = [], 0, 0
    for name in dict.fromkeys(row.instance for row in rows):
        some = {r.method: r for r in rows if r.instance == name and r.step_time_s is not None and r.fits}
        others = [r.step_time_s for method, r in some.items() if method not in ("auto", "exhaustive")]
        if "auto" not in some or not others:
            continue
        judged += 1
        if some["auto"].step_time_s > min(others) * (1 + 1e-6):
            worse.append(f"{name} ({some['auto'].step_time_s / min(others):.3f} of the best)")
        better += some["auto"].step_time_s < min(others) * (1 - 1e-6)
    return (
        f"Of {judged} instances auto is strictly better than all published methods on {better}, and worse on "
        f"{len(worse)}{': ' + ', '.join(worse) if worse else ''}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="instances whose names contain one of these, comma-separated")
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "exhaustive"))
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of planning for each published method")
    parser.add_argument("--rows", type=Path, help="one JSON object per line; rows that are there are not run again")
    parser.add_argument("--record", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    rows: list[Row] = []
    if arguments.rows and arguments.rows.exists():
        rows = [Row(**json.loads(line)) for line in arguments.rows.read_text().splitlines()]
    wanted = [i for i in suite() if not arguments.only or any(part in i.name for part in arguments.only.split(","))]
    done = {(row.instance, row.method) for row in rows}
    with tqdm(total=len(wanted) * len(methods), unit="plan") as bar:
        for instance in wanted:
            todo = [m for m in methods if (instance.name, m) not in done]
            graph = instance.build() if todo else None
            for method in methods:
                bar.update()
                if method not in todo:
                    continue
                rows.append(run(instance, method, graph, arguments.limit))
                bar.write(f"{rows[-1].instance:28} {method:10} {rows[-1].step_time_s} {rows[-1].planning_s:.2f} s")
                if arguments.rows:
                    with arguments.rows.open("a") as file:
                        file.write(json.dumps(asdict(rows[-1])) + "\n")
    chosen = [row for row in rows if any(row.instance == i.name for i in wanted) and row.method in methods]
    text = table(chosen, methods) + "\n\n" + verdict(chosen)
    print(text)
    if arguments.record:
        head = (
            f"# Planners side by side, {datetime.date.today()}\n\n{platform.machine()}, torch {torch.__version__}, "
            f"`{' '.join(['python benchmarks/planners.py', *_given(arguments)])}`\n\nStep time relative to auto's, by the "
            "common simulator; brackets: does not fit in memory.\n\n"
        )
        picture = arguments.record.with_suffix(".svg")
        picture.write_text(plot(_ratios(chosen), [m for m in methods if m != "auto"]))
        shown = f"![Step time over auto's]({picture.name}): filled marks fit in memory, those beyond 4 stand at the edge.\n\n"
        arguments.record.write_text(head + shown + text + "\n")


def _ratios(rows: list[Row]) -> dict[str, dict[str, tuple[float, bool]]]:
    """Per instance and method (step time over auto's, whether it fits)."""
    base = {row.instance: row.step_time_s for row in rows if row.method == "auto" and row.step_time_s}
    found: dict[str, dict[str, tuple[float, bool]]] = {name: {} for name in base}
    for row in rows:
        if row.method != "auto" and row.step_time_s and row.instance in base:
            found[row.instance][row.method] = row.step_time_s / base[row.instance], row.fits
    return found


def _given(arguments: argparse.Namespace) -> list[str]:
    return [f"--{k} {v}" for k, v in vars(arguments).items() if v and k in ("only", "methods", "limit")]


if __name__ == "__main__":
    main()
