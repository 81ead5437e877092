"""The integer program of one block, and its solution with HiGHS.

Variables (all in [0, 1]); c is a choice, i one of its options, T a tensor, p and q placements:

    x[c, i]        option i of choice c is taken
    e[T, k, p, q]  T is placed p by its source and wanted q by its k-th sink
    m[T, p, q]     T is converted from p to q, for whichever sinks
    y[T, g]        storage g of T is kept for the backward

    minimise  sum x cost + sum m cost + sum y cost,        cost = seconds + weight bytes
    (1)  sum_i x[c, i] = 1                                                              _add_choices
    (2)  sum_q e[T, k, p, q] = sum of x[source, i] over the options i that give p        _marginal
         sum_p e[T, k, p, q] = sum of x[sink k, i] over the options i that want q
    (3)  m[T, p, q] >= e[T, k, p, q] for every k                                         _add_payment
    (4)  y[T, g] >= sum of x[h, i] over the options i of holder h that keep g            _add_payment
    (5)  sum of bytes <= limit                                                           solve

Equations (2) are the transport form: on a tree of choices the relaxation has integral vertices (it is the local
polytope of a pairwise model, exact on trees), where e >= x_p + x_q - 1 would be far weaker. Not every e is a variable:
where the source has one placement, or the sink one wish, (2) makes e equal to a sum of x; where only one sink can want
q, (3) is an equality and m is that e; likewise (4) with one holder. A flow whose conversions are all free is left out.

`BlockProgram.solve` first relaxes. If the relaxation is integral, or its rounding costs as little as its bound, that
is the optimum; else the integer program is solved from there. The program is kept in HiGHS, so that a next call that
differs in the boundary placements or in the weight starts from the last basis.

Reference: transport (local polytope) relaxation as in M. Wainwright and M. Jordan, "Graphical Models, Exponential
Families, and Variational Inference", section 8; HiGHS: Q. Huangfu and J. Hall, Math. Prog. Comp. 10 (2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from ..sharding.placement import Placement
from .layout_costs import storage
from .layout_model import BlockModel, Flow, Keep, Price, Use

# Two objective values this close (relative to the larger) are the same optimum: far above the rounding of double sums,
# far below any difference between plans that matters.
TOLERANCE = 1e-9
_INTEGRAL = 1e-6


@dataclass(frozen=True, slots=True)
class Selection:
    """options[c] is the option taken of choice c. lower_bound: no selection costs less (same units as the objective).

    relaxed: the linear relaxation alone proved it. optimal: proved at all (false only when the time limit struck).
    """

    options: tuple[int, ...]
    time_s: float
    memory_bytes: float
    objective_s: float
    lower_bound_s: float
    relaxed: bool
    optimal: bool


class Infeasible(Exception):
    """No selection keeps within the fixed placements, finite conversions and the memory limit."""


Terms = list[int]  # columns whose sum is an indicator; [] stands for the constant 1 of a choice with one option


class BlockProgram:
    """`model` as an integer program; `solve` may be called many times."""

    def __init__(self, model: BlockModel, time_limit_s: float = 5.0) -> None:
        self.model = model
        self._time_s: list[float] = []
        self._bytes: list[float] = []
        self._upper: list[float] = []
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        self._fixed_price: Price = (0.0, 0.0)
        self._columns: list[list[int]] = []
        self._add_choices()
        for flow in model.flows:
            self._add_flow(flow)
        for keep in model.keeps:
            self._add_keep(keep)
        self._num_integer = sum(len(columns) for columns in self._columns)
        self._time_limit_s = time_limit_s
        self._load()

    # -- building ------------------------------------------------------------------------------------------------

    def _column(self, price: Price) -> int:
        self._time_s.append(0.0 if math.isinf(price[0]) else price[0])
        self._bytes.append(price[1])
        self._upper.append(0.0 if math.isinf(price[0]) else 1.0)
        return len(self._time_s) - 1

    def _row(self, columns: list[int], values: list[float], lower: float, upper: float) -> None:
        self._rows.append((columns, values, lower, upper))

    def _add_choices(self) -> None:
        """Equation (1)."""
        for choice in self.model.choices:
            columns = [self._column(price) for price in choice.prices]
            self._columns.append(columns)
            self._row(columns, [1.0] * len(columns), 1.0, 1.0)

    def _indicator(self, use: Use, placement: Placement) -> Terms:
        return [c for c, p in zip(self._columns[use.choice], use.placements, strict=True) if p == placement]

    def _add_flow(self, flow: Flow) -> None:
        have = list(dict.fromkeys(flow.source.placements))
        payers: dict[tuple[Placement, Placement], list[Terms]] = {}
        for sink in flow.sinks:
            want = list(dict.fromkeys(sink.placements))
            priced = [(p, q) for p in have for q in want if (p, q) in flow.prices]
            if not priced:
                continue
            if len(have) == 1:
                joint = {(p, q): self._indicator(sink, q) for p, q in priced}
            elif len(want) == 1:
                joint = {(p, q): self._indicator(flow.source, p) for p, q in priced}
            else:
                joint = self._marginal(flow.source, have, sink, want)
            for pair in priced:
                payers.setdefault(pair, []).append(joint[pair])
        for pair, terms in payers.items():
            self._add_payment(terms, flow.prices[pair])

    def _marginal(self, source: Use, have: list, sink: Use, want: list) -> dict[tuple[Placement, Placement], Terms]:
        """Equations (2): the transport variables of one source and one sink."""
        joint = {(p, q): [self._column((0.0, 0.0))] for p in have for q in want}
        for p in have:
            self._equate([joint[p, q][0] for q in want], self._indicator(source, p))
        for q in want:
            self._equate([joint[p, q][0] for p in have], self._indicator(sink, q))
        return joint

    def _equate(self, left: Terms, right: Terms) -> None:
        self._row(left + right, [1.0] * len(left) + [-1.0] * len(right), 0.0, 0.0)

    def _add_payment(self, payers: list[Terms], price: Price) -> None:
        """Equations (3) and (4): `price` is due once if any of the indicators is 1."""
        if len(payers) == 1:
            for column in payers[0]:
                self._charge(column, price)
            return
        paid = self._column(price)
        for terms in payers:
            self._row([paid, *terms], [1.0] + [-1.0] * len(terms), 0.0, math.inf)

    def _charge(self, column: int, price: Price) -> None:
        if math.isinf(price[0]):
            self._upper[column] = 0.0
        else:
            self._time_s[column] += price[0]
        self._bytes[column] += price[1]

    def _add_keep(self, keep: Keep) -> None:
        holders: dict[str, list[Terms]] = {}
        for use in keep.holders:
            terms: dict[str, Terms] = {}
            for column, placement in zip(self._columns[use.choice], use.placements, strict=True):
                terms.setdefault(storage(placement), []).append(column)
            for name, columns in terms.items():
                holders.setdefault(name, []).append(columns)
        for name, payers in holders.items():
            if keep.memory_bytes[name]:
                self._add_payment(payers, (0.0, keep.memory_bytes[name]))

    def _load(self) -> None:
        self._time = np.array(self._time_s)
        self._memory = np.array(self._bytes)
        self._upper_bounds = np.array(self._upper)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self._time), len(self._rows) + 1
        lp.col_cost_ = self._time
        lp.col_lower_, lp.col_upper_ = np.zeros(len(self._time)), self._upper_bounds
        # The last row holds equation (5); without a limit it is unbounded. In units of its largest entry.
        self._byte_unit = max(float(self._memory.max(initial=0.0)), 1.0)
        heavy = np.flatnonzero(self._memory)
        columns = [np.asarray(row[0]) for row in self._rows] + [heavy]
        values = [np.asarray(row[1]) for row in self._rows] + [self._memory[heavy] / self._byte_unit]
        lp.row_lower_ = np.array([row[2] for row in self._rows] + [-math.inf])
        lp.row_upper_ = np.array([row[3] for row in self._rows] + [math.inf])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(c) for c in columns])]).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate(columns).astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate(values).astype(float)
        self._highs = highspy.Highs()
        for option, value in (
            ("output_flag", False), ("threads", 1), ("mip_rel_gap", 0.0),
            ("mip_abs_gap", 1e-9), ("mip_feasibility_tolerance", 1e-9),
        ):  # fmt: skip
            assert self._highs.setOptionValue(option, value) == highspy.HighsStatus.kOk, option
        self._highs.passModel(lp)
        self._integer_columns = np.arange(self._num_integer, dtype=np.int32)

    # -- solving -------------------------------------------------------------------------------------------------

    def solve(
        self,
        memory_weight: float = 0.0,
        memory_limit_bytes: float | None = None,
        fixed: Mapping[int, int] | None = None,
    ) -> Selection:
        """The cheapest selection; fixed[c] is the option that choice c must take.

        memory_weight: seconds per byte. Raises `Infeasible` when there is none, or none was found within the time limit.
        """
        unit = self._set_costs(memory_weight)
        self._set_bounds(fixed or {}, memory_limit_bytes)
        highs = self._highs
        self._run()
        values = np.asarray(highs.getSolution().col_value)
        bound = highs.getInfo().objective_function_value * unit
        options = self._round(values)
        whole = np.abs(values[: self._num_integer] - np.rint(values[: self._num_integer])).max() < _INTEGRAL
        found = self._selection(options, memory_weight, bound, memory_limit_bytes, relaxed=True)
        if found is not None and (whole or found.objective_s <= bound + TOLERANCE * max(abs(bound), unit)):
            return found
        return self._solve_integer(memory_weight, memory_limit_bytes, unit)

    def _solve_integer(self, memory_weight: float, memory_limit_bytes: float | None, unit: float) -> Selection:
        highs, columns = self._highs, self._integer_columns
        kinds = np.full(self._num_integer, highspy.HighsVarType.kInteger.value, dtype=np.uint8)
        highs.changeColsIntegrality(self._num_integer, columns, kinds)
        try:
            self._run()
            values = np.asarray(highs.getSolution().col_value)
            bound = highs.getInfo().mip_dual_bound * unit
            timed_out = highs.getModelStatus() == highspy.HighsModelStatus.kTimeLimit
        finally:
            highs.changeColsIntegrality(self._num_integer, columns, np.zeros(self._num_integer, dtype=np.uint8))
        found = self._selection(self._round(values), memory_weight, bound, memory_limit_bytes, relaxed=False)
        assert found is not None
        if timed_out:
            return found
        gap = found.objective_s - bound
        assert gap <= 1e-6 * max(abs(bound), unit), f"HiGHS calls {bound} optimal, its solution costs {gap} more"
        return found

    def _set_costs(self, memory_weight: float) -> float:
        """Objective coefficients for `memory_weight`; returns the seconds of one unit of the objective.

        HiGHS' tolerances are absolute (1e-7), seconds per op are 1e-6 to 1e-2: the largest coefficient becomes 1e4.
        """
        cost = self._time + memory_weight * self._memory
        unit = float(np.abs(cost).max(initial=0.0)) / 1e4 or 1.0
        self._highs.changeColsCost(len(cost), np.arange(len(cost), dtype=np.int32), cost / unit)
        return unit

    def _set_bounds(self, fixed: Mapping[int, int], memory_limit_bytes: float | None) -> None:
        upper = self._upper_bounds.copy()
        for choice, option in fixed.items():
            columns = self._columns[choice]
            upper[[c for i, c in enumerate(columns) if i != option]] = 0.0
        self._highs.changeColsBounds(len(upper), np.arange(len(upper), dtype=np.int32), np.zeros(len(upper)), upper)
        limit = math.inf if memory_limit_bytes is None else memory_limit_bytes / self._byte_unit
        self._highs.changeRowBounds(len(self._rows), -math.inf, limit)

    def _run(self) -> None:
        highs = self._highs
        # Its clock goes on from run to run.
        highs.setOptionValue("time_limit", highs.getRunTime() + self._time_limit_s)
        highs.run()
        status = highs.getModelStatus()
        if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
            raise Infeasible
        has_solution = highs.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        if status == highspy.HighsModelStatus.kTimeLimit and not has_solution:
            raise Infeasible
        ended = status in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit)
        assert ended, f"HiGHS stopped with {highs.modelStatusToString(status)}"

    def _round(self, values: np.ndarray) -> tuple[int, ...]:
        return tuple(int(np.argmax(values[columns])) for columns in self._columns)

    def _selection(
        self,
        options: Sequence[int],
        memory_weight: float,
        bound: float,
        memory_limit_bytes: float | None,
        relaxed: bool,
    ) -> Selection | None:
        """`options` priced from the model, not from the program; None if they break the limit."""
        time_s, memory_bytes = self.model.price(options)
        if memory_limit_bytes is not None and memory_bytes > memory_limit_bytes * (1 + TOLERANCE):
            return None
        objective = time_s + memory_weight * memory_bytes
        if math.isinf(objective):
            return None
        optimal = objective <= bound + 1e-6 * max(abs(bound), abs(objective))
        return Selection(tuple(options), time_s, memory_bytes, objective, min(bound, objective), relaxed, optimal)
