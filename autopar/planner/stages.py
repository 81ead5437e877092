"""The best stages of one shape, exactly: where the pipeline is cut and which stages recompute.

Stage s has forward f_s, backward b_s, c_s = f_s + b_s, and h_s to hand a boundary to stage s + 1; M microbatches, P
stages. The simulator's step time is the longest path through the schedule, so the length of any path is a lower
bound, also when what is not decided yet is left out or replaced by its least value:

    (1) work    T >= sum_{j<s} (f_j + h_j) + M c_s + t_s          t_s: what follows a stage's last backward
    (2) drain   T >= sum_{j<s} (c_j + 2 h_j) + M c_s + t_0        the last backward travels back to stage 0
    (3) cycle   1F1B holds P - a microbatches at stage a, so one that goes from a to e and back moves the pipeline on by
                e - a + 1 microbatches: that takes at least sum_{a..e} c_j + 2 sum_{a..e-1} h_j      `_cycles`
    (4) link    T >= sum_j (c_j + 2 h_j) + (M - 1) h_s + t_0      a link carries one message at a time
    (5) flush   GPipe: T >= sum_j (c_j + 2 h_j) + (M - 1) (max(f_j, h_j) + max(b_j, h_j)) + t_0

`_tabulate` computes by dynamic programming from the last stage, for every stage s and first block i, the least
that the bounds of stages s and later can be over all ways to complete the pipeline:

    passing[s, i] = min over stop of (c + 2 h) + passing[s + 1, stop]
    drain[s, i]   = min over stop of max( (2), (3), (4) of this stage, (c + 2 h) + drain[s + 1, stop] )
    work[s, i]    = min over stop of max( (1) of this stage, (f + h) + work[s + 1, stop] )

infinite where nothing fits in memory. `solve` (planner/walk.py) then walks the cuts depth first, best bound first,
drops what cannot beat the best plan known, and simulates what remains: the plan that it returns is the simulator's
optimum. Memory is exact for each stage on its own, because a stage's peak depends on its place and its order of
instructions only; hence a stage recomputes exactly when it does not fit otherwise. The tables are arrays over all runs
of blocks (planner/runs.py).

Reference: (1) and (2) hold for any schedule and are tight for equal stages, where both are (M + P - 1) c (Narayanan
et al., Megatron-LM, SC 2021, section 2.2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..cost.types import StageCost
from ..plan import Plan
from ..schedule.step_time import step_time_s
from ..simulate import stage_peak_bytes
from .pricing import Piece, StagePrices, assemble
from .problem import Chain, Problem, Shape
from .runs import Runs

# Plans whose times agree to this relative precision are one and the same optimum: sums of doubles in another order.
TOLERANCE = 1e-9
# Runs of blocks count as fitting up to this share above the limit: whole plans are held against it exactly.
FIT_SLACK = 1e-7


@dataclass(frozen=True, slots=True)
class Option:
    """One way to make a stage, priced exactly."""

    piece: Piece
    cost: StageCost
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Ways:
    """The best way that fits in memory to run blocks [start, stop) as one stage: arrays [start, stop] of seconds.

    closed_s: infinite where there is no way, else 0. choice: which of `Problem.recompute_choices`.
    """

    forward_s: np.ndarray
    backward_s: np.ndarray
    send_s: np.ndarray
    tail_s: np.ndarray
    closed_s: np.ndarray
    choice: np.ndarray

    @property
    def compute_s(self) -> np.ndarray:
        return self.forward_s + self.backward_s

    @property
    def pass_s(self) -> np.ndarray:
        return self.forward_s + self.backward_s + 2 * self.send_s + self.closed_s

    def part(self, starts: slice | int, stops: slice) -> Ways:
        """The same of some starts and stops."""
        fields = (self.forward_s, self.backward_s, self.send_s, self.tail_s, self.closed_s, self.choice)
        return Ways(*(field[starts, stops] for field in fields))


@dataclass(frozen=True, slots=True)
class Table:
    """passing, drain, work: [stage, first block], as in the module's docstring; root_s: the whole shape's bound."""

    passing: np.ndarray
    drain: np.ndarray
    work: np.ndarray
    root_s: float


@dataclass(frozen=True, slots=True)
class Solution:
    """The best pieces found and their simulated step time; None if no plan beats what was to be beaten.

    open_bound_s: plans that were not looked at, because the limit on visits struck, may be as fast as this, no faster;
        infinite when the answer is proved. num_visited: partial plans; num_simulated: whole ones.
    """

    pieces: tuple[Piece, ...] | None
    step_time_s: float
    open_bound_s: float
    num_simulated: int
    num_visited: int


class StageSearch:
    """All ways to cut one shape into stages, under the problem's memory limit and recompute constraint.

    root_bound_s: no plan of the shape is faster; infinite when none fits in memory.
    """

    def __init__(self, problem: Problem, shape: Shape, chain: Chain, prices: StagePrices) -> None:
        self.problem, self.shape, self.chain, self._prices = problem, shape, chain, prices
        self._limit_bytes = self._limit()
        self.num_blocks = len(problem.graph.blocks)
        self._options: dict[tuple[int, Piece], Option] = {}
        self._ways: dict[int, Ways] = {}
        self.table = self._tabulate([self.ways(stage) for stage in range(shape.pipeline)])
        self.root_bound_s = self.table.root_s

    def _limit(self) -> float:
        """Bytes that a stage may need."""
        return self.problem.memory_limit_bytes

    def ways(self, stage: int) -> Ways:
        """The best way for every run of blocks as `stage`.

        A stage recomputes only where it must: the simulator's step time never falls when a stage gets slower, and
        whether other stages fit does not depend on this one.
        """
        if stage not in self._ways:
            self._ways[stage] = self._best_ways(stage)
        return self._ways[stage]

    def _best_ways(self, stage: int) -> Ways:
        window, limit_bytes = (self.starts(stage), self.stops(stage)), self._limit_bytes * (1 + FIT_SLACK)
        times, choice = [], None
        for number, recompute in enumerate(self.problem.recompute_choices):
            runs = self._runs(stage, recompute)
            fits = (self._peaks(runs, stage)[window] <= limit_bytes) & self._exist(runs, stage, window)
            mine = [times_s[window] for times_s in (runs.forward_s, runs.backward_s, runs.send_s, runs.tail_s)]
            if choice is None:
                times, choice = mine, np.where(fits, number, -1)
            else:
                new = fits & (choice < 0)
                times = [np.where(new, field, kept) for field, kept in zip(mine, times, strict=True)]
                choice = np.where(new, number, choice)
            if (choice >= 0).all():
                break
        return Ways(*times, np.where(choice < 0, math.inf, 0.0), choice)

    def option(self, stage: int, start: int, stop: int) -> Option | None:
        """The best way to run blocks [start, stop) as `stage` that fits in memory, None if there is none; exact."""
        if not self.problem.allows_stage(stage, start, stop, self.shape.pipeline):
            return None
        ways = (self.priced(stage, Piece(start, stop, choice)) for choice in self.problem.recompute_choices)
        return next((way for way in ways if way.peak_bytes <= self._limit_bytes), None)

    def priced(self, stage: int, piece: Piece) -> Option:
        """The exact cost of a piece as `stage`."""
        key = (stage, piece)
        if key not in self._options:
            cost = self.price(stage, piece)
            shape = self.shape
            peak_bytes = stage_peak_bytes(cost, shape.schedule, stage, shape.pipeline, shape.microbatches)
            self._options[key] = Option(piece, cost, peak_bytes)
        return self._options[key]

    @cached_property
    def free_bound_s(self) -> float:
        """`root_bound_s` if memory had no limit."""
        fastest, found = self.problem.recompute_choices[0], []
        for stage in range(self.shape.pipeline):
            runs, window = self._runs(stage, fastest), (self.starts(stage), self.stops(stage))
            times = [times_s[window] for times_s in (runs.forward_s, runs.backward_s, runs.send_s, runs.tail_s)]
            closed_s = np.where(self._exist(runs, stage, window), 0.0, math.inf)
            found.append(Ways(*times, closed_s, np.zeros(closed_s.shape, dtype=int)))
        return self._tabulate(found).root_s

    def smallest(self) -> tuple[tuple[Piece, ...], int]:
        """The pieces whose fullest rank needs least memory, and that need in bytes, whether or not it fits."""
        choices, least = self.problem.recompute_choices, np.full(self.num_blocks + 1, math.inf)
        least[self.num_blocks] = 0.0
        picked = []
        for stage in reversed(range(self.shape.pipeline)):
            starts, stops = self.starts(stage), self.stops(stage)
            every = [(runs := self._runs(stage, c), self._peaks(runs, stage)) for c in choices]
            peaks = [
                np.where(self._exist(runs, stage, (starts, stops)), p[starts, stops], math.inf) for runs, p in every
            ]
            # Of equal peaks the first counts: most recomputation.
            whole = np.maximum(np.array(peaks)[::-1], least[None, None, stops])
            whole = whole.min(axis=0), whole.argmin(axis=0)
            best = whole[0].argmin(axis=1)
            picked.append((best, whole[1]))
            found = np.full(self.num_blocks + 1, math.inf)
            found[starts] = whole[0].min(axis=1)
            least = found
        pieces, start = [], 0
        for stage, (best, choice) in enumerate(reversed(picked)):
            row = start - self.starts(stage).start
            column = int(best[row])
            stop = self.stops(stage).start + column
            pieces.append(Piece(start, stop, choices[len(choices) - 1 - int(choice[row, column])]))
            start = stop
        peak_bytes = max(self.priced(stage, piece).peak_bytes for stage, piece in enumerate(pieces))
        return tuple(pieces), peak_bytes

    def solve(self, below_s: float = math.inf, max_visits: int | None = None) -> Solution:
        """The pieces of least simulated step time, if that is less than `below_s`.

        max_visits: give up proving after so many partial plans, once any plan is known.
        """
        from .walk import Walk

        return Walk(self, below_s, max_visits).run()

    def first(self) -> tuple[Piece, ...] | None:
        """The pieces that the bounds alone point to; None when nothing fits in memory."""
        from .walk import first_pieces

        return first_pieces(self)

    def plan(self, pieces: tuple[Piece, ...]) -> Plan:
        return assemble(self.problem, self.shape, self.chain, pieces)

    def costs(self, pieces: tuple[Piece, ...]) -> Sequence[StageCost]:
        """The exact costs of the stages of a whole plan."""
        return self._prices.of_plan(self.shape, self.chain, pieces)

    def step_time_s(self, pieces: tuple[Piece, ...]) -> float:
        """The simulator's step time of a whole plan."""
        return step_time_s(self.shape.pipeline, self.shape.microbatches, self.shape.schedule, self.costs(pieces))

    def price(self, stage: int, piece: Piece) -> StageCost:
        return self._prices.cost(self.shape, self.chain, stage, piece)

    def starts(self, stage: int) -> slice:
        """Where `stage` may begin, so that every stage gets a block."""
        return slice(stage, self.num_blocks - self.shape.pipeline + stage + 1) if stage else slice(0, 1)

    def stops(self, stage: int) -> slice:
        """Where it may end."""
        left = self.shape.pipeline - stage - 1
        return slice(stage + 1, self.num_blocks - left + 1) if left else slice(self.num_blocks, self.num_blocks + 1)

    def _runs(self, stage: int, recompute: str) -> Runs:
        return self._prices.runs(self.shape, self.chain, stage, recompute)

    def _exist(self, runs: Runs, stage: int, window: tuple) -> np.ndarray:
        """Which runs of blocks may be `stage`: those that leave blocks for the others and keep what is pinned."""
        found, allowed = runs.exists[window] > 0, self.problem.stage_mask(stage, self.shape.pipeline)
        return found if allowed is None else found & allowed[window]

    def _peaks(self, runs: Runs, stage: int) -> np.ndarray:
        return runs.peak_bytes(self.shape.schedule, stage, self.shape.pipeline, self.shape.microbatches)

    def _tabulate(self, ways: Sequence[Ways]) -> Table:
        num_stages, num_blocks, count = self.shape.pipeline, self.num_blocks, self.shape.microbatches
        passing, drain, work = (np.full((num_stages + 1, num_blocks + 1), math.inf) for _ in range(3))
        passing[num_stages, num_blocks] = drain[num_stages, num_blocks] = work[num_stages, num_blocks] = 0.0
        root_s = math.inf
        for stage in reversed(range(num_stages)):
            way, stops, starts = ways[stage], self.stops(stage), self.starts(stage)
            own_s, pass_s = count * way.compute_s, way.pass_s
            trip_s = pass_s + passing[stage + 1, stops]
            drain_s = np.maximum(own_s, pass_s + drain[stage + 1, stops])
            drain_s = np.maximum(drain_s, trip_s + (count - 1) * way.send_s)
            drain_s = np.maximum(drain_s, self._cycle_s(way, stage, trip_s))
            work_s = np.maximum(own_s + way.tail_s, way.forward_s + way.send_s + work[stage + 1, stops])
            if stage == 0:
                root_s = float(np.maximum(drain_s + way.tail_s, work_s).min())
            passing[stage, starts] = trip_s.min(axis=1)
            drain[stage, starts] = drain_s.min(axis=1)
            work[stage, starts] = work_s.min(axis=1)
        return Table(passing, drain, work, root_s)

    def _cycle_s(self, way: Ways, stage: int, trip_s: np.ndarray) -> np.ndarray | float:
        """Bound (3) from `stage` to the last."""
        if self.shape.schedule != "1f1b":
            return 0.0
        num_stages, count = self.shape.pipeline, self.shape.microbatches
        return cycles_s(way.forward_s, way.backward_s, stage, num_stages - 1, trip_s, 0.0, num_stages, count)


def cycles_s(forward_s, backward_s, a, e, trip_s, warmup_s, num_stages: int, count: int) -> np.ndarray:
    """From the start of stage a's first forward to the end of its last backward, by paths that go round from a to e.

    Microbatch 0 goes from a to e, which takes its warm-up and goes back: trip_s + warmup_s. Then n times the cycle
    B(i) on a, F(i + P - a) on a, down to e, where B(i + e - a + 1) follows it, and back up to a. Then the rest of a's
    own instructions. The length is linear in n, so that none and as many as there are microbatches for are the
    extremes. The mirror image of none: all of a's forwards, with the backwards between them, then the last
    microbatch's round trip. All arguments but the last two may be arrays that broadcast.
    """
    held, advance = num_stages - np.asarray(a), e - np.asarray(a) + 1
    longest_s = trip_s + (count - 1) * forward_s + np.maximum(0, count - held) * backward_s
    for num_cycles in (np.zeros_like(held), np.maximum(0, (count - 1 - held) // advance + 1)):
        done = num_cycles * advance
        rest_s = (count - 1 - done) * backward_s + np.maximum(0, count - held - done) * forward_s
        longest_s = np.maximum(longest_s, (num_cycles + 1) * trip_s + warmup_s + rest_s)
    return longest_s
