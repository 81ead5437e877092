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

infinite where nothing fits in memory. `solve` then walks the cuts depth first, best bound first, drops what cannot
beat the best plan known, and simulates what remains: the plan that it returns is the simulator's optimum. Memory is
exact for each stage on its own, because a stage's peak depends on its place and its order of instructions only; hence
a stage recomputes exactly when it does not fit otherwise.

Reference: (1) and (2) hold for any schedule and are tight for equal stages, where both are (M + P - 1) c (Narayanan
et al., Megatron-LM, SC 2021, section 2.2.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..cost.types import StageCost
from ..plan import Plan
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

    @property
    def compute_s(self) -> float:
        return self.cost.forward_s + self.cost.backward_s


@dataclass(frozen=True, slots=True)
class Table:
    """passing, drain, work: [stage][first block], as in the module's docstring; root_s: the whole shape's bound."""

    passing: list[list[float]]
    drain: list[list[float]]
    work: list[list[float]]
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
        self._limit_bytes = problem.memory_limit_bytes
        self._num_blocks = len(problem.graph.blocks)
        self._ways: dict[tuple[int, Piece], Option] = {}
        self._options: dict[tuple[int, int, int], Option | None] = {}
        self.table = self._tabulate(self.option)
        self.root_bound_s = self.table.root_s

    def option(self, stage: int, start: int, stop: int) -> Option | None:
        """The best way to run blocks [start, stop) as `stage` that fits in memory, None if there is none.

        A stage recomputes only where it must: the simulator's step time never falls when a stage gets slower, and
        whether other stages fit does not depend on this one.
        """
        key = (stage, start, stop)
        if key not in self._options:
            ways = (self._way(stage, Piece(start, stop, recompute)) for recompute in self.problem.recompute_choices)
            self._options[key] = next((way for way in ways if way.peak_bytes <= self._limit_bytes), None)
        return self._options[key]

    @cached_property
    def free_bound_s(self) -> float:
        """`root_bound_s` if memory had no limit."""
        return self._tabulate(
            lambda stage, start, stop: self._way(stage, Piece(start, stop, self.problem.recompute_choices[0]))
        ).root_s

    def smallest(self) -> tuple[tuple[Piece, ...], int]:
        """The pieces whose fullest rank needs least memory, and that need in bytes, whether or not it fits."""
        num_stages, num_blocks = self.shape.pipeline, self._num_blocks
        best: dict[tuple[int, int], tuple[int, tuple[Piece, ...]]] = {(num_stages, num_blocks): (0, ())}
        for stage in reversed(range(num_stages)):
            for start in self.starts(stage):
                ways = []
                for stop in self.stops(stage, start):
                    rest_bytes, rest = best[stage + 1, stop]
                    for recompute in reversed(self.problem.recompute_choices):
                        option = self._way(stage, Piece(start, stop, recompute))
                        ways.append((max(option.peak_bytes, rest_bytes), (option.piece, *rest)))
                best[stage, start] = min(ways, key=lambda way: way[0])
        peak_bytes, pieces = best[0, 0]
        return pieces, peak_bytes

    def solve(self, below_s: float = math.inf, max_visits: int | None = None) -> Solution:
        """The pieces of least simulated step time, if that is less than `below_s`.

        max_visits: give up proving after so many partial plans, once any plan is known.
        """
        return _Walk(self, below_s, max_visits).run()

    def first(self) -> tuple[Piece, ...] | None:
        """The pieces that the bounds alone point to; None when nothing fits in memory."""
        node = _Node((), 0, 0.0, 0.0, 0.0, self.root_bound_s)
        while len(node.options) < self.shape.pipeline:
            node = min(children(self, node), key=lambda child: child.bound_s, default=None)
            if node is None:
                return None
        return tuple(option.piece for option in node.options)

    def plan(self, pieces: tuple[Piece, ...]) -> Plan:
        return assemble(self.problem, self.shape, self.chain, pieces)

    def step_time_s(self, pieces: tuple[Piece, ...]) -> float:
        """The simulator's step time of a whole plan."""
        plan = self.plan(pieces)
        costs = self._prices.of_plan(plan, self.shape, self.chain, pieces)
        return step_time_s(self.shape.pipeline, self.shape.microbatches, self.shape.schedule, costs)

    def price(self, stage: int, piece: Piece) -> StageCost:
        return self._prices.cost(self.shape, self.chain, stage, piece)

    def _way(self, stage: int, piece: Piece) -> Option:
        key = (stage, piece)
        if key not in self._ways:
            shape, cost = self.shape, self.price(stage, piece)
            peak_bytes = stage_peak_bytes(cost, shape.schedule, stage, shape.pipeline, shape.microbatches)
            pass_s = cost.forward_s + cost.backward_s + 2 * cost.send_s
            # reduce_model_s is left out: it may depend on where another stage lies, see StagePrices.cost
            tail_s = exposed_reduce_s(cost) - cost.reduce_model_s + cost.optimizer_s
            self._ways[key] = Option(piece, cost, peak_bytes, pass_s, tail_s)
        return self._ways[key]

    def starts(self, stage: int) -> range:
        return range(stage, self._num_blocks - self.shape.pipeline + stage + 1) if stage else range(1)

    def stops(self, stage: int, start: int) -> range:
        left = self.shape.pipeline - stage - 1
        return range(start + 1, self._num_blocks - left + 1) if left else range(self._num_blocks, self._num_blocks + 1)

    def _tabulate(self, option: Callable[[int, int, int], Option | None]) -> Table:
        num_stages, num_blocks, count = self.shape.pipeline, self._num_blocks, self.shape.microbatches
        passing, drain, work = ([[math.inf] * (num_blocks + 1) for _ in range(num_stages + 1)] for _ in range(3))
        passing[num_stages][num_blocks] = drain[num_stages][num_blocks] = work[num_stages][num_blocks] = 0.0
        root_s = math.inf
        is_1f1b = self.shape.schedule == "1f1b"
        for stage in reversed(range(num_stages)):
            for start in self.starts(stage):
                for stop in self.stops(stage, start):
                    if passing[stage + 1][stop] == math.inf or (o := option(stage, start, stop)) is None:
                        continue
                    own_s = count * o.compute_s
                    trip_s = o.pass_s + passing[stage + 1][stop]
                    drain_s = max(
                        own_s,
                        o.pass_s + drain[stage + 1][stop],
                        trip_s + (count - 1) * o.cost.send_s,
                        _cycles(o, stage, num_stages - 1, trip_s, 0.0, self.shape) if is_1f1b else trip_s,
                    )
                    work_s = max(own_s + o.tail_s, o.cost.forward_s + o.cost.send_s + work[stage + 1][stop])
                    if stage == 0:
                        root_s = min(root_s, max(drain_s + o.tail_s, work_s))
                    passing[stage][start] = min(passing[stage][start], trip_s)
                    drain[stage][start] = min(drain[stage][start], drain_s)
                    work[stage][start] = min(work[stage][start], work_s)
        return Table(passing, drain, work, root_s)


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
        self.open_bound_s = math.inf

    def run(self) -> Solution:
        self._descend(_Node((), 0, 0.0, 0.0, 0.0, self.search.root_bound_s))
        while self.open_bound_s < self.best_s and self.best is not None and self._improve(self.best):
            pass
        return Solution(self.best, self.best_s, self.open_bound_s, self.num_simulated, self.num_visited)

    def _cutoff(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def _improve(self, pieces: tuple[Piece, ...]) -> bool:
        """Whether moving one cut by one block helps: what a proof that was cut short is worth finishing with."""
        for cut in range(1, len(pieces)):
            for shift in (-1, 1):
                edges = [0, *(piece.stop for piece in pieces)]
                edges[cut] += shift
                if not edges[cut - 1] < edges[cut] < edges[cut + 1]:
                    continue
                options = [self.search.option(s, *edge) for s, edge in enumerate(itertools.pairwise(edges))]
                if None not in options and self._simulate(tuple(option.piece for option in options)):
                    return True
        return False

    def _simulate(self, pieces: tuple[Piece, ...]) -> bool:
        """Whether this is the best plan so far; then it is kept."""
        self.num_simulated += 1
        step_time_s = self.search.step_time_s(pieces)
        if step_time_s >= self._cutoff():
            return False
        self.best_s, self.best = step_time_s, pieces
        return True

    def _descend(self, node: _Node) -> None:
        if node.bound_s >= self._cutoff():
            return
        if self.max_visits is not None and self.num_visited >= self.max_visits and self.best_s < math.inf:
            self.open_bound_s = min(self.open_bound_s, node.bound_s)
            return
        self.num_visited += 1
        if len(node.options) == self.shape.pipeline:
            self._simulate(tuple(option.piece for option in node.options))
            return
        for child in sorted(children(self.search, node), key=lambda child: child.bound_s):
            self._descend(child)


def children(search: StageSearch, node: _Node) -> Iterator[_Node]:
    """All ways to decide one more stage, each with its lower bound."""
    shape, table, stage, count = search.shape, search.table, len(node.options), search.shape.microbatches
    is_1f1b = shape.schedule == "1f1b"
    for stop in search.stops(stage, node.stop):
        rest_s = table.passing[stage + 1][stop]
        if rest_s == math.inf or (option := search.option(stage, node.stop, stop)) is None:
            continue
        options = (*node.options, option)
        tail_s, own_s = options[0].tail_s, count * option.compute_s
        pass_s, down_s = node.pass_s + option.pass_s, node.down_s + option.cost.forward_s + option.cost.send_s
        path_s = max(
            node.path_s,
            node.pass_s + own_s + tail_s,
            node.down_s + own_s + option.tail_s,
            pass_s + rest_s + (count - 1) * option.cost.send_s + tail_s,
            _cycle_bound(options, rest_s, shape) + tail_s if is_1f1b else 0.0,
        )
        bound_s = max(path_s, pass_s + table.drain[stage + 1][stop] + tail_s, down_s + table.work[stage + 1][stop])
        if not is_1f1b:
            slowest_forward_s = max(max(o.cost.forward_s, o.cost.send_s) for o in options)
            slowest_backward_s = max(max(o.cost.backward_s, o.cost.send_s) for o in options)
            bound_s = max(bound_s, pass_s + rest_s + (count - 1) * (slowest_forward_s + slowest_backward_s) + tail_s)
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
            trip_s = before_s[e] - before_s[a] + options[e].compute_s
            best_s = max(best_s, before_s[a] + _cycles(option, a, e, trip_s, warmup_s, shape))
        trip_s = before_s[-1] - before_s[a] + rest_s
        best_s = max(best_s, before_s[a] + _cycles(option, a, shape.pipeline - 1, trip_s, 0.0, shape))
    return best_s


def _cycles(option: Option, a: int, e: int, trip_s: float, warmup_s: float, shape: Shape) -> float:
    """From the start of stage a's first forward to the end of its last backward, by paths that go round from a to e.

    Microbatch 0 goes from a to e, which takes its warm-up and goes back: trip_s + warmup_s. Then n times the cycle
    B(i) on a, F(i + P - a) on a, down to e, where B(i + e - a + 1) follows it, and back up to a. Then the rest of a's
    own instructions. The length is linear in n, so that none and as many as there are microbatches for are the
    extremes. The mirror image of none: all of a's forwards, with the backwards between them, then the last
    microbatch's round trip.
    """
    count, held, advance = shape.microbatches, shape.pipeline - a, e - a + 1
    forward_s, backward_s = option.cost.forward_s, option.cost.backward_s
    longest_s = trip_s + (count - 1) * forward_s + max(0, count - held) * backward_s
    for num_cycles in {0, max(0, (count - 1 - held) // advance + 1)}:
        done = num_cycles * advance
        rest_s = (count - 1 - done) * backward_s + max(0, count - held - done) * forward_s
        longest_s = max(longest_s, (num_cycles + 1) * trip_s + warmup_s + rest_s)
    return longest_s
