"""The last stage of `auto`: from the best plans of its exact search, relieve what bounds them, move by move.

The exact search covers one mesh, one model axis, two schedules and recomputation of whole stages. Around its best plans
lie those that it cannot say: other schedules, ZeRO levels per group, recomputation block by block. As in Aceso, a plan is
changed by one move (planner/moves.py) that takes load off its bottleneck; after each, recomputation is reset to what
memory needs (planner/relief.py); a gain is accepted at once, without a gain the search goes on from the best neighbour,
up to MAX_HOPS moves deep; nothing is judged twice. What Aceso estimates is exact here: planner/judge.py has the
simulator's step time and memory.

Small problems are searched whole first (planner/wide.py), so that there the answer is the optimum of the wide space, or
something better that lies outside of it.

The search ends by itself, so that its answer does not depend on the clock, unless its time is over before: then with the
best plan so far. It never returns a plan worse than the one that it was given.

Reference: Liu et al., "Aceso: Efficient Parallel DNN Training through Iterative Bottleneck Alleviation", EuroSys 2024,
section 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..plan import Candidate, Plan, Prediction
from ..report.words import plan_in_words
from .judge import Judge, Judged
from .moves import CHEAP, DEAR, Move, Moves
from .problem import Problem
from .relief import Relief
from .sketch import Sketch
from .wide import all_wide_sketches, is_small, search_sketches

# Process seconds that it takes at most, on problems that are not small: so many, on few and on many devices, or this share of
# those spent before.
LIMIT_FEW_S, LIMIT_S, LIMIT_SHARE = 1.5, 0.3, 0.1
# What has to be left of them for a move that solves for layouts.
DEAR_S = 0.2
# Plans whose times agree to this relative precision are equally good: sums of doubles in another order.
TOLERANCE = 1e-9
# Moves in a row without a gain.
MAX_HOPS = 3
# A neighbour from which the search goes on may be so much slower than the plan it was reached from.
BACK_OFF = 1.1
# Plans of the exact search that are relieved, and of these how many are changed further.
MAX_STARTS = 12
MAX_ROUNDS = 3
# Sketches judged in all; ends the search on small problems, where the clock does not.
MAX_JUDGED = 3_000


@dataclass(frozen=True)
class Found:
    """A sketch with its plan, judged; recomputation is the plan's."""

    sketch: Sketch
    judged: Judged

    @property
    def time_s(self) -> float:
        return self.judged.time_s


def alleviated(problem: Problem, plan: Plan, others: Sequence[Plan], spent_s: float = 0.0) -> Plan:
    """`plan`, or a faster one with `plan` among its candidates.

    plan: of the exact search, with its prediction and candidates. others: its next best plans, fastest first. spent_s:
    process seconds that it took.
    """
    budget, best = problem.budget, None
    try:
        if not budget.expired():
            limit_s = max(LIMIT_S if problem.is_large else LIMIT_FEW_S, LIMIT_SHARE * spent_s)
            limit_s = math.inf if is_small(problem) else limit_s
            search = Alleviation(problem, min(limit_s, budget.left_s))
            try:
                search.run([plan, *others])
            finally:
                best = search.best
    except KeyboardInterrupt:
        budget.interrupted()
    short = f"; the search was cut short {budget.cut_short}" if budget.cut_short else ""
    if best is None:
        rows = (
            replace(row, verdict=row.verdict + short)
            if row.verdict.startswith("chosen") and short not in row.verdict
            else row
            for row in plan.candidates
        )
        return replace(plan, candidates=tuple(rows))
    return chosen_over(plan, best, short)


def chosen_over(plan: Plan, best: Found, short: str) -> Plan:
    """The plan that beats `plan`, with that and its candidates behind it. short: what ended the search early, in words."""
    found = best.judged.plan
    prediction = Prediction(best.time_s, max(best.judged.peaks_bytes))
    chosen = Candidate(plan_in_words(found), best.time_s, prediction.peak_memory_bytes, f"chosen{short}")
    before = f"before {differences(plan, found)} changed"
    rows = (_behind(row, best.time_s, before) for row in plan.candidates if row.name != chosen.name)
    return replace(found, prediction=prediction, candidates=(chosen, *rows))


def _behind(row: Candidate, best_s: float, before: str) -> Candidate:
    """A row of the exact search's table, now that there is a faster plan."""
    if row.verdict.startswith("needs"):
        return row
    reason = before if row.verdict.startswith("chosen") else row.verdict.partition(": ")[2]
    return replace(row, verdict=f"{row.step_time_s / best_s:.2f}x slower: {reason}")


