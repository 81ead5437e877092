"""A mixed-integer linear program, built column by column and solved by HiGHS."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

# How often a solver that runs is looked after; and how long it may take to end when told so. It does not listen while it
# presolves: then it is left alone with its copy of the program, and ends by its time limit.
WATCH_S, GRACE_S = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class MilpSolution:
    """values per column; no solution is below `bound`."""

    values: np.ndarray
    objective: float
    bound: float


@dataclass
class Milp:
    """minimise cost . x subject to rows; columns are continuous or whole numbers within bounds."""

    _cost: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _rows: list[tuple[Sequence[int], Sequence[float], float, float]] = field(default_factory=list)

    def column(self, cost: float = 0.0, upper: float = math.inf, integer: bool = False) -> int:
        """A new variable in [0, upper]; its number."""
        self._cost.append(cost)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self._cost) - 1

    def columns(self, costs: np.ndarray, upper: float = math.inf) -> np.ndarray:
        """Continuous variables in [0, upper], one per cost; their numbers."""
        first = len(self._cost)
        self._cost += costs.tolist()
        self._upper += [upper] * len(costs)
        self._integer += [False] * len(costs)
        return np.arange(first, len(self._cost))

    def row(self, columns: Sequence[int], values: Sequence[float], lower: float, upper: float) -> None:
        """lower <= sum of values * columns <= upper."""
        self._rows.append((columns, values, lower, upper))

    def solve(
        self, limit_s: float = math.inf, gap: float = 1e-6, is_over: Callable[[], bool] = lambda: False
    ) -> MilpSolution | None:
        """The optimum (or the best within limit_s); None if there is no solution (or none was found in time).

        is_over: asked every `WATCH_S`; once it is true the best so far is the answer. Ctrl-C ends the solver too.
        """
        cost, num = np.array(self._cost), len(self._cost)
        # HiGHS' tolerances are absolute, and seconds are small
        unit = float(np.abs(cost).max(initial=0.0)) / 1e3 or 1.0
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = num, len(self._rows)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost / unit, np.zeros(num), np.array(self._upper)
        lp.row_lower_ = np.array([row[2] for row in self._rows])
        lp.row_upper_ = np.array([row[3] for row in self._rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        sizes = np.cumsum([len(row[0]) for row in self._rows])
        lp.a_matrix_.start_ = np.concatenate([[0], sizes]).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([row[0] for row in self._rows]).astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate([row[1] for row in self._rows]).astype(float)
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[whole] for whole in self._integer]
        highs = highspy.Highs()
        for option, value in (
            ("output_flag", False), ("threads", 1), ("mip_rel_gap", gap), ("mip_abs_gap", 1e-7),
            ("time_limit", max(0.1, min(limit_s, 1e7))),
        ):  # fmt: skip
            assert highs.setOptionValue(option, value) == highspy.HighsStatus.kOk, option
        highs.passModel(lp)
        if not _run(highs, is_over):
            return None
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        values = np.asarray(highs.getSolution().col_value)
        return MilpSolution(values, float(cost @ values), info.mip_dual_bound * unit)


def _run(highs: highspy.Highs, is_over: Callable[[], bool]) -> bool:
    """Solve in a thread of its own, so that this one hears of Ctrl-C and can ask `is_over`; whether it has ended."""
    highs.HandleUserInterrupt = True
    solver = threading.Thread(target=highs.run, daemon=True)
    solver.start()
    try:
        solver.join(WATCH_S)
        while solver.is_alive() and not is_over():
            solver.join(WATCH_S)
    finally:
        if solver.is_alive():
            highs.cancelSolve()
            solver.join(GRACE_S)
    return not solver.is_alive()
