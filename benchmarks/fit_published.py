"""Fits the constants of autopar/cost/constants.py to published step times, all rows together, and cross-validates.

    python benchmarks/fit_published.py --data ../shared/published [--folds 5] [--source vtrain]

minimises sum of w rho(log(predicted / measured)) + sum of ((log x - log x0) / spread)^2 over the constants below. rho is
the soft L1 loss (rows that something odd happened to count little), w weighs a source by the square root of its number
of rows, and x0 are the values that constants.py holds now: what no row speaks of stays as it is. Prints the tables to
put there, and with --folds the error on rows that a fit has not seen.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from published import step_s_of
from published_rows import Case, Row, read_rows, rebuild
from scipy.optimize import least_squares
from scipy.stats import kendalltau
from tqdm import tqdm

from autopar.cost.constants import HARDWARE, Constants, named_constants
from autopar.cost.model import CostModel

# name: (least, most, spread of the logarithm). Shares stay below 1.
_HARDWARE = {
    "matmul_share": (0.3, 0.98, 0.2),
    "matmul_setup_s": (1e-6, 3e-5, 0.7),
    "wave_setup_s": (2e-7, 1e-5, 0.7),
    "unaligned_share": (0.1, 1.0, 0.5),
    "half_aligned_share": (0.5, 1.0, 0.1),
    "attention_share": (0.2, 0.95, 0.3),
    "attention_backward_share": (0.1, 0.9, 0.3),
    "attention_half_length": (20.0, 3000.0, 0.7),
    "stream_share": (0.4, 0.95, 0.1),
    "link_share": (0.3, 1.2, 0.3),
    "network_share": (0.2, 1.2, 0.3),
    "collective_s": (2e-6, 2e-4, 0.7),
}
_SOFTWARE = {
    "launch_s": (2e-6, 1e-4, 0.7),
    "backward_launch_s": (2e-6, 1e-4, 0.7),
    "collective_launch_s": (5e-6, 3e-4, 0.7),
    "fusion": (0.1, 3.0, 0.4),
    "product_scale": (0.7, 1.4, 0.1),
    "attention_scale": (0.2, 2.0, 0.4),
    "kernel_s": (5e-7, 1e-5, 0.5),
    "microbatch_s": (1e-5, 1e-2, 1.0),
    "step_s": (1e-5, 1e-1, 1.0),
    "optimizer_passes": (4.0, 40.0, 0.5),
    "overlap": (0.02, 1.25, 0.5),
    "gather_overlap": (0.05, 1.25, 0.3),
    "tensor_overlap": (0.01, 1.0, 0.5),
}


_MOVE = 0.02  # of a logarithm, for a derivative


@dataclass(frozen=True)
class Parameter:
    """One constant of one kind of hardware ("hardware", "a100") or stack ("software", "composer")."""

    table: str
    key: str
    name: str
    start: float
    least: float
    most: float
    spread: float


@dataclass
class Sample:
    """A case that can be priced again and again; `model` shares what constants do not change."""

    case: Case
    model: CostModel
    hardware: str
    software: str
    weight: float = 1.0

    def step_s(self, constants: Constants) -> float:
        plan = self.case.plan
        model = self.model.with_constants(constants)
        costs = [model.stage(plan, i) for i in range(len(plan.stages))]
        return step_s_of(plan, costs)

    @property
    def measured_s(self) -> float:
        return self.case.row.step_time_s


def samples(folder: Path, source: str, most: int) -> list[Sample]:
    """At most `most` rows of each source, spread evenly."""
    rows: dict[str, list[Row]] = {}
    for row in read_rows(folder, source):
        if row.step_time_s is not None:
            rows.setdefault(row.source, []).append(row)
    chosen = [row for members in rows.values() for row in members[:: -(-len(members) // most)]]
    found = []
    for row in tqdm(chosen, unit="row", desc="rebuild"):
        try:
            case = rebuild(row)
        except ValueError:
            continue
        kind = case.cluster.device.kind
        hardware = next((name for name in sorted(HARDWARE, key=len, reverse=True) if kind.startswith(name)), "")
        found.append(Sample(case, CostModel(case.graph, case.cluster), hardware, case.row.software))
    counts = Counter(s.case.row.source for s in found)
    for s in found:
        s.weight = counts[s.case.row.source] ** -0.25
    return found


def parameters(data: Sequence[Sample]) -> list[Parameter]:
    """Those of all kinds of hardware and all stacks in the data, with the values that constants.py has."""
    found = []
    for table, fields in (("hardware", _HARDWARE), ("software", _SOFTWARE)):
        for key in sorted({getattr(s, table) for s in data}):
            at = named_constants(key, "") if table == "hardware" else named_constants("", key)
            for name, (least, most, spread) in fields.items():
                # Of a constant that is nothing so far the fit starts in the middle of what it may be.
                start = min(max(getattr(at, name) or math.sqrt(least * most), least), most)
                found.append(Parameter(table, key, name, start, least, most, spread))
    return found


def constants_for(sample: Sample, chosen: Sequence[Parameter], x: np.ndarray) -> Constants:
    base = sample.model.constants
    changes = {
        p.name: float(np.exp(value)) for p, value in zip(chosen, x, strict=True) if getattr(sample, p.table) == p.key
    }
    return replace(base, **changes)


def error(sample: Sample, chosen: Sequence[Parameter], x: np.ndarray) -> float:
    """What least squares see of a row."""
    return sample.weight * 10 * np.log(sample.step_s(constants_for(sample, chosen, x)) / sample.measured_s)


def slopes(data: Sequence[Sample], chosen: Sequence[Parameter], x: np.ndarray) -> np.ndarray:
    """[rows, constants]: derivatives of the errors. Half of a fit's time or more, and alike for all subsets of rows."""
    base = [error(s, chosen, x) for s in data]
    found = np.zeros((len(data), len(chosen)))
    for j, p in enumerate(tqdm(chosen, desc="slopes", leave=False)):
        moved = x.copy()
        moved[j] += _MOVE if moved[j] + _MOVE < math.log(p.most) else -_MOVE
        for i, s in enumerate(data):
            if getattr(s, p.table) == p.key:
                found[i, j] = (error(s, chosen, moved) - base[i]) / (moved[j] - x[j])
    return found


