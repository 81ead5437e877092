"""The plans that all methods find for one model, executed: is the measured order the predicted one?

    python benchmarks/executed.py                              on 2 and on 4 ranks of this machine, over gloo
    python benchmarks/executed.py --ranks 2 --rounds 7
    python benchmarks/executed.py --record FILE                writes the tables as Markdown

The ranks probe the machine, every method of autopar.planner.search.METHODS plans for what the probe says, and a number of
searches with pinned choices see to it that the plans differ (executed_plans.py). What comes out more than once is run
once. All plans are built in the same processes and run in turn: a round is one step of each, in an order drawn anew,
after a barrier each. A step's time is that of the slowest rank, and a plan's figure the median over rounds. Every plan
starts from the same weights, and its losses must be those of the module on one device (under asynchronous schedules:
with gradients as late as the schedule has them).

A step of an asynchronous schedule is a batch amid a stream; such a plan runs several in its turn, which are divided by.

It prints Kendall's tau of the predicted and the measured step times, over all plans and over the pairs of plans whose
predictions differ by more than 3%.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.stats import kendalltau
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autopar  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from autopar.planner.search import METHODS  # noqa: E402
from autopar.report.explain import table  # noqa: E402
from autopar.runtime.agree import from_rank_zero  # noqa: E402
from autopar.schedule.orders import schedule_named  # noqa: E402
from benchmarks.executed_plans import Found, Search, all_methods, distinct, pinned  # noqa: E402
from benchmarks.vs_torch import LEARNING_RATE, LOSS_TOLERANCE, build, timed  # noqa: E402

# Predictions are apart if they differ by more than this share.
APART = 0.03
# Of an asynchronous plan, in its turn of a round.
STREAMED_BATCHES = 4

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Executed:
    """A plan that ran. times_s: of its steps after the warm-up, by round. loss_error: the worst, relative."""

    found: Found
    times_s: tuple[float, ...]
    loss_error: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def has_steps(self) -> bool:
        return schedule_named(self.found.plan.schedule).flushes

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.found.predicted_s / self.median_s - 1


class Side:
    """A plan at work, one batch after the other; what it did is in `losses`."""

    def __init__(self, found: Found, module: nn.Module, batches: Sequence[Batch], cluster: Cluster) -> None:
        self.found = found
        self.model = autopar.parallelize(module, batches[0], cluster=cluster, plan=found.plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.batches = itertools.cycle(batches)
        self.flushes = schedule_named(found.plan.schedule).flushes
        # Made without a batch being taken.
        self.stream = None if self.flushes else self.model.stream(self.batches, self.optimizer)

    @property
    def batches_per_turn(self) -> int:
        return 1 if self.flushes else STREAMED_BATCHES

    def turn(self) -> Tensor:
        """The losses of the batches of one turn."""
        if self.stream is not None:
            return torch.stack([next(self.stream) for _ in range(STREAMED_BATCHES)])
        loss = self.model(*next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()[None]

    def late(self) -> dict[str, int]:
        """How many updates the weights that a batch uses are older than the latest, by parameter."""
        plan, late = self.found.plan, {}
        graph = self.model.graph
        if self.flushes:
            return {}
        for s, stage in enumerate(plan.stages):
            steps = len(plan.stages) - 1 - s if plan.schedule == "pipedream" else 1
            for block in graph.blocks[stage.start : stage.stop]:
                late |= {graph.tensors[name].fqn: steps for name in block.parameters}
        return late

    def close(self) -> None:
        """End the stream and let go of the process groups. All ranks call it."""
        if self.stream is not None:
            self.stream.close()
        self.model.watchdog.close()
        self.model.measurement.close()
        self.model.runtime.close()


def execute(
    plans: Sequence[Found], module: nn.Module, batches: Sequence[Batch], cluster: Cluster, warm_up: int, rounds: int
) -> list[Executed]:
    """Run every plan `warm_up + rounds` times, in turn. All ranks call it with the same arguments.

    warm_up: at least 3, because the model profiles its third step. RuntimeError names the plan that cannot be run.
    """
    device = torch.device("cpu")
    sides, times_s = [], [[] for _ in plans]
    for found in plans:
        with _named(found):
            sides.append(Side(found, module, batches, cluster))
    for i in range(warm_up + rounds):
        # The same on every rank; who runs before a plan is another one each time.
        for s in random.Random(i).sample(range(len(sides)), len(sides)):
            side = sides[s]
            with _named(side.found):
                time_s, losses = timed(side.turn, device)
            side.losses += losses.tolist()
            if i >= warm_up:
                times_s[s].append(time_s / side.batches_per_turn)
    late = [side.late() for side in sides]
    expected: dict[tuple[tuple[str, int], ...], list[float]] = {}
    for of_side in late:
        key = tuple(sorted(of_side.items()))
        if key not in expected:
            # Late gradients are checked over fewer batches: each kind of delay is another run.
            count = STREAMED_BATCHES * 2 if of_side else warm_up + rounds
            expected[key] = from_rank_zero(
                lambda of_side=of_side, count=count: on_one_device(module, batches, count, of_side)
            )
    for side in sides:
        side.close()
    return [
        Executed(side.found, tuple(times), _loss_error(side.losses, expected[tuple(sorted(of_side.items()))]))
        for side, times, of_side in zip(sides, times_s, late, strict=True)
    ]


@contextmanager
def _named(found: Found) -> Iterator[None]:
    """Errors inside say which plan they come from."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{found.words}, found by {found.names}: {error}") from error


