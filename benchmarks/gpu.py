"""One GPU: a stage of Llama-3-8B's shape against the plain torch module, and one rank's memory under larger plans.

    python benchmarks/gpu.py                          both parts; writes a record to --record if given
    python benchmarks/gpu.py stage --sequence 4096    only the first
    python benchmarks/gpu.py memory --ranks 64        only the second

stage: as many of the model's layers as fit, in bfloat16 from float32 parameters, compiled; autopar's module against the
same module under torch.autocast and torch.compile. Steps of the two alternate; medians, their ratio, and the share of the
device's peak that the model's own floating point operations make.

memory: plans of up to 64 ranks, searched for a cluster of this device. The first and the last rank of each run alone
under torch's fake process group (of a plan with one stage only the first: all are alike); the allocator's peak is held
against the predicted one. The plans of a precision run one after the other in a process of their own, those of both
precisions side by side.

On a machine without a GPU both parts run on a small shape on the CPU. Of the stage that shows only that it runs; the
memory is that of live tensors, counted one by one (rank_memory.py).
"""

from __future__ import annotations

import argparse
import gc
import platform
import queue
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autopar  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from benchmarks.rank_memory import RankMemory, rank_memory, with_stages  # noqa: E402
from launch.model import LanguageModel, ModelConfig  # noqa: E402

LLAMA_3_8B = dict(vocabulary=128256, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, rotary_base=500000.0)
SMALL = dict(vocabulary=512, hidden=128, heads=4, kv_heads=2, feed_forward=384)
BYTES_PER_PARAMETER = 20  # parameter, gradient and AdamW's two moments in float32, and the copy to compute with
MEMORY_SHARE = 0.72
ROUNDS = 10
Plans = tuple[dict[str, Any], dict[str, Any]]
PLANS: tuple[Plans, ...] = (
    ({"data": 8, "zero": 0}, {}),
    ({"data": 8, "zero": 3, "microbatches": 2}, {"zero": 1}),
    ({"data": 8, "zero": 3}, {"zero": 2}),
    ({"data": 8, "zero": 3}, {}),
    ({"data": 64, "zero": 3}, {}),
    ({"data": 8, "zero": 3, "microbatches": 4}, {"recompute": "full"}),
    ({"data": 8, "zero": 3}, {"recompute": "selective"}),
    ({"data": 2, "tensor": 4, "zero": 0}, {}),
    ({"tensor": 2, "pipeline": 4, "microbatches": 8, "zero": 0, "schedule": "1f1b"}, {}),
    ({"data": 8, "pipeline": 4, "microbatches": 4, "zero": 0, "schedule": "gpipe"}, {"recompute": "full"}),
    ({"data": 8, "tensor": 4, "pipeline": 2, "microbatches": 4, "zero": 3, "schedule": "1f1b"}, {}),
    ({"data": 4, "tensor": 8, "pipeline": 2, "microbatches": 4, "zero": 0, "schedule": "1f1b"}, {}),
)
"""What the search is held to (other degrees are 1), and what its stages are given besides."""
PRECISIONS = ("float32", "bfloat16")


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
    """Of a shape whose parameters, gradients and optimizer state should leave a good quarter of the memory to activations."""
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
    predicted: dict[str, float] = {}

    def module_on_device() -> LanguageModel:
        with device():
            return LanguageModel(case.config)

    def plain() -> Callable[[], Tensor]:
        module = module_on_device()
        compiled = torch.compile(module, backend=backend)

        def loss_of() -> Tensor:
            with torch.autocast(device().type, torch.bfloat16):
                return compiled(tokens, targets)

        return trainer(module, loss_of)

    def ours() -> Callable[[], Tensor]:
        module = module_on_device()
        model = autopar.parallelize(
            module, (tokens, targets), precision="bfloat16", compile=backend, cluster=cluster(1), timeout_s=900
        )
        del module
        predicted["step"] = model.prediction.step_time_s
        predicted["peak"] = model.prediction.peak_memory_bytes[0]
        return trainer(model, lambda: model(tokens, targets))

    for turn in range(4):
        name, build = (("torch", plain), ("autopar", ours))[turn % 2]
        torch.manual_seed(0)
        # Else what was compiled for one side keeps its parameters.
        torch.compiler.reset()
        gc.collect()
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
    yield (
        f"predicted: {predicted['step'] * 1e3:.1f} ms ({predicted['step'] / medians['autopar'] - 1:+.1%}), "
        f"{predicted['peak'] / 2**30:.2f} GiB"
    )


