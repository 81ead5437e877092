"""One GPU: a stage of Llama-3-8B's shape against the plain torch module, and one rank's memory under larger plans.

    python benchmarks/gpu.py                          both parts; writes a record to --record if given
    python benchmarks/gpu.py stage --sequence 4096    only the first
    python benchmarks/gpu.py memory --ranks 64        only the second

stage: as many of the model's layers as fit, in bfloat16 from float32 parameters, compiled; autopar's module against the
same module under torch.autocast and torch.compile. Steps of the two alternate; medians, their ratio, and the share of the
device's peak that the model's own floating point operations make.

memory: plans of up to 64 ranks, searched for a cluster of this device. One rank of each runs alone in a process of its own
under torch's fake process group; the allocator's peak is held against the predicted one.

On a machine without a GPU both parts run on a small shape on the CPU, which shows only that they run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autopar  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from autopar.parallelize import Model  # noqa: E402
from autopar.runtime.torch_private import join_pretended_world  # noqa: E402
from launch.model import LanguageModel, ModelConfig  # noqa: E402

LLAMA_3_8B = dict(vocabulary=128256, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, rotary_base=500000.0)
SMALL = dict(vocabulary=256, hidden=64, heads=4, kv_heads=2, feed_forward=128)
BYTES_PER_PARAMETER = 20  # parameter, gradient and AdamW's two moments in float32, and the copy to compute with
MEMORY_SHARE = 0.8
ROUNDS = 10
PLANS: tuple[dict[str, int], ...] = (
    {"data": 8, "tensor": 1, "pipeline": 1, "zero": 3},
    {"data": 64, "tensor": 1, "pipeline": 1, "zero": 3},
    {"data": 2, "tensor": 4, "pipeline": 1, "zero": 0},
    {"data": 1, "tensor": 2, "pipeline": 4, "microbatches": 8},
    {"data": 8, "tensor": 4, "pipeline": 2, "microbatches": 4, "zero": 3},
    {"data": 4, "tensor": 8, "pipeline": 2, "microbatches": 4, "zero": 0},
)


@dataclass(frozen=True)
class Case:
    """A shape to run: the model, and tokens [rows, sequence]."""

    config: ModelConfig
    rows: int
    sequence: int

    @property
    def step_flops(self) -> float:
        """Forward and backward of the model's products and causal attention, without recomputation."""
        c = self.config
        kv = c.kv_heads * c.head_size
        layer = c.hidden * (2 * c.hidden + 2 * kv + 3 * c.feed_forward)
        tokens = self.rows * self.sequence
        products = tokens * (c.layers * layer + c.hidden * c.vocabulary)
        attention = c.layers * self.rows * self.sequence**2 * c.hidden
        return 6.0 * products + 6.0 * attention


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def cluster(world_size: int) -> Cluster:
    """As many of this machine's device as asked for, eight to a host."""
    name = "cpu"
    if torch.cuda.is_available():
        marketing = torch.cuda.get_device_name(0).lower()
        presets = ("h200-141gb", "h100-80gb", "a100-80gb", "a100-40gb", "v100-32gb", "l40s-48gb", "t4-16gb")
        name = next((p for p in presets if p.split("-")[0] in marketing), "h100-80gb")
    hosts = max(1, world_size // 8)
    return Cluster.preset(name, hosts=hosts, devices_per_host=world_size // hosts)


def layers_that_fit(shape: dict[str, Any]) -> int:
    """Of a shape whose parameters, gradients and optimizer state should leave a fifth of the memory to activations."""
    if not torch.cuda.is_available():
        return 2
    free = torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE
    sizes = []
    for layers in (1, 2):
        with torch.device("meta"):
            module = LanguageModel(ModelConfig(layers=layers, **shape))
        sizes.append(sum(p.numel() for p in module.parameters()) * BYTES_PER_PARAMETER)
    return max(1, int((free - sizes[0]) / (sizes[1] - sizes[0])) + 1)


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.config.vocabulary, (case.rows, case.sequence + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(step: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def trainer(module: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=torch.cuda.is_available())

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def run_stage(case: Case) -> Iterator[str]:
    """Lines of the record. The two sides take turns on the device; each has it to itself, as two of them do not fit."""
    tokens, targets = (t.to(device()) for t in batch_of(case))
    torch.manual_seed(0)
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    seconds: dict[str, list[float]] = {"torch": [], "autopar": []}
    losses: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def plain() -> Callable[[], Tensor]:
        module = LanguageModel(case.config).to(device())
        compiled = torch.compile(module, backend=backend)

        def loss_of() -> Tensor:
            with torch.autocast(device().type, torch.bfloat16):
                return compiled(tokens, targets)

        return trainer(module, loss_of)

    def ours() -> Callable[[], Tensor]:
        module = LanguageModel(case.config).to(device())
        model = autopar.parallelize(
            module, (tokens, targets), precision="bfloat16", compile=backend, cluster=cluster(1), timeout_s=900
        )
        del module
        return trainer(model, lambda: model(tokens, targets))

    for turn in range(4):
        name, build = (("torch", plain), ("autopar", ours))[turn % 2]
        torch.manual_seed(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = build()
        losses[name] = step().item()
        step()
        seconds[name] += [timed(step) for _ in range(ROUNDS // 2)]
        peaks[name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        del step
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak_flops = cluster(1).device.flops_per_s["bfloat16" if torch.cuda.is_available() else "float32"]
    yield (
        f"{case.config.layers} layers, {case.rows} x {case.sequence} tokens, loss "
        + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
    )
    for name, median_s in medians.items():
        used = case.step_flops / median_s / peak_flops
        yield (
            f"{name}: median {median_s * 1e3:.1f} ms, model FLOP utilisation {used:.1%}, peak {peaks[name] / 2**30:.2f} GiB"
        )
    yield f"autopar / torch = {medians['autopar'] / medians['torch']:.4f}"


def measured_memory(rank: int, results: Any, shape: dict[str, Any], case: Case, pins: dict[str, int]) -> None:
    """In a process of its own: the peak of one rank of a plan, and the predicted one."""
    world_size = pins["data"] * pins["tensor"] * pins["pipeline"]
    join_pretended_world(rank, world_size)
    with torch.device("meta"):
        module = LanguageModel(case.config)
        example = tuple(t.to("meta") for t in batch_of(case))
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    graph = autopar.capture(module, example, precision=precision)
    hardware = cluster(world_size)
    plan = autopar.search(graph, hardware, progress=False, **pins)
    model = Model(
        graph, plan, hardware, module, seed=0, device=device(), initialise=None, constraints={}, timeout_s=600
    )
    tokens, targets = (t.to(device()) for t in batch_of(case))
    step = trainer(model, lambda: model(tokens, targets))
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        step()
    measured = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else model.measurement.peak_memory_bytes
    results.put((rank, measured, model.prediction.peak_memory_bytes[rank]))


def run_memory(shape: dict[str, Any], case: Case, most_ranks: int) -> Iterator[str]:
    """Lines of the record: the first and the last rank of every plan."""
    context = mp.get_context("spawn")
    for pins in PLANS:
        world_size = pins["data"] * pins["tensor"] * pins["pipeline"]
        if world_size > most_ranks or case.rows % (pins["data"] * pins.get("microbatches", 1)):
            continue
        for rank in sorted({0, world_size - 1}):
            results = context.SimpleQueue()
            process = context.Process(target=measured_memory, args=(rank, results, shape, case, pins))
            process.start()
            process.join()
            words = ", ".join(f"{name} {value}" for name, value in pins.items())
            if process.exitcode or results.empty():
                yield f"{words}: rank {rank} failed with exit code {process.exitcode}"
                continue
            _, measured, predicted = results.get()
            yield (
                f"{words}: rank {rank} measured {measured / 2**30:.3f} GiB, predicted {predicted / 2**30:.3f} GiB "
                f"({predicted / measured - 1:+.1%})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["stage", "memory"], help="only this one")
    parser.add_argument("--sequence", type=int, default=4096 if torch.cuda.is_available() else 32)
    parser.add_argument("--rows", type=int, default=1, help="rows of the stage's batch")
    parser.add_argument("--ranks", type=int, default=64, help="the largest world of the memory part")
    parser.add_argument("--record", type=Path, help="a file to write the figures to as well")
    arguments = parser.parse_args()
    shape = LLAMA_3_8B if torch.cuda.is_available() else SMALL
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = [f"{datetime.now():%Y-%m-%d %H:%M}, {name}, torch {torch.__version__}"]
    print(lines[0], flush=True)
    for part in (arguments.part,) if arguments.part else ("stage", "memory"):
        if part == "stage":
            config = ModelConfig(layers=layers_that_fit(shape), **shape)
            found = run_stage(Case(config, arguments.rows, arguments.sequence))
        else:
            layers = 16 if torch.cuda.is_available() else 4
            case = Case(ModelConfig(layers=layers, **shape), 64, arguments.sequence)
            found = run_memory(shape, case, arguments.ranks)
        for line in found:
            print(line, flush=True)
            lines.append(line)
    if arguments.record:
        arguments.record.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
