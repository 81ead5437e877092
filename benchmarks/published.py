"""Predicted against published step times and memory: every row rebuilt (model, cluster, exact plan) and simulated.

    python benchmarks/published.py --data ../shared/published [--source vtrain] [--record FILE] [--rows FILE]

prints per source the mean absolute, median and worst error and Kendall's tau of the step times, the same of the
memory, and how rows that ran out of memory are judged. The cost model's constants are those of autopar/cost/constants.py.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from published_rows import Case, Row, read_rows, rebuild
from scipy.stats import kendalltau
from tqdm import tqdm

from autopar.cost.constants import Constants
from autopar.cost.model import CostModel
from autopar.cost.types import StageCost
from autopar.plan import Plan
from autopar.schedule.build import program_for
from autopar.schedule.step_time import step_time_s
from autopar.simulate import simulate, simulate_program, stage_peak_bytes


@dataclass(frozen=True)
class Judged:
    """One row: what was predicted, or why nothing could be. peak_bytes, first_bytes: of the fullest rank and of rank 0,
    which is the one that Megatron-DeepSpeed reports."""

    row: Row
    step_time_s: float | None = None
    peak_bytes: int | None = None
    first_bytes: int | None = None
    limit_bytes: int = 0
    reason: str = ""

    @property
    def time_error(self) -> float | None:
        """Predicted over measured, less one."""
        measured = self.row.step_time_s
        return None if measured is None or self.step_time_s is None else self.step_time_s / measured - 1

    @property
    def memory_error(self) -> float | None:
        measured = self.row.memory_gib
        return None if measured is None or self.reported_bytes is None else self.reported_bytes / 2**30 / measured - 1

    @property
    def reported_bytes(self) -> int | None:
        return self.first_bytes if self.row.software == "megatron-deepspeed" else self.peak_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.peak_bytes is None else self.peak_bytes <= self.limit_bytes


def predict(case: Case, constants: Constants | None = None) -> tuple[float, int, int]:
    """(step time, bytes of the fullest rank, of rank 0) of a case."""
    model = CostModel(case.graph, case.cluster, constants=constants)
    plan = case.plan
    costs = [model.stage(plan, i) for i in range(len(plan.stages))]
    step_s = step_s_of(plan, costs)
    if len(plan.stages) == plan.pipeline and plan.schedule == "1f1b":
        # Equal to the walk, and as fast for 2,048 microbatches as for two.
        peaks = [
            stage_peak_bytes(cost, plan.schedule, i, len(costs), plan.microbatches) for i, cost in enumerate(costs)
        ]
        return step_s, max(peaks), peaks[0]
    line = simulate(case.graph, plan, case.cluster, model)
    return step_s, max(line.peak_memory_bytes.values()), line.peak_memory_bytes[0]


def step_s_of(plan: Plan, costs: Sequence[StageCost]) -> float:
    """The step time that a throughput over many steps shows.

    ZB-H2 lets stages update their parameters without waiting for each other and correct that afterwards (Qi et al. 2023,
    section 4), so a step takes what its busiest stage takes from its first forward to its end.
    """
    if plan.schedule != "zb-h2":
        return step_time_s(plan.pipeline, plan.microbatches, plan.schedule, costs)
    events = simulate_program(program_for(plan), costs).by_rank().values()
    return max(max(e.end_s for e in row) - min(e.start_s for e in row if e.kind == "F") for row in events)


def judge(row: Row) -> Judged:
    try:
        case = rebuild(row)
        step_s, peak, first = predict(case)
    except ValueError as error:
        return Judged(row, reason=str(error))
    return Judged(row, step_s, peak, first, case.cluster.device.memory_bytes)


def judge_all(rows: Sequence[Row], quiet: bool = False) -> list[Judged]:
    """Rows of one model and batch after each other, so that its graph is made once."""
    order = sorted(rows, key=lambda r: [r.text(n) for n in ("model", "hidden", "seq_len", "global_batch", "tp")])
    found = {id(row): judge(row) for row in tqdm(order, unit="row", disable=quiet)}
    return [found[id(row)] for row in rows]


def summary(judged: Sequence[Judged]) -> str:
    """The table, one line per source and one for all."""
    lines = [
        "| source | rows | mean abs | median | worst | tau | memory rows | mean abs | median | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Judged]] = {}
    for j in judged:
        groups.setdefault(j.row.source, []).append(j)
    for name, members in [*groups.items(), ("all", list(judged))]:
        times = [j for j in members if j.time_error is not None]
        memories = [j for j in members if j.memory_error is not None]
        tau = ""
        if len(times) > 2 and name != "all":
            pairs = zip(*((j.step_time_s, j.row.step_time_s) for j in times), strict=True)
            tau = f"{kendalltau(*pairs).statistic:.2f}"
        time_words = _words([j.time_error for j in times])
        lines.append(
            f"| {name} | {len(times)} | {time_words} | {tau} | {len(memories)} | "
            f"{_words([j.memory_error for j in memories])} |"
        )
    ran = [j for j in judged if j.fits is not None and not j.row.out_of_memory]
    out = [j for j in judged if j.fits is not None and j.row.out_of_memory]
    lines += [
        "",
        f"Of {len(ran)} rows that ran, {sum(j.fits for j in ran)} are judged to fit; of {len(out)} that ran out of "
        f"memory, {sum(not j.fits for j in out)} are judged not to.",
    ]
    left = [j for j in judged if j.reason]
    if left:
        lines.append(f"{len(left)} rows are left out: " + "; ".join(sorted({j.reason for j in left})) + ".")
    return "\n".join(lines)


def _words(errors: Sequence[float]) -> str:
    if not errors:
        return " | | "
    sizes = [abs(e) for e in errors]
    worst = max(errors, key=abs)
    return f"{statistics.mean(sizes):.1%} | {statistics.median(sizes):.1%} | {worst:+.1%}"


def write_rows(path: Path, judged: Sequence[Judged]) -> None:
    """One line per row, for looking into what is off."""
    names = (
        "model",
        "gpu",
        "dtype",
        "seq_len",
        "num_gpus",
        "dp",
        "dp_mode",
        "tp",
        "pp",
        "micro_batch",
        "global_batch",
        "recompute",
        "schedule",
        "step_time_s",
        "mem_GiB",
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["file", "line", *names, "predicted_s", "error", "predicted_GiB", "memory_error", "fits", "reason"]
        )
        for j in judged:
            memory = None if j.reported_bytes is None else round(j.reported_bytes / 2**30, 2)
            writer.writerow([
                j.row.file, j.row.number, *(j.row.text(n) for n in names), j.step_time_s,
                None if j.time_error is None else round(j.time_error, 4), memory,
                None if j.memory_error is None else round(j.memory_error, 4), j.fits, j.reason,
            ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CSV files")
    parser.add_argument("--source", default="", help="only rows whose file name or source holds this")
    parser.add_argument("--record", type=Path, help="write the summary here, as Markdown")
    parser.add_argument("--rows", type=Path, help="write one line per row here, as CSV")
    args = parser.parse_args()
    judged = judge_all(read_rows(args.data, args.source))
    text = summary(judged)
    print(text)
    if args.rows:
        write_rows(args.rows, judged)
    if args.record:
        today = datetime.date.today().isoformat()
        args.record.write_text(
            f"# Predicted against published, {today}\n\n`python benchmarks/published.py --data <folder>`, "
            f"Python {platform.python_version()}, torch {torch.__version__}.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