def differences(old: Plan, new: Plan) -> str:
    """What of a plan another one has differently, in words."""

    def parts(plan: Plan) -> dict[str, object]:
        return {
            "degrees": (plan.groups, [(stage.data, stage.axes) for stage in plan.stages[: plan.pipeline]]),
            "microbatches": plan.microbatches,
            "schedule": (plan.schedule, len(plan.stages) // plan.pipeline),
            "zero": [(s.zero, s.zero_group) for s in plan.stages[: plan.pipeline]],
            "stages": [s.stop for s in plan.stages],
            "recompute": [choice for s in plan.stages for choice in s.block_recompute],
        }

    one, other = parts(old), parts(new)
    found = [name for name in one if one[name] != other[name]] or ["layouts"]
    if "schedule" in found and one["schedule"][1] != other["schedule"][1]:
        found = [name for name in found if name != "stages"]
    return ", ".join(found[:-1]) + (" and " if len(found) > 1 else "") + found[-1]


class Alleviation:
    def __init__(
        self,
        problem: Problem,
        limit_s: float = math.inf,
        moves: Sequence[Move] = CHEAP + DEAR,
        judge: Judge | None = None,
    ) -> None:
        self.problem, self._all_moves = problem, moves
        self.judge = judge or Judge(problem)
        self.relief = Relief(self.judge)
        self.moves = Moves(problem, self.judge)
        self.best: Found | None = None
        self.best_s = math.inf
        self._ends_s = time.process_time() + limit_s
        self._seen: dict[tuple, Found | None] = {}
        # Keys name rows by identity, so these must live as long.
        self._kept: list[Sketch] = []

    @property
    def is_over(self) -> bool:
        return len(self._seen) >= MAX_JUDGED or self._is_late()

    def _is_late(self) -> bool:
        return time.process_time() >= self._ends_s or self.problem.budget.expired()

    def run(self, plans: Sequence[Plan]) -> Plan | None:
        """A plan that is faster than all of `plans`, fits in memory, keeps the constraints and that the runtime executes;
        None if none was found. plans: the best of another search, fastest first; some may not fit."""
        distinct = {(plan.stages, plan.microbatches, plan.schedule): plan for plan in reversed(plans)}
        plans = list(distinct.values())[::-1][:MAX_STARTS]
        given = [self.judge(plan) for plan in plans if self._keeps_schedule(plan)]
        self.best_s = min((one.time_s for one in given if one.fits), default=math.inf)
        if is_small(self.problem):
            every = all_wide_sketches(self.problem)
            for sketch, judged in search_sketches(self.problem, every, self.judge, self.best_s, self._is_late):
                self.accept(Found(sketch, judged))
            if self.best is not None:
                plans = [self.best.judged.plan, *plans]
        self._climb_all([found for plan in plans for found in self._starts(plan)])
        return self.best.judged.plan if self.best else None

    def run_from(self, sketches: Iterable[Sketch], best_s: float) -> Found | None:
        """What is faster than `best_s`, from these pipelines, however their groups differ."""
        self.best_s, starts = min(best_s, self.best_s), []
        for sketch in sketches:
            starts += self._under_schedule(sketch, BACK_OFF * best_s)
            if self.is_over:
                break
        self._climb_all(starts)
        return self.best

    def others(self) -> Iterator[Plan]:
        """What was found to fit and is not the best, with predictions."""
        for found in self._seen.values():
            if found is not None and found.judged.plan != self.best.judged.plan:
                yield replace(found.judged.plan, prediction=self.judge.prediction(found.judged))

    def _climb_all(self, starts: Sequence[Found]) -> None:
        for start in sorted(starts, key=_time)[:MAX_ROUNDS]:
            for found in self._climb(start):
                self.accept(found)
            if self.is_over:
                break

    def accept(self, found: Found) -> None:
        """Keep a plan that fits if it is the best."""
        if found.time_s < self.best_s * (1 - TOLERANCE) and self._runs(found.judged.plan):
            self.best, self.best_s = found, found.time_s

    def _starts(self, plan: Plan) -> Iterator[Found]:
        sketch = Sketch.of(plan)
        if sketch is not None:
            yield from self._under_schedule(sketch, math.inf)

    def _under_schedule(self, sketch: Sketch, below_s: float) -> Iterator[Found]:
        """The sketch, or where it has not the schedule that is pinned, what becomes of it under that."""
        for one in [sketch] if self._keeps_schedule(sketch) else self.moves.orders(sketch):
            if self.is_over:
                return
            if one.key not in self._seen and (found := self._found(one, below_s)) is not None:
                yield found

    def _keeps_schedule(self, one: Plan | Sketch) -> bool:
        return self.problem.constraints.schedule in (None, one.schedule)

    def _climb(self, now: Found) -> Iterator[Found]:
        """The start and each plan that beats the one before it."""
        yield now
        while not self.is_over:
            better = self._alleviate(now, now.time_s * (1 - TOLERANCE), 0)
            if better is None:
                return
            yield better
            now = better

    def _alleviate(self, now: Found, below_s: float, depth: int) -> Found | None:
        """The best of the first kind of move that beats `below_s`, within the hops left."""
        reached: list[Found] = []
        for move in self._all_moves:
            of_move: list[Found | None] = []
            if move in DEAR and time.process_time() + DEAR_S > self._ends_s:
                continue
            for sketch in move(self.moves, now.sketch, now.judged):
                if self.is_over:
                    break
                if sketch.key not in self._seen:
                    of_move.append(self._found(sketch, BACK_OFF * now.time_s))
            reached += (found for found in of_move if found is not None)
            better = min((found for found in reached if found.time_s < below_s), key=_time, default=None)
            if better is not None:
                return better
        if depth + 1 < MAX_HOPS and reached and not self.is_over:
            return self._alleviate(min(reached, key=_time), below_s, depth + 1)
        return None

    def _found(self, sketch: Sketch, below_s: float) -> Found | None:
        """The sketch with the recomputation that it needs; None where it does not fit or is slower than `below_s`."""
        self._kept.append(sketch)
        plan, judged = sketch.plan(self.problem.graph), None
        try:
            if not self.problem.pins.refusal(plan):
                judged = self.relief(plan, below_s)
        except ValueError:
            # The layouts have a strategy that this share of the batch does not allow.
            pass
        found = Found(sketch, judged) if judged is not None and judged.time_s < below_s else None
        self._seen[sketch.key] = found
        return found

    def _runs(self, plan: Plan) -> bool:
        try:
            plan.validate(self.problem.graph, self.problem.cluster)
        except ValueError:
            return False
        return not self.problem.pins.refusal(plan)


def _time(found: Found) -> float:
    return found.time_s
