"""The walk over the cuts of one shape: depth first, best bound first, dropping what cannot beat the best plan known.

A node has decided its first stages; each way to decide one more is bounded by (1) to (5) of planner/stages.py, for all
ways at once as arrays over where the stage may stop. Whole plans are priced and held against the memory limit exactly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .pricing import Piece
from .stages import TOLERANCE, Solution, StageSearch, cycles_s


@dataclass(frozen=True, slots=True)
class _Node:
    """The first stages, decided: where they stop, and [stage] their forward, backward and send seconds.

    before_s[stage]: pass (c + 2 h) of the stages in front of it, one more entry than stages; down_s: f + h of them all;
    tail_s: of stage 0; path_s: the longest path found so far; bound_s: no completion is faster.
    """

    stops: tuple[int, ...]
    forward_s: np.ndarray
    backward_s: np.ndarray
    send_s: np.ndarray
    before_s: np.ndarray
    down_s: float
    tail_s: float
    path_s: float
    bound_s: float


def _root(search: StageSearch) -> _Node:
    nothing = np.zeros(0)
    return _Node((), nothing, nothing, nothing, np.zeros(1), 0.0, 0.0, 0.0, search.root_bound_s)


def first_pieces(search: StageSearch) -> tuple[Piece, ...] | None:
    """The pieces that the bounds alone point to; None when nothing fits in memory."""
    node = _root(search)
    while len(node.stops) < search.shape.pipeline:
        children = _Children(search, node)
        if not len(children.bound_s) or children.bound_s.min() == math.inf:
            return None
        node = children.node(int(children.bound_s.argmin()))
    return _pieces(search, node.stops)


def _pieces(search: StageSearch, stops: tuple[int, ...]) -> tuple[Piece, ...] | None:
    """The exact best ways to run the stages that stop there; None if one does not fit after all."""
    options = [search.option(stage, *edge) for stage, edge in enumerate(itertools.pairwise((0, *stops)))]
    return None if None in options else tuple(option.piece for option in options)


class _Children:
    """All ways to decide one more stage of `parent`; bound_s: [way]."""

    def __init__(self, search: StageSearch, parent: _Node) -> None:
        self.parent, self.shape = parent, search.shape
        stage, count = len(parent.stops), search.shape.microbatches
        start = parent.stops[-1] if parent.stops else 0
        window = search.stops(stage)
        offset = max(0, start + 1 - window.start)
        self.first_stop = window.start + offset
        self.way = way = search.ways(stage).part(start - search.starts(stage).start, slice(offset, None))
        after = slice(self.first_stop, window.stop)
        table = search.table
        rest_s = table.passing[stage + 1, after]
        own_s, before_s = count * way.compute_s, parent.before_s[-1]
        self.tail_s = tail_s = way.tail_s if stage == 0 else np.full_like(way.tail_s, parent.tail_s)
        self.pass_s, self.down_s = before_s + way.pass_s, parent.down_s + way.forward_s + way.send_s
        path_s = np.maximum(parent.path_s, before_s + own_s + tail_s)
        path_s = np.maximum(path_s, parent.down_s + own_s + way.tail_s)
        path_s = np.maximum(path_s, self.pass_s + rest_s + (count - 1) * way.send_s + tail_s)
        if self.shape.schedule == "1f1b":
            path_s = np.maximum(path_s, self._cycle_bound(rest_s) + tail_s)
        self.path_s = path_s
        bound_s = np.maximum(path_s, self.pass_s + table.drain[stage + 1, after] + tail_s)
        bound_s = np.maximum(bound_s, self.down_s + table.work[stage + 1, after])
        if self.shape.schedule == "gpipe":
            slowest_s = sum(
                np.maximum(np.maximum(mine, way.send_s), np.maximum(theirs, parent.send_s).max(initial=0.0))
                for mine, theirs in ((way.forward_s, parent.forward_s), (way.backward_s, parent.backward_s))
            )
            bound_s = np.maximum(bound_s, self.pass_s + rest_s + (count - 1) * slowest_s + tail_s)
        self.bound_s = bound_s

    def _cycle_bound(self, rest_s: np.ndarray) -> np.ndarray:
        """Bound (3) over all cycles that start at a decided stage, without what follows stage 0's last backward.

        rest_s: the least that the stages not decided yet add to a round trip (sum of c + 2 h).
        """
        parent, way, shape = self.parent, self.way, self.shape
        e, count = len(parent.stops), shape.microbatches
        own = cycles_s(
            way.forward_s, way.backward_s, e, shape.pipeline - 1, way.pass_s + rest_s, 0.0, shape.pipeline, count
        )
        longest_s = parent.before_s[-1] + own
        if e:
            a = np.arange(e)[:, None]
            forward_s, backward_s = parent.forward_s[:, None], parent.backward_s[:, None]
            before_s = parent.before_s[:-1, None]
            warmup_s = min(shape.pipeline - 1 - e, count - 1) * way.forward_s
            trip_s = parent.before_s[-1] - before_s + way.compute_s
            near = cycles_s(forward_s, backward_s, a, e, trip_s, warmup_s, shape.pipeline, count)
            trip_s = self.pass_s - before_s + rest_s
            far = cycles_s(forward_s, backward_s, a, shape.pipeline - 1, trip_s, 0.0, shape.pipeline, count)
            longest_s = np.maximum(longest_s, (before_s + np.maximum(near, far)).max(axis=0))
        return longest_s

    def node(self, i: int) -> _Node:
        parent, way = self.parent, self.way
        return _Node(
            (*parent.stops, self.first_stop + i),
            np.append(parent.forward_s, way.forward_s[i]),
            np.append(parent.backward_s, way.backward_s[i]),
            np.append(parent.send_s, way.send_s[i]),
            np.append(parent.before_s, self.pass_s[i]),
            float(self.down_s[i]),
            float(self.tail_s[i]),
            float(self.path_s[i]),
            float(self.bound_s[i]),
        )


class Walk:
    """One branch and bound over the cuts of `search`, for plans faster than `below_s`."""

    def __init__(self, search: StageSearch, below_s: float, max_visits: int | None) -> None:
        self.search, self.shape = search, search.shape
        self.best_s, self.best, self.max_visits = below_s, None, max_visits
        self.num_simulated = self.num_visited = 0
        self.open_bound_s = math.inf

    def run(self) -> Solution:
        budget = self.search.problem.budget
        try:
            self._descend(_root(self.search))
        except KeyboardInterrupt:
            if self.best is None:
                raise
            budget.interrupted()
            self.open_bound_s = self.search.root_bound_s
        while self.open_bound_s < self.best_s and self.best is not None and not budget.expired():
            if not self._improve(self.best):
                break
        return Solution(self.best, self.best_s, self.open_bound_s, self.num_simulated, self.num_visited)

    def _cutoff(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def _improve(self, pieces: tuple[Piece, ...]) -> bool:
        """Whether moving one cut by one block helps: what a proof that was cut short is worth finishing with."""
        for cut in range(len(pieces) - 1):
            for shift in (-1, 1):
                stops = [piece.stop for piece in pieces]
                stops[cut] += shift
                if pieces[cut].start < stops[cut] < stops[cut + 1] and self._simulate(tuple(stops)):
                    return True
        return False

    def _simulate(self, stops: tuple[int, ...]) -> bool:
        """Whether this is the best plan so far; then it is kept."""
        pieces = _pieces(self.search, stops)
        if pieces is None:
            return False
        self.num_simulated += 1
        step_time_s = self.search.step_time_s(pieces)
        if step_time_s >= self._cutoff():
            return False
        self.best_s, self.best = step_time_s, pieces
        return True

    def _descend(self, node: _Node) -> None:
        if node.bound_s >= self._cutoff():
            return
        has_plan = self.best_s < math.inf
        over = self.max_visits is not None and self.num_visited >= self.max_visits and has_plan
        if over or self.search.problem.budget.expired(has_plan):
            self.open_bound_s = min(self.open_bound_s, node.bound_s)
            return
        self.num_visited += 1
        if len(node.stops) == self.shape.pipeline:
            self._simulate(node.stops)
            return
        children = _Children(self.search, node)
        for i in np.argsort(children.bound_s, kind="stable"):
            if children.bound_s[i] >= self._cutoff():
                break
            self._descend(children.node(int(i)))
