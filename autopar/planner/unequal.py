"""The search for clusters of several kinds of hosts, and for equal devices that equal stages cannot all use.

Space: the order of the devices along the pipeline and which of them a stage has (planner/unequal_room.py); per stage data
and tensor degree, ZeRO 0 or 3, recomputation or none, and the rows of unlike replicas in proportion to their speed
(planner/unequal_ways.py); microbatches; and where the layers are cut. The schedule is 1F1B, or the one that is pinned, of one
stage per group; GPipe and others come with the moves.

Method: numbers of microbatches from about one per device to fewer and to more. Each has a floor, all devices at their best
all the time; where that does not rule it out, tables (planner/unequal_bounds.py), of which each number of stages has a
bound; and where that does not, its pipelines are walked (planner/unequal_walk.py). In models of few blocks nothing else
is left out. In others a walk has a number of visits, and numbers of microbatches beyond one that led to nothing better are
left; then the gap between the best plan and the least bound of what was left out is told.

At the end the best plans are changed by moves (planner/unequal_moves.py).

On small clusters the plans of Metis, of Whale, and of the exact search for what all devices have in common are where it
starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ..plan import Candidate, Plan
from ..report.words import plan_in_words
from ..simulate import simulate
from .problem import Problem, goes_together
from .rivals import Rivals
from .stages import TOLERANCE
from .unequal_bounds import Bounds
from .unequal_moves import alleviated_on_ranks
from .unequal_room import Room
from .unequal_walk import Judge, Walk, improve
from .unequal_ways import WayFinder

# Partial plans looked at per numbers of microbatches and stages: in small problems all, in others a few.
MAX_VISITS = 20_000
MAX_VISITS_OF_SUMS = 24
# Numbers of stages walked per number of microbatches, in others than small problems.
MAX_WALKS_OF_SUMS = 10
# Allowance for rates that rise as shares of the batch get smaller, and for replicas that span hosts.
FLOOR_SLACK = 0.95
# Up to so many devices other methods' plans are tried first.
MAX_SEEDED = 8
# Longer pipelines are not looked at: with more stages a device holds too little to be kept busy.
MAX_STAGES = 20
# Plans that lost, for the table of candidates.
ENOUGH = 5


def unequal(problem: Problem, on_equal: Callable[[Problem], Plan]) -> Plan:
    """The best plan found; ValueError, with the smallest for what all devices have in common, when none fits.

    on_equal: the search for equal devices.
    """
    return _Unequal(problem, on_equal).run()


def pipelines(problem: Problem) -> list[Plan]:
    """Plans of two stages or more, of many depths and meshes, the best first, for others to go on from."""
    search = _Unequal(problem, least_stages=2)
    search.look()
    return sorted(search.judge.tried.values(), key=lambda plan: plan.prediction.step_time_s)


class _Unequal:
    """on_equal: what finds plans for equal devices, if those may serve. least_stages: that a pipeline has."""

    def __init__(
        self, problem: Problem, on_equal: Callable[[Problem], Plan] | None = None, least_stages: int = 1
    ) -> None:
        self.problem = problem
        self._on_equal = on_equal if problem.cluster.hosts else None
        self.room, self.finder, self.judge = Room(problem.cluster), WayFinder(problem), Judge(problem)
        self.open_bound_s = math.inf
        # Numbers of microbatches that have led to nothing better.
        self._futile: list[int] = []
        # The tables of the best number of microbatches.
        self._tables: dict[int, Bounds] = {}
        # Seconds that any plan takes, by number of microbatches.
        self._floors: dict[int, float] = {}
        self.near = min(
            problem.microbatch_counts(), key=lambda count: abs(math.log(count / problem.cluster.world_size))
        )
        pinned = problem.constraints
        self.schedule = pinned.schedule or "1f1b"
        most = min(MAX_STAGES, len(problem.graph.blocks), problem.cluster.world_size)
        self.stages = [pinned.pipeline] if pinned.pipeline else range(least_stages, most + 1)

    def run(self) -> Plan:
        budget = self.problem.budget
        try:
            self._search()
        except KeyboardInterrupt:
            if self.judge.best is None:
                raise
            budget.interrupted()
        if self.judge.best is None:
            if budget.cut_short:
                raise budget.no_plan("auto")
            return self._nothing_fits()
        try:
            self._represent()
            self._other_schedule()
            self._alleviate()
        except KeyboardInterrupt:
            budget.interrupted()
        return self._concluded()

    @property
    def _expired(self) -> bool:
        return self.problem.budget.expired(has_plan=self.judge.best is not None)

    def _search(self) -> None:
        if self._on_equal is not None and self.problem.cluster.world_size <= MAX_SEEDED:
            self._seed(self._on_equal)
        self.look()

    def look(self) -> None:
        """Look at every number of microbatches that may be better than the best plan."""
        counts, left = list(self.problem.microbatch_counts()), []
        with self.problem.budget.bar("planning", " counts", len(counts)) as bar:
            for count in sorted(counts, key=lambda count: abs(math.log(count / self.near))):
                if self._expired or (not self.finder.is_exact and self._is_past(count)):
                    left.append(count)
                elif not self._is_beaten(self._floor_s(count)):
                    self._look_at(count)
                    bar.update()
        self._leave(left)

    def _floor_s(self, count: int) -> float:
        """What any plan of so many microbatches takes at least, by all devices at their best."""
        if count not in self._floors:
            self._floors[count] = FLOOR_SLACK * count * self.finder.least_pass_s(count)
        return self._floors[count]

    def _leave(self, counts: list[int]) -> None:
        """Bound the numbers of microbatches that are not looked at. Rows take no less time in more of them, so that a floor
        holds for all above it: those below the least known one are bounded by the least of them."""
        while counts:
            known = [count for count in self._floors if count <= max(counts)]
            below = max(known) if known else min(counts)
            floor_s = self._floor_s(below)
            if not self._is_beaten(floor_s):
                self.open_bound_s = min(self.open_bound_s, floor_s)
            counts = [count for count in counts if count < below]

    def _is_past(self, count: int) -> bool:
        """Whether a number of microbatches lies beyond one that has led to nothing better."""
        return any(min(count, self.near) <= other <= max(count, self.near) for other in self._futile)

    def _look_at(self, count: int) -> None:
        """All numbers of stages with so many microbatches, the least bound first."""
        tables, before_s = self._bounds(count), self.judge.best_s
        bounds = sorted((tables.root_s(stages), stages) for stages in self._depths(count))
        for number, (bound_s, stages) in enumerate(bounds):
            if self._is_beaten(bound_s):
                break
            if self._expired or (number >= MAX_WALKS_OF_SUMS and not self.finder.is_exact):
                self.open_bound_s = min(self.open_bound_s, bound_s)
                break
            best_s = self.judge.best_s
            visits = MAX_VISITS if self.finder.is_exact else MAX_VISITS_OF_SUMS
            self.open_bound_s = min(self.open_bound_s, Walk(tables, self.judge, stages, visits).run())
            if self.judge.best_s < best_s:
                improve(self.judge, tables)
        if self.judge.best_s < before_s:
            self._tables = {count: tables}
        else:
            self._futile.append(count)

    def _bounds(self, count: int) -> Bounds:
        return Bounds(self.problem, self.room, self.finder, count, self.schedule, max(self.stages))

    def _depths(self, microbatches: int) -> list[int]:
        """Numbers of stages that the schedule runs so many microbatches through."""
        return [stages for stages in self.stages if goes_together(self.schedule, stages, microbatches, 0)]

    def _is_beaten(self, bound_s: float) -> bool:
        return bound_s >= self.judge.best_s * (1 - TOLERANCE)

    def _seed(self, on_equal: Callable[[Problem], Plan]) -> None:
        from .methods.metis import metis
        from .methods.whale import whale

        # Those make no axes with roles, and choose among fewer schedules.
        pinned = self.problem.constraints
        others = () if pinned.roles or pinned.is_scheduled else (metis, whale)
        for method, problem in ((on_equal, self.problem.as_equal), *((other, self.problem) for other in others)):
            try:
                plan = method(problem)
            except ValueError:  # it finds none; others may
                continue
            if self._is_allowed(plan):
                self.judge.offer(replace(plan, prediction=None, candidates=(), precision=self.problem.graph.precision))

    def _is_allowed(self, plan: Plan) -> bool:
        """Whether a plan of another method keeps the constraints on degrees that only unequal stages can meet."""
        pinned, widths = self.problem.constraints, set(self.problem.widths(self.problem.cluster.world_size))
        return pinned.pipeline in (None, plan.pipeline) and all(
            pinned.data in (None, stage.data) and stage.tensor in widths for stage in plan.stages
        )

    def _represent(self) -> None:
        """Give numbers of stages that only bounds ruled out a plan each, until the table of candidates has enough."""
        count = self.judge.best.microbatches
        if self._expired or (count not in self._tables and not self.finder.is_exact):
            return
        tables = self._tables.get(count) or self._bounds(count)
        seen = {plan.pipeline for plan in self.judge.tried.values()}
        for bound_s, stages in sorted((tables.root_s(stages), stages) for stages in self._depths(count)):
            if bound_s == math.inf or len(self.judge.tried) > ENOUGH:
                return
            if stages not in seen:
                other = Judge(self.problem)
                Walk(tables, other, stages, stages + MAX_VISITS_OF_SUMS).run()
                self.judge.tried |= other.tried

    def _other_schedule(self) -> None:
        best = self.judge.best
        choices = ("1f1b", "gpipe")
        if self.problem.constraints.schedule is None and best.schedule in choices and best.microbatches > 1:
            self.judge.offer(replace(best, schedule="gpipe" if best.schedule == "1f1b" else "1f1b", prediction=None))

    def _alleviate(self) -> None:
        """Change the best plans by moves."""
        if not self._expired:
            tried = sorted(self.judge.tried.values(), key=lambda plan: plan.prediction.step_time_s)
            found = alleviated_on_ranks(self.problem, self.judge.best, tried)
            if found is not None:
                self.judge.offer(replace(found, prediction=None))

    def _nothing_fits(self) -> Plan:
        """Where what all devices have in common has a plan, that one; else the error that names the smallest of these."""
        if self._on_equal is not None:
            plan = self._on_equal(self.problem.as_equal)
            if self._is_allowed(plan):
                return plan
        raise ValueError(
            f"no plan of {self.problem.graph.name} on {self.problem.cluster.world_size} devices of "
            f"{len(self.problem.cluster.devices)} kinds fits in their memory under {self.problem.constraints}; use more "
            "devices, a smaller batch, or fewer constraints"
        )

    def _concluded(self) -> Plan:
        """The best plan, by the simulator's own figures, with the best of other shapes beside it."""
        best, seconds = self.judge.best, self.judge.best_s
        best.validate(self.problem.graph, self.problem.cluster)
        line = simulate(self.problem.graph, best, self.problem.cluster, model=self.problem.costs)
        assert abs(line.step_time_s - seconds) <= 1e-6 * seconds, (line.step_time_s, seconds)
        assert self.problem.excess_bytes(line.peak_memory_bytes) <= 0
        short = max(0.0, 1 - min(self.open_bound_s / seconds, 1.0))
        verdict = "chosen"
        if short >= 5e-4:
            verdict += f"; the proof was cut short, no plan of the space is more than {short:.1%} faster"
        if self.problem.budget.cut_short:
            verdict += f"; the search was cut short {self.problem.budget.cut_short}"
        rows = [Candidate(plan_in_words(best), seconds, best.prediction.peak_memory_bytes, verdict)]
        return replace(best, candidates=(*rows, *Rivals(self.problem, best).rows(self.judge.tried.values())))