def measured_memory(case: Case, precision: str, plans: Sequence[Plans], results: Any) -> None:
    """In a process of its own: (words, rank, peaks measured and predicted or what went wrong) of some ranks of each plan."""
    torch.set_num_threads(1 if device().type == "cpu" else 4)
    with torch.device("meta"):
        module = LanguageModel(case.config)
    batch = batch_of(case)
    graph = autopar.capture(module, batch, precision=precision)
    for held, given in plans:
        pins = all_pins(held)
        world_size = num_ranks(pins)
        words = f"{precision}, " + ", ".join(f"{name} {value}" for name, value in (held | given).items())
        for rank in sorted({0, world_size - 1} if pins["pipeline"] > 1 else {0}):
            found: RankMemory | str
            try:
                # autopar's runtime alone: what the driver and libraries hold is not in the allocator's count.
                hardware = replace(cluster(world_size), software="")
                plan = with_stages(autopar.search(graph, hardware, progress=False, **pins), given)
                found = rank_memory(graph, plan, hardware, module, batch, rank, device())
            except Exception as error:  # one plan that fails, out of memory say, must not hide the others
                found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            results.put((words, rank, found))


def all_pins(held: dict[str, Any]) -> dict[str, Any]:
    return {"data": 1, "tensor": 1, "pipeline": 1, "recompute": "none"} | held


def num_ranks(pins: dict[str, Any]) -> int:
    return pins["data"] * pins["tensor"] * pins["pipeline"]


def run_memory(case: Case, most_ranks: int, precisions: Sequence[str]) -> Iterator[str]:
    """Lines of the record, as the ranks of all plans come in."""
    context = mp.get_context("spawn")
    errors: list[float] = []
    plans = [
        (held, given)
        for held, given in PLANS
        for pins in [all_pins(held)]
        if num_ranks(pins) <= most_ranks and case.rows % (pins["data"] * pins.get("microbatches", 1)) == 0
    ]
    results = context.Queue()
    processes = [
        # In turn from either end, so that the largest plans do not meet on the device.
        context.Process(target=measured_memory, args=(case, precision, plans[:: 1 - 2 * (i % 2)], results))
        for i, precision in enumerate(precisions)
    ]
    for process in processes:
        process.start()
    for words, rank, found in until_ended(results, processes):
        if isinstance(found, str):
            yield f"{words}: rank {rank} failed, {found}"
            continue
        errors.append(found.error)
        yield (
            f"{words}: rank {rank} measured {found.measured_bytes / 2**20:.1f} MiB, "
            f"predicted {found.predicted_bytes / 2**20:.1f} MiB ({found.error:+.1%})"
        )
    for process in processes:
        process.join()
        if process.exitcode:
            yield f"a process ended with exit code {process.exitcode}"
    if errors:
        within = sum(abs(error) <= 0.05 for error in errors)
        yield f"{within} of {len(errors)} within 5%, largest error {max(errors, key=abs):+.1%}"


def until_ended(results: Any, processes: Sequence[Any]) -> Iterator[tuple[str, int, RankMemory | str]]:
    """What comes in until the last process has ended."""
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            yield results.get(timeout=1.0)
        except queue.Empty:
            if not running:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["stage", "memory"], help="only this one")
    parser.add_argument("--layers", type=int, default=0, help="of the stage (default: as many as fit)")
    parser.add_argument("--sequence", type=int, default=8192 if torch.cuda.is_available() else 64)
    parser.add_argument("--rows", type=int, default=1, help="rows of the stage's batch")
    parser.add_argument("--ranks", type=int, default=64, help="the largest world of the memory part")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS, help="of the memory part")
    parser.add_argument("--record", type=Path, help="a file to write the figures to as well")
    arguments = parser.parse_args()
    shape = LLAMA_3_8B if torch.cuda.is_available() else SMALL
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = [f"{datetime.now():%Y-%m-%d %H:%M}, {name}, torch {torch.__version__}"]
    print(lines[0], flush=True)
    for part in (arguments.part,) if arguments.part else ("stage", "memory"):
        if part == "stage":
            config = ModelConfig(layers=arguments.layers or layers_that_fit(shape), **shape)
            found = run_stage(Case(config, arguments.rows, arguments.sequence))
        else:
            # Of the real width, and of such a length that replicas without ZeRO still fit beside the other precision's.
            sequence = min(arguments.sequence, 512)
            case = Case(ModelConfig(layers=4, **shape), 64, sequence)
            found = run_memory(case, arguments.ranks, arguments.precisions)
        for line in found:
            print(line, flush=True)
            lines.append(line)
    if arguments.record:
        arguments.record.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
