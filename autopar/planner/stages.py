"""The best stages of one shape, exactly: where the pipeline is cut and which stages recompute.

Stage s has forward f_s, backward b_s, c_s = f_s + b_s, and h_s to hand a boundary to stage s + 1; M microbatches, P stages.
The simulator's step time is the longest path through the schedule, so the length of any path is a lower bound, also when
what is not decided yet is left out or replaced by its least value:

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

infinite where nothing fits in memory. `solve` then walks the cuts depth first, best bound first, drops what
cannot beat the best plan known, and simulates what remains: the plan that it returns is the simulator's optimum.
Memory is exact for each stage on its own, because a stage's peak depends on its place and its order of instructions only.
The recompute choice that is no faster and fits no better is dropped first (in practice all but one are).

Reference: (1) and (2) hold for any schedule and are tight for equal stages, where both are (M + P - 1) c (Narayanan et al.,
Megatron-LM, SC 2021, section 2.2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..cost.types import StageCost
from ..schedule.step_time import exposed_reduce_s, step_time_s
from ..simulate import stage_peak_bytes
from .pricing import Piece, StagePrices, assemble
from .problem import Chain, Problem, Shape

# Plans whose times agree to this relative precision are one and the same optimum: sums of doubles in another order.
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Option:
    """One way to make a stage, with what the bounds need of its cost; `tail_s` is t_s of (1)."""

    piece: Piece
    cost: StageCost
    peak_bytes: int
    pass_s: float
    tail_s: float


@dataclass(frozen=True, slots=True)
class Solution:
    """`pieces` per stage and their simulated step time; `num_simulated`, `num_visited`: the effort it took.

    bound_s: no plan of the shape beats it; equal to step_time_s unless the visit limit struck.
    """

    pieces: tuple[Piece, ...]
    step_time_s: float
    bound_s: float
    num_simulated: int
    num_visited: int


class StageSearch:
    """All ways to cut one shape into stages, under the problem's memory limit and recompute constraint.

    root_bound_s: no plan of the shape is faster; infinite when none fits in memory.
    """

    def __init__(self, problem: Problem, shape: Shape, chain: Chain, prices: StagePrices) -> None:
        self.problem, self.shape, self.chain, self._prices = problem, shape, chain, prices
        self._limit_bytes = problem.memory_limit_bytes
        self._num_blocks = len(problem.graph.blocks)
        self._options: dict[tuple[int, int, int], tuple[Option, ...]] = {}
        self._tabulate()

    def options(self, stage: int, start: int, stop: int) -> tuple[Option, ...]:
        """The ways to run blocks [start, stop) as `stage` that fit in memory, none worse than another in every respect."""
        key = (stage, start, stop)
        if key not in self._options:
            pinned = self.problem.constraints.recompute
            found: list[Option] = []
            for recompute in (pinned,) if pinned else ("none", "full"):
                option = self._option(stage, Piece(start, stop, recompute))
                if option.peak_bytes > self._limit_bytes:
                    continue
                if not any(_no_slower(other.cost, option.cost) for other in found):
                    found.append(option)
            self._options[key] = tuple(found)
        return self._options[key]

    def smallest(self) -> tuple[tuple[Piece, ...], int]:
        """The pieces whose fullest rank needs least memory, and that need in bytes, whether or not it fits."""
        pinned = self.problem.constraints.recompute
        num_stages, num_blocks = self.shape.pipeline, self._num_blocks
        best: dict[tuple[int, int], tuple[int, tuple[Piece, ...]]] = {(num_stages, num_blocks): (0, ())}
        for stage in reversed(range(num_stages)):
            for start in self._starts(stage):
                ways = []
                for stop in self._stops(stage, start):
                    rest_bytes, rest = best[stage + 1, stop]
                    for recompute in (pinned,) if pinned else ("full", "none"):
                        option = self._option(stage, Piece(start, stop, recompute))
                        ways.append((max(option.peak_bytes, rest_bytes), (option.piece, *rest)))
                best[stage, start] = min(ways, key=lambda way: way[0])
        peak_bytes, pieces = best[0, 0]
        return pieces, peak_bytes

    def solve(self, below_s: float = np.inf, max_visits: int | None = None) -> Solution | None:
        """The pieces of least simulated step time, if that is less than `below_s`; None if there are none.

        max_visits: give up proving after so many partial plans; `Solution.bound_s` then says how far off it may be.
        """
        return _Walk(self, below_s, max_visits).run()

    def first(self) -> tuple[Piece, ...] | None:
        """The pieces that the bounds alone point to; None when nothing fits in memory."""
        pieces: list[Piece] = []
        start, total_s, last_s = 0, 0.0, 0.0
        for stage in range(self.shape.pipeline):
            ways = [
                (max(last_s, total_s + max(self.shape.microbatches * _compute(o), o.pass_s + self.drain_s[stage + 1][stop])), o)
                for stop in self._stops(stage, start)
                for o in self.options(stage, start, stop)
            ]
            if not ways or min(ways, key=lambda w: w[0])[0] == np.inf:
                return None
            last_s, chosen = min(ways, key=lambda way: way[0])
            total_s += chosen.pass_s
            pieces.append(chosen.piece)
            start = chosen.piece.stop
        return tuple(pieces)

    def step_time_s(self, pieces: tuple[Piece, ...]) -> float:
        """The simulator's step time of a whole plan."""
        plan = assemble(self.problem, self.shape, self.chain, pieces)
        costs = self._prices.of_plan(plan, self.shape, self.chain, pieces)
        return step_time_s(self.shape.pipeline, self.shape.microbatches, self.shape.schedule, costs)

    def price(self, stage: int, piece: Piece) -> StageCost:
        return self._prices.cost(self.shape, self.chain, stage, piece)

    def _option(self, stage: int, piece: Piece) -> Option:
        shape, cost = self.shape, self.price(stage, piece)
        peak_bytes = stage_peak_bytes(cost, shape.schedule, stage, shape.pipeline, shape.microbatches)
        pass_s = cost.forward_s + cost.backward_s + 2 * cost.send_s
        # reduce_model_s is left out: it may depend on where another stage lies, see StagePrices.cost
        tail_s = exposed_reduce_s(cost) - cost.reduce_model_s + cost.optimizer_s
        return Option(piece, cost, peak_bytes, pass_s, tail_s)

    def _starts(self, stage: int) -> range:
        return range(stage, self._num_blocks - self.shape.pipeline + stage + 1) if stage else range(1)

    def _stops(self, stage: int, start: int) -> range:
        left = self.shape.pipeline - stage - 1
        return range(start + 1, self._num_blocks - left + 1) if left else range(self._num_blocks, self._num_blocks + 1)

    def _tabulate(self) -> None:
        """drain, work and pass times from each (stage, first block) to the end, least over all completions."""
        num_stages, num_blocks, count = self.shape.pipeline, self._num_blocks, self.shape.microbatches
        rows = np.full((3, num_stages + 1, num_blocks + 1), np.inf)
        rows[:, num_stages, num_blocks] = 0.0
        drain, work, passing = rows
        self.root_bound_s = np.inf
        is_1f1b = self.shape.schedule == "1f1b"
        for stage in reversed(range(num_stages)):
            for start in self._starts(stage):
                for stop in self._stops(stage, start):
                    if drain[stage + 1, stop] == np.inf:
                        continue
                    for o in self.options(stage, start, stop):
                        own_s, down_s = count * _compute(o), o.cost.forward_s + o.cost.send_s
                        trip_s = o.pass_s + passing[stage + 1, stop]
                        here = (
                            max(
                                own_s,
                                o.pass_s + drain[stage + 1, stop],
                                trip_s + (count - 1) * o.cost.send_s,
                                _cycles(o, stage, num_stages - 1, trip_s, 0.0, self.shape) if is_1f1b else trip_s,
                            ),
                            max(own_s + o.tail_s, down_s + work[stage + 1, stop]),
                            trip_s,
                        )
                        if stage == 0:
                            self.root_bound_s = min(self.root_bound_s, max(here[0] + o.tail_s, here[1]))
                        for row, value in zip(rows, here, strict=True):
                            row[stage, start] = min(row[stage, start], value)
        # Plain lists: the walk reads single entries, which numpy boxes anew each time.
        self.drain_s, self.work_s, self.passing_s = rows.tolist()