def fit(data: Sequence[Sample], chosen: Sequence[Parameter], steps: int, jacobian: np.ndarray) -> np.ndarray:
    """Logarithms of the constants. jacobian: `slopes` of these rows, at values that need not be near."""
    start = np.log([p.start for p in chosen])
    spread = np.array([p.spread for p in chosen])
    low, high = np.log([p.least for p in chosen]) - 1e-9, np.log([p.most for p in chosen]) + 1e-9
    whole = np.concatenate([jacobian, np.diag(1 / spread)])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([[error(s, chosen, x) for s in data], (x - start) / spread])

    return least_squares(
        residuals, np.clip(start, low, high), lambda x: whole, (low, high), loss="soft_l1", f_scale=1.0, max_nfev=steps,
        xtol=1e-4, ftol=1e-4,
    ).x  # fmt: skip


def report(title: str, data: Sequence[Sample], predicted: Sequence[float]) -> None:
    print(f"\n{title}")
    groups: dict[str, list[tuple[float, float]]] = {}
    for s, p in zip(data, predicted, strict=True):
        groups.setdefault(s.case.row.source, []).append((p, s.measured_s))
    for name, pairs in [*groups.items(), ("all", [pair for g in groups.values() for pair in g])]:
        sizes = [abs(p / m - 1) for p, m in pairs]
        tau = f"{kendalltau(*zip(*pairs, strict=True)).statistic:5.2f}" if len(pairs) > 2 and name != "all" else "     "
        bias = statistics.median(p / m - 1 for p, m in pairs)
        print(
            f"  {name:42s} {len(pairs):4d} rows  mean {statistics.mean(sizes):6.1%}  median "
            f"{statistics.median(sizes):6.1%}  worst {max(sizes):7.1%}  tau {tau}  bias {bias:+6.1%}"
        )


def predictions(data: Sequence[Sample], chosen: Sequence[Parameter], x: np.ndarray) -> list[float]:
    return [s.step_s(constants_for(s, chosen, x)) for s in data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--folds", type=int, default=0, help="also cross-validate with this many random folds")
    parser.add_argument("--leave-out", action="store_true", help="also leave out one source at a time")
    parser.add_argument("--most", type=int, default=10_000, help="rows per source, spread evenly")
    parser.add_argument("--rounds", type=int, default=1, help="fits in turn, each with the last one's values as x0")
    parser.add_argument("--steps", type=int, default=12, help="evaluations of the least squares")
    args = parser.parse_args()
    data = samples(args.data, args.source, args.most)
    chosen = parameters(data)
    start = np.log([p.start for p in chosen])
    report("as constants.py is", data, predictions(data, chosen, start))
    x = start
    for _ in range(args.rounds):
        moved = [replace(p, start=float(np.exp(value))) for p, value in zip(chosen, x, strict=True)]
        jacobian = slopes(data, chosen, x)
        x = fit(data, moved, args.steps, jacobian)
    report("fitted", data, predictions(data, chosen, x))
    key = None
    for p, value in zip(chosen, np.exp(x), strict=True):
        if (p.table, p.key) != key:
            key = (p.table, p.key)
            print(f"\n{p.table} {p.key!r}:")
        print(f'    "{p.name}": {value:.3g},   # was {p.start:.3g}')
    # From what holds for any hardware and any stack: the values of constants.py have seen the rows that are left out.
    blind = [replace(p, start=_general(p), spread=2 * p.spread) for p in chosen]
    if args.folds:
        turn = np.random.default_rng(0).permutation(len(data)) % args.folds
        report(f"{args.folds} random folds", data, held_out(data, blind, args.steps, jacobian, turn.tolist()))
    if args.leave_out:
        sources = [s.case.row.source for s in data]
        report("one source at a time left out", data, held_out(data, blind, args.steps, jacobian, sources))


def _general(parameter: Parameter) -> float:
    """The default of a constant, or the middle of what it may be where that is nothing."""
    value = getattr(Constants(), parameter.name) or math.sqrt(parameter.least * parameter.most)
    return min(max(value, parameter.least), parameter.most)


def held_out(
    data: Sequence[Sample], chosen: Sequence[Parameter], steps: int, jacobian: np.ndarray, parts: Sequence[int | str]
) -> list[float]:
    """Step times of every row by a fit on the rows of the other parts."""
    found = [0.0] * len(data)
    for part in tqdm(sorted(set(parts)), desc="parts"):
        rest = [i for i, p in enumerate(parts) if p != part]
        x = fit([data[i] for i in rest], chosen, steps, jacobian[rest])
        for i, s in enumerate(data):
            if parts[i] == part:
                found[i] = s.step_s(constants_for(s, chosen, x))
    return found


if __name__ == "__main__":
    main()
