"""autopar against what a user would write by hand in PyTorch: same model, same ranks, step by step in turn.

    python benchmarks/vs_torch.py                              starts its own ranks
    python benchmarks/vs_torch.py ddp tensor                   only these
    torchrun --nproc-per-node=2 benchmarks/vs_torch.py ddp     in the ranks of a launcher

Each configuration has its own processes, in which both sides live. A round is one step of each, on the same batch,
after a barrier each; who goes first alternates. A step's time is that of the slowest rank, and the figure of a side the
median over rounds. Both sides start from the same weights, and their losses must agree in every round.

On a CPU each rank computes on one thread and talks over gloo; with CUDA, over NCCL, one device per rank.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autopar.schedule.orders import schedule_named  # noqa: E402
from benchmarks import torch_sides as hand_written  # noqa: E402
from benchmarks.fixed_plans import layers_by_stage, searched, staged  # noqa: E402
from launch.model import LanguageModel, ModelConfig  # noqa: E402

LOSS_TOLERANCE = 1e-3
"""Relative; float32 sums in another order, through as many AdamW steps as there are rounds."""

HALF_LOSS_TOLERANCE = 2e-2
"""The same where blocks compute with the 8 bits of bfloat16."""

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Configuration:
    """ranks: how many. target: the largest acceptable ratio of medians. constraints: what holds autopar's search.

    stage: fields of the found plan's stages that the search is not asked for. pipeline: the schedule of a pipeline over all
        ranks; one that runs several stages on a rank is not searched either (fixed_plans.py). precision: of blocks.
    """

    name: str
    ranks: int
    target: float
    against: str
    constraints: dict[str, int]
    stage: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    precision: str = "float32"


CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("eager", 1, 1.02, "the module as it is", {"data": 1, "tensor": 1, "pipeline": 1}),
        Configuration("ddp", 2, 1.03, "DistributedDataParallel", {"data": 2, "zero": 0}),
        Configuration("fsdp", 2, 1.03, "fully_shard per layer", {"data": 2, "zero": 3}),
        Configuration("zero2", 2, 1.03, "fully_shard, kept gathered", {"data": 2, "zero": 3}, {"zero": 2}),
        Configuration(
            "bf16", 2, 1.03, "fully_shard, MixedPrecisionPolicy", {"data": 2, "zero": 3}, precision="bfloat16"
        ),
        Configuration("tensor", 2, 0.85, "parallelize_module, column/row", {"tensor": 2}),
        Configuration("pipeline", 2, 1.03, "Schedule1F1B", {"pipeline": 2}, pipeline="1f1b"),
        Configuration("interleaved", 2, 1.03, "ScheduleInterleaved1F1B", {}, pipeline="interleaved"),
        Configuration("zero-bubble", 2, 1.03, "ScheduleZBVZeroBubble", {}, pipeline="zb-v"),
        Configuration("ddp4", 4, 1.03, "DistributedDataParallel", {"data": 4, "zero": 0}),
        Configuration("fsdp4", 4, 1.03, "fully_shard per layer", {"data": 4, "zero": 3}),
        Configuration("tensor4", 4, 0.85, "parallelize_module, column/row", {"tensor": 4}),
        Configuration("pipeline4", 4, 1.03, "Schedule1F1B", {"pipeline": 4}, pipeline="1f1b"),
    )
}


class Autopar:
    """Our side: the public interface, and the loop of a module on one device."""

    def __init__(
        self,
        module: LanguageModel,
        batch: tuple[Tensor, Tensor],
        constraints: dict[str, Any],
        cluster: str | None,
        configuration: Configuration,
    ) -> None:
        import autopar

        hardware = autopar.Cluster.probe() if cluster is None else None
        if cluster is not None:
            ranks = dist.get_world_size()
            path = Path(cluster)
            load, preset = autopar.Cluster.load, autopar.Cluster.preset
            hardware = load(path) if path.exists() else preset(cluster, hosts=1, devices_per_host=ranks)
        precision = configuration.precision
        plan = None
        if configuration.stage or configuration.pipeline in ("interleaved", "zb-v"):
            graph = autopar.capture(module, batch, precision=precision)
            if configuration.stage:
                plan = searched(graph, hardware, constraints | {"recompute": "none"}, configuration.stage)
            else:
                plan = staged(graph, configuration.pipeline, configuration.ranks, constraints["microbatches"])
        options = {"plan": plan} if plan is not None else {"recompute": "none", "precision": precision} | constraints
        self.model = autopar.parallelize(module, batch, cluster=hardware, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, value: Tensor) -> float:
        return value.item()

    def held_elements(self) -> int:
        """Parameter elements that lie on this rank."""
        return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in self.model.parameters())


def hand_side(
    configuration: Configuration,
    module: LanguageModel,
    device: torch.device,
    options: argparse.Namespace,
    ours: Autopar | None,
) -> Any:
    """The hand-written side of a configuration; a pipeline is cut where ours is."""
    name = configuration.name.rstrip("4")
    if name == "eager":
        return hand_written.Eager(module, LEARNING_RATE)
    if name == "ddp":
        return hand_written.Replicated(module, LEARNING_RATE, device)
    if name in ("fsdp", "zero2", "bf16"):
        return hand_written.FullySharded(module, LEARNING_RATE, device, name == "zero2", name == "bf16")
    if name == "tensor":
        return hand_written.TensorParallel(module, LEARNING_RATE, device, options.shard_ends)
    schedule, ranks = configuration.pipeline, configuration.ranks
    order = schedule_named(schedule)
    num_stages = ranks * (order.virtual or 2)
    owners = [order.group_of(s, ranks) for s in range(num_stages)]
    starts = [round(s * len(module.layers) / num_stages) for s in range(num_stages + 1)]
    layers = [range(starts[s], starts[s + 1]) for s in range(num_stages)]
    if ours is not None:
        layers = layers_by_stage(ours.model.graph, ours.model.plan)
    microbatches = _microbatches(configuration, options)
    return hand_written.Pipeline(module, LEARNING_RATE, device, microbatches, layers, owners, schedule)


def _microbatches(configuration: Configuration, options: argparse.Namespace) -> int:
    """As many as torch's schedules take: those that run two stages on a rank want multiples of the ranks."""
    return options.microbatches if configuration.pipeline else 1