@dataclass(frozen=True, slots=True)
class _Node:
    """The first stages, decided. sums over them: pass (c + 2 h), down (f + h); bound_s: no completion is faster."""

    options: tuple[Option, ...]
    stop: int
    pass_s: float
    down_s: float
    path_s: float
    bound_s: float


class _Walk:
    """One depth-first branch and bound over the cuts."""

    def __init__(self, search: StageSearch, below_s: float, max_visits: int | None) -> None:
        self.search, self.shape = search, search.shape
        self.best_s, self.best, self.max_visits = below_s, None, max_visits
        self.num_simulated = self.num_visited = 0
        self.skipped_s = np.inf

    def run(self) -> Solution | None:
        if self.search.root_bound_s < self._cutoff():
            self._descend(_Node((), 0, 0.0, 0.0, 0.0, self.search.root_bound_s))
        if self.best is None:
            return None
        return Solution(
            self.best, self.best_s, min(self.best_s, self.skipped_s), self.num_simulated, self.num_visited
        )  # fmt: skip

    def _cutoff(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def _descend(self, node: _Node) -> None:
        if self.max_visits is not None and self.num_visited >= self.max_visits and self.best is not None:
            self.skipped_s = min(self.skipped_s, node.bound_s)
            return
        self.num_visited += 1
        if len(node.options) == self.shape.pipeline:
            self.num_simulated += 1
            pieces = tuple(option.piece for option in node.options)
            step_time_s = self.search.step_time_s(pieces)
            assert step_time_s >= node.bound_s * (1 - 1e-6), (
                f"{self.shape}: simulated {step_time_s} s, below its lower bound {node.bound_s} s"
            )
            if step_time_s < self._cutoff():
                self.best_s, self.best = step_time_s, pieces
            return
        for child in sorted(self._children(node), key=lambda child: child.bound_s):
            if child.bound_s >= self._cutoff():
                break
            self._descend(child)

    def _children(self, node: _Node) -> Iterator[_Node]:
        search, stage, count = self.search, len(node.options), self.shape.microbatches
        is_1f1b = self.shape.schedule == "1f1b"
        for stop in search._stops(stage, node.stop):
            if search.drain_s[stage + 1][stop] == np.inf:
                continue
            for option in search.options(stage, node.stop, stop):
                options = (*node.options, option)
                tail_s = options[0].tail_s
                own_s = count * _compute(option)
                pass_s, down_s = node.pass_s + option.pass_s, node.down_s + option.cost.forward_s + option.cost.send_s
                path_s = max(
                    node.path_s, node.pass_s + own_s + tail_s, node.down_s + own_s + option.tail_s,
                    node.pass_s + option.pass_s + (count - 1) * option.cost.send_s + tail_s,
                    _cycle_bound(options, search.passing_s[stage + 1][stop], self.shape) + tail_s if is_1f1b else 0.0,
                )  # fmt: skip
                bound_s = max(
                    path_s, pass_s + search.drain_s[stage + 1][stop] + tail_s, down_s + search.work_s[stage + 1][stop],
                )  # fmt: skip
                if not is_1f1b:
                    slowest_forward_s = max(max(o.cost.forward_s, o.cost.send_s) for o in options)
                    slowest_backward_s = max(max(o.cost.backward_s, o.cost.send_s) for o in options)
                    flush_s = (count - 1) * (slowest_forward_s + slowest_backward_s)
                    bound_s = max(bound_s, pass_s + search.passing_s[stage + 1][stop] + flush_s + tail_s)
                yield _Node(options, stop, pass_s, down_s, path_s, bound_s)


def _cycle_bound(options: tuple[Option, ...], rest_s: float, shape: Shape) -> float:
    """Bound (3) over all cycles that start at a decided stage, without what follows stage 0's last backward.

    rest_s: the least that the stages not decided yet add to a round trip (sum of c + 2 h).
    """
    e = len(options) - 1
    warmup_s = min(shape.pipeline - 1 - e, shape.microbatches - 1) * options[e].cost.forward_s
    before_s = [0.0]
    for option in options:
        before_s.append(before_s[-1] + option.pass_s)
    best_s = 0.0
    for a, option in enumerate(options):
        if a < e:
            trip_s = before_s[e] - before_s[a] + _compute(options[e])
            best_s = max(best_s, before_s[a] + _cycles(option, a, e, trip_s, warmup_s, shape))
        trip_s = before_s[-1] - before_s[a] + rest_s
        best_s = max(best_s, before_s[a] + _cycles(option, a, shape.pipeline - 1, trip_s, 0.0, shape))
    return best_s


def _cycles(option: Option, a: int, e: int, trip_s: float, warmup_s: float, shape: Shape) -> float:
    """From the start of stage a's first forward to the end of its last backward, by paths that go round from a to e.

    Microbatch 0 goes from a to e, which takes its warm-up and goes back: trip_s + warmup_s. Then n times the cycle
    B(i) on a, F(i + P - a) on a, down to e, where B(i + e - a + 1) follows it, and back up to a. Then the rest of a's own
    instructions. The length is linear in n, so that none and as many as there are microbatches for are the extremes. The
    mirror image of none: all of a's forwards, with the backwards between them, then the last microbatch's round trip.
    """
    count, held, advance = shape.microbatches, shape.pipeline - a, e - a + 1
    forward_s, backward_s = option.cost.forward_s, option.cost.backward_s
    longest_s = trip_s + (count - 1) * forward_s + max(0, count - held) * backward_s
    for num_cycles in {0, max(0, (count - 1 - held) // advance + 1)}:
        done = num_cycles * advance
        rest_s = (count - 1 - done) * backward_s + max(0, count - held - done) * forward_s
        longest_s = max(longest_s, (num_cycles + 1) * trip_s + warmup_s + rest_s)
    return longest_s


def _compute(option: Option) -> float:
    return option.cost.forward_s + option.cost.backward_s


def _no_slower(a: StageCost, b: StageCost) -> bool:
    """Whether a stage that costs `a` is at no point slower than one that costs `b`."""
    times = ("forward_s", "backward_s", "prologue_s", "send_s", "optimizer_s")
    return all(getattr(a, name) <= getattr(b, name) for name in times) and exposed_reduce_s(a) <= exposed_reduce_s(b)