def _loss_error(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Over as many as are known of both."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=False))


def on_one_device(module: nn.Module, batches: Sequence[Batch], count: int, late: Mapping[str, int] = {}) -> list[float]:
    """The losses of `count` batches of a copy of the module; a parameter's gradient is that of the weights `late` updates ago."""
    module = copy.deepcopy(module)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE)
    history = [{name: p.detach().clone() for name, p in parameters.items()}]
    losses = []

    @torch.no_grad()
    def use(versions: Mapping[str, int]) -> None:
        for name, p in parameters.items():
            p.copy_(history[versions[name]][name])

    for i, batch in zip(range(count), itertools.cycle(batches), strict=False):
        use({name: max(0, i - late.get(name, 0)) for name in parameters})
        optimizer.zero_grad()
        loss = module(*batch)
        loss.backward()
        losses.append(loss.item())
        use(dict.fromkeys(parameters, i))
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return losses


def run_rank(rank: int, ranks: int, store: str, options: argparse.Namespace, results: Any) -> None:
    """One of `ranks` ranks; rank 0 puts (the cluster in words, the plans that ran, remarks) into `results`."""
    torch.set_num_threads(1)
    hour = datetime.timedelta(hours=1)  # ranks wait while rank 0 plans
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=hour)
    module, batches = build(options, torch.device("cpu"))
    cluster = autopar.Cluster.probe()
    searches = all_methods(options.methods) + ([] if options.unpinned else pinned(ranks, options.batch))
    remarks: list[str] = []
    plans = from_rank_zero(lambda: _plans(module, batches[0], cluster, searches, options.time_limit, remarks))
    found = execute(plans, module, batches, cluster, options.warm_up, options.rounds)
    if rank == 0:
        results.put((cluster.describe(), found, remarks))
    dist.barrier()
    dist.destroy_process_group()


def _plans(
    module: nn.Module,
    batch: Batch,
    cluster: Cluster,
    searches: Sequence[Search],
    time_limit_s: float,
    remarks: list[str],
) -> list[Found]:
    graph = autopar.capture(module, batch)

    def say(line: str) -> None:
        remarks.append(line)
        print(line, flush=True)

    start_s = time.perf_counter()
    found = distinct(graph, cluster, searches, time_limit_s, say)
    took_s = time.perf_counter() - start_s
    print(
        f"{cluster.world_size} ranks: {len(found)} different plans from {len(searches)} searches in {took_s:.0f} s",
        flush=True,
    )
    return found


def rows(found: Sequence[Executed]) -> Iterator[list[str]]:
    """Of the table, without its header."""
    for number, one in enumerate(found, 1):
        quartiles = statistics.quantiles(one.times_s, n=4)
        yield [
            str(number),
            one.found.words,
            f"{one.found.predicted_s * 1e3:.1f}",
            f"{one.median_s * 1e3:.1f}",
            f"{quartiles[0] * 1e3:.1f} to {quartiles[2] * 1e3:.1f}",
            f"{one.error:+.1%}",
            f"{one.loss_error:.1e}" + ("" if one.loss_error <= LOSS_TOLERANCE else " DISAGREES"),
            one.found.names,
        ]


HEADER = ["#", "plan", "predicted, ms", "measured, ms", "quartiles", "error", "loss error", "found by"]