def _gathered(value: Any) -> list[Any]:
    """`value` of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def run_rank(rank: int, name: str, store: str | None, options: argparse.Namespace, results: Any) -> None:
    """One rank of one configuration. store: path of a FileStore; None under a launcher."""
    configuration = CONFIGURATIONS[name]
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if store is None:
        dist.init_process_group(backend)
        rank = dist.get_rank()
    else:
        files = dist.FileStore(store, configuration.ranks)
        dist.init_process_group(backend, store=files, rank=rank, world_size=configuration.ranks)
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    record = compare(configuration, device, options)
    if rank == 0:
        if results is not None:
            results.put(record)
        else:
            report(record)
    dist.barrier()
    dist.destroy_process_group()


def build(options: argparse.Namespace, device: torch.device) -> tuple[LanguageModel, list[tuple[Tensor, Tensor]]]:
    """The model of the sizes that `options` name and four batches, the same on every rank."""
    torch.manual_seed(0)
    config = ModelConfig(
        options.vocabulary, options.layers, options.hidden, options.heads, options.kv_heads, options.feed_forward
    )
    module = LanguageModel(config).to(device)
    shape = (options.batch, options.sequence + 1)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(options.vocabulary, shape, generator=generator).to(device) for _ in range(4)]
    return module, [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts]


def compare(configuration: Configuration, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn; the record of what was measured."""
    module, batches = build(options, device)
    num_parameters = sum(p.numel() for p in module.parameters())
    constraints = {"data": 1, "tensor": 1, "pipeline": 1, "microbatches": _microbatches(configuration, options)}
    constraints |= configuration.constraints
    if configuration.pipeline:
        constraints["schedule"] = configuration.pipeline
    sides: dict[str, Any] = {}
    ours = None
    if not options.torch_only:
        ours = sides["autopar"] = Autopar(
            copy.deepcopy(module), batches[0], constraints, options.cluster, configuration
        )
    sides["torch"] = hand_side(configuration, module, device, options, ours)

    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(options.warm_up + options.rounds):
        order = list(sides) if i % 2 else list(sides)[::-1]
        for side in order:
            time_s, value = timed(lambda side=side, i=i: sides[side].step(*batches[i % len(batches)]), device)
            losses[side].append(sides[side].loss(value))
            if i >= options.warm_up:
                times[side].append(time_s)
    worst = max(abs(a / b - 1) for a, b in zip(losses["torch"], losses[list(sides)[0]], strict=True))
    record: dict[str, Any] = {
        "name": configuration.name,
        "against": configuration.against,
        "target": configuration.target,
        "parameters": num_parameters,
        "median_s": {side: statistics.median(values) for side, values in times.items()},
        "loss_error": worst,
        "loss_tolerance": LOSS_TOLERANCE if configuration.precision == "float32" else HALF_LOSS_TOLERANCE,
        "losses": losses,
    }
    if ours is not None:
        pairs = [a / b for a, b in zip(times["autopar"], times["torch"], strict=True)]
        quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
        measured = ours.model.timeline
        record |= {
            "ratio": record["median_s"]["autopar"] / record["median_s"]["torch"],
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "splits": any(_is_split(key) for layout in ours.model.plan.layouts for key in layout.strategies),
            "held_share": max(_gathered(ours.held_elements())) / record["parameters"],
            "predicted_s": ours.model.prediction.step_time_s,
            "predicted_peak_bytes": dict(ours.model.prediction.peak_memory_bytes),
            "measured_peak_bytes": dict(measured.peak_memory_bytes) if measured is not None else {},
        }
    return record


def timed(step: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of the slowest rank, from a common start to the end of all work on the device."""
    dist.barrier()
    _finish(device)
    start_s = time.perf_counter()
    value = step()
    _finish(device)
    slowest = torch.tensor(time.perf_counter() - start_s, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item(), value


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_split(strategy: str) -> bool:
    """Whether the strategy of this key shares an op's work out over the tensor axis."""
    return strategy not in ("-", "shared") and not strategy.startswith("partial")


def report(record: dict[str, Any]) -> bool:
    """Print one configuration; whether it meets its target and the losses agree."""
    print(f"{record['name']}: autopar against {record['against']}")
    for side, median_s in record["median_s"].items():
        print(f"  {side:8} {median_s * 1e3:10.2f} ms a step, loss {record['losses'][side][-1]:.6f}")
    agrees = record["loss_error"] <= record["loss_tolerance"]
    if "ratio" not in record:
        return agrees
    met = record["ratio"] <= record["target"]
    verdict = "met" if met else "MISSED"
    if record["name"].startswith("tensor") and not record["splits"]:
        met, verdict = False, "VOID: every rank computes everything, see --cluster"
    low, high = record["ratio_quartiles"]
    aim = f"target {record['target']:.2f}: {verdict}"
    print(f"  ratio    {record['ratio']:10.3f} ({aim}; quartiles of the rounds' ratios {low:.3f} to {high:.3f})")
    print(f"  losses differ by at most {record['loss_error']:.1e} relative{'' if agrees else ': THEY DISAGREE'}")
    print(f"  the fullest rank holds {record['held_share']:.0%} of the parameters")
    predicted_s, measured_s = record["predicted_s"], record["median_s"]["autopar"]
    print(f"  predicted step {predicted_s * 1e3:10.2f} ms, error {predicted_s / measured_s - 1:+.1%}")
    for rank, measured in sorted(record["measured_peak_bytes"].items()):
        predicted = record["predicted_peak_bytes"][rank]
        sizes = f"predicted {predicted / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB"
        print(f"  peak memory of rank {rank}: {sizes}, error {predicted / measured - 1:+.1%}")
    sys.stdout.flush()
    return agrees and met


def spawn(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one configuration, from processes of its own."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (name, str(Path(folder) / "store"), options, results)
        mp.spawn(run_rank, arguments, nprocs=CONFIGURATIONS[name].ranks)
        return results.get()


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """What `build` needs."""
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="rows of the global batch")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"configurations: {', '.join(CONFIGURATIONS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each side")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    add_sizes(parser)
    parser.add_argument("--microbatches", type=int, default=4, help="of the pipeline")
    parser.add_argument("--shard-ends", action="store_true", help="by hand, also split embedding and head on tensor=2")
    parser.add_argument("--torch-only", action="store_true", help="run the hand-written sides alone")
    parser.add_argument("--cluster", help="plan for this preset or cluster file instead of probing the machine")
    parser.add_argument("--json", type=Path, help="append the records, with hardware and versions, to this file")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(CONFIGURATIONS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not a configuration; choose among {', '.join(CONFIGURATIONS)}")
    options.names = options.names or list(CONFIGURATIONS)
    return options


def main() -> None:
    options = parse_arguments()
    if dist.is_torchelastic_launched():
        if len(options.names) != 1:
            raise SystemExit("under a launcher, name one configuration whose number of ranks is the launcher's")
        run_rank(0, options.names[0], None, options, None)
        return
    met = True
    for name in options.names:
        record = spawn(name, options)
        met = report(record) and met
        if options.json is not None:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
            about = {"date": datetime.now().isoformat("T", "seconds"), "device": device, "torch": torch.__version__}
            about |= {"python": platform.python_version(), "command": " ".join(sys.argv)}
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(about | record) + "\n")
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