def pairs_apart(first: Sequence[float], second: Sequence[float], apart: float) -> tuple[int, list[tuple[int, int]]]:
    """Of the pairs whose first figures (positive) differ by more than the share `apart` of the smaller: how many they are,
    and those (i, j) that the first puts in this order, the second strictly in the other."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(first)), 2) if first[j] > first[i] * (1 + apart)]
    return len(pairs), [(i, j) for i, j in pairs if second[j] < second[i]]


def verdict(found: Sequence[Executed]) -> str:
    """Kendall's tau, what stands in the wrong order, and how good auto's choice was."""
    predicted, measured = [one.found.predicted_s for one in found], [one.median_s for one in found]
    pairs, swapped = pairs_apart(predicted, measured, APART)
    tau = kendalltau(predicted, measured).statistic
    lines = [f"Kendall's tau-b of predicted and measured step times: {tau:.3f} ({len(found)} plans)"]
    if pairs:
        lines.append(
            f"over the {pairs} pairs predicted more than {APART:.0%} apart: {1 - 2 * len(swapped) / pairs:.3f} "
            f"({len(swapped)} in the other order)"
        )
    worst = sorted(swapped, key=lambda pair: measured[pair[1]] / measured[pair[0]])[:5]
    if worst:
        told = (f"{i + 1} before {j + 1} (measured {measured[i] / measured[j]:.2f}x)" for i, j in worst)
        lines.append("most in the wrong order: " + ", ".join(told))
    errors = [abs(one.error) for one in found]
    lines.append(f"error of the step time: mean {statistics.mean(errors):.1%}, worst {max(errors):.1%}")
    fastest_s = min((one.median_s for one in found if one.has_steps), default=math.nan)
    lines += [
        f"auto's plan takes {one.median_s / fastest_s:.3f} times the fastest with steps"
        for one in found
        if Search("auto") in one.found.searches
    ]
    return "\n".join(lines)


def spawn(ranks: int, options: argparse.Namespace) -> tuple[str, list[Executed], list[str]]:
    """What `run_rank` found, in processes of its own."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        started = mp.spawn(run_rank, (ranks, str(Path(folder) / "store"), options, results), nprocs=ranks, join=False)
        answer = None
        # A long answer fills the pipe, and its writer waits for a reader.
        while not started.join(timeout=0.1):
            if answer is None and not results.empty():
                answer = results.get()
        return answer if answer is not None else results.get()


def record(path: Path, sections: Sequence[str], options: argparse.Namespace) -> None:
    """Write the Markdown file."""
    given = [w for w in sys.argv[1:] if w != "--record" and not w.endswith(str(path))]
    head = (
        f"# Plans executed, {datetime.date.today()}\n\n"
        f"Hardware: {os.cpu_count()} cores, {platform.processor() or platform.machine()}. Software: Python "
        f"{platform.python_version()}, torch {torch.__version__}, gloo, one thread per rank.\n\n"
        f"    {' '.join(['OMP_NUM_THREADS=1 python benchmarks/executed.py', *given])}\n\n"
        f"A Llama-style byte model ({options.layers} layers, hidden {options.hidden}, {options.heads} heads over "
        f"{options.kv_heads}, feed-forward {options.feed_forward}), global batch {options.batch} x {options.sequence} "
        f"tokens, AdamW. Medians over {options.rounds} rounds after {options.warm_up} of warm-up, in which the plans take "
        "turns; predictions come from the probe alone.\n"
    )
    path.write_text("\n".join([head, *sections]), encoding="utf-8")


def section(ranks: int, cluster: str, found: Sequence[Executed], remarks: Sequence[str]) -> str:
    lines = [f"## {ranks} ranks", "", "```", cluster, "```", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows(found))]
    lines += ["", *(f"- {line}" for line in (*verdict(found).splitlines(), *remarks)), ""]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each plan")
    parser.add_argument("--warm-up", type=int, default=4, help="turns before them, at least 3")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--unpinned", action="store_true", help="only what the methods find by themselves")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds of each search")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=704)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="rows of the global batch")
    parser.add_argument("--record", type=Path, help="write a Markdown file")
    options = parser.parse_args()
    if options.rounds < 2 or options.warm_up < 3:
        parser.error("give at least 2 rounds after a warm-up of at least 3: the model profiles its third step")
    return options


def main() -> None:
    options = parse_arguments()
    agrees, sections = True, []
    for ranks in options.ranks:
        cluster, found, remarks = spawn(ranks, options)
        print(f"\n{cluster}\n\n{table(HEADER, list(rows(found)))}\n\n{verdict(found)}\n", flush=True)
        agrees = agrees and all(one.loss_error <= LOSS_TOLERANCE for one in found)
        sections.append(section(ranks, cluster, found, remarks))
        if options.record is not None:
            record(options.record, sections, options)
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
