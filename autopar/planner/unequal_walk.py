"""The walk over the pipelines of an unequal cluster: depth first, best bound first, dropping what cannot beat the best.

A node has decided its first stages, their devices and their blocks; each way to decide one more is bounded by what is
decided and by the tables of planner/unequal_bounds.py. Whole plans are priced and held against every device's memory
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..cost.mixed import rank_classes
from ..plan import Plan, Prediction
from ..simulate import simulate
from .judge import group_peak_bytes, plan_time_s
from .problem import Problem
from .stages import TOLERANCE
from .unequal_bounds import TIME_SLACK, Bounds
from .unequal_room import START, Move, State
from .unequal_ways import Mesh

# How much what is left counts in the order of ways beside their bounds, which for many ways are those of one path.
LEFT_WEIGHT = 0.3

Part = tuple[Mesh, int, int, Move]


class Judge:
    """Prices whole plans exactly and keeps the best that fits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best: Plan | None = None
        self.best_s = math.inf
        # The stages of the best plan, where a walk has found it.
        self.parts: tuple[Part, ...] = ()
        self.tried: dict[tuple, Plan] = {}

    def plan(self, parts: tuple[Part, ...], microbatches: int, schedule: str) -> Plan:
        layouts: dict = {}
        stages = tuple(mesh.stage(start, stop, layouts) for mesh, start, stop, _ in parts)
        graph = self.problem.graph
        return Plan(
            graph.name, graph.fingerprint, self.problem.cluster.world_size, graph.batch_size, microbatches, schedule,
            stages, tuple(layouts), precision=graph.precision,
        )  # fmt: skip

    def offer(self, plan: Plan) -> bool:
        """Whether this is the best plan so far, and keeps what is pinned; then it is kept."""
        if self.problem.refusal(plan):
            return False
        if plan.pipeline < len(plan.stages):
            return self._offer_simulated(plan)
        costs = [self.problem.costs.stage(plan, s) for s in range(len(plan.stages))]
        seconds = plan_time_s(plan, costs)
        key = (len(costs), plan.microbatches, plan.stages[0].data, plan.stages[0].tensor)
        before = self.tried.get(key)
        better = seconds < self.best_s * (1 - TOLERANCE)
        if not better and before is not None and before.prediction.step_time_s <= seconds:
            return False
        peak_bytes = self._peak_bytes(plan)
        if peak_bytes is None:
            return False
        plan = replace(plan, prediction=Prediction(seconds, peak_bytes))
        if before is None or seconds < before.prediction.step_time_s:
            self.tried[key] = plan
        if better:
            self.best, self.best_s, self.parts = plan, seconds, ()
        return better

    def _offer_simulated(self, plan: Plan) -> bool:
        """Of another method's plan with several stages per group of ranks."""
        line = simulate(self.problem.graph, plan, self.problem.cluster, model=self.problem.costs)
        if self.problem.excess_bytes(line.peak_memory_bytes) > 0 or line.step_time_s >= self.best_s * (1 - TOLERANCE):
            return False
        found = Prediction(line.step_time_s, max(line.peak_memory_bytes.values()))
        self.best, self.best_s, self.parts = replace(plan, prediction=found), line.step_time_s, ()
        return True

    def offer_parts(self, parts: tuple[Part, ...], microbatches: int, schedule: str) -> bool:
        """As `offer`, of a plan of these parts."""
        better = self.offer(self.plan(parts, microbatches, schedule))
        if better:
            self.parts = parts
        return better

    def _peak_bytes(self, plan: Plan) -> int | None:
        """Of the fullest rank; None where a device has not enough."""
        most = 0
        for s, stage in enumerate(plan.stages):
            for one in rank_classes(self.problem.cluster, stage):
                cost = self.problem.costs.of_rank(plan, s, one.ranks[0])
                peak = group_peak_bytes(plan, s, [cost])
                if peak > min(map(self.problem.memory_limit_of, one.ranks)):
                    return None
                most = max(most, peak)
        return most


@dataclass(frozen=True, slots=True)
class _Node:
    """The first stages, decided. before_s: the sum of their c + 2 h; down_s: of f + h; tail_s: of the first one; lead_s: the
    most of what one of them does before the last microbatch; path_s: the longest path found so far; bound_s: no completion
    is faster; guess_s: in which order to look."""

    state: State
    start: int
    parts: tuple[Part, ...]
    before_s: float
    down_s: float
    tail_s: float
    lead_s: float
    path_s: float
    bound_s: float
    guess_s: float


class Walk:
    """One branch and bound over the pipelines of `stages` stages."""

    def __init__(self, bounds: Bounds, judge: Judge, stages: int, max_visits: int) -> None:
        self.bounds, self.judge, self.stages, self.max_visits = bounds, judge, stages, max_visits
        self.slack = 1.0 if bounds.finder.is_exact else TIME_SLACK
        self.num_visited = 0
        self.open_bound_s = math.inf

    def run(self) -> float:
        """The bound of what was not looked at, infinite where all was."""
        self._descend(_Node(START, 0, (), 0.0, 0.0, 0.0, 0.0, 0.0, self.bounds.root_s(self.stages), 0.0))
        return self.open_bound_s

    def _cutoff(self) -> float:
        return self.judge.best_s * (1 - TOLERANCE)

    def _descend(self, node: _Node) -> None:
        if node.bound_s >= self._cutoff():
            return
        if self.num_visited >= self.max_visits:
            self.open_bound_s = min(self.open_bound_s, node.bound_s)
            return
        self.num_visited += 1
        if len(node.parts) == self.stages:
            self.judge.offer_parts(node.parts, self.bounds.microbatches, self.bounds.schedule)
            return
        for child in sorted(self._children(node), key=lambda child: child.guess_s):
            self._descend(child)

    def _children(self, node: _Node) -> Iterator[_Node]:
        bounds, count = self.bounds, self.bounds.microbatches
        behind = self.stages - len(node.parts) - 1
        first = not node.parts
        window = slice(node.start + 1, bounds.num_blocks - behind + 1)
        if not behind:
            window = slice(bounds.num_blocks, bounds.num_blocks + 1)
        allowed = bounds.problem.stage_mask(len(node.parts), self.stages)
        allowed = True if allowed is None else allowed[node.start, window]
        for move in bounds.room.moves(node.state):
            if bounds.room.is_end(move.after) != (behind == 0):
                continue
            passing, drain, work, back = bounds.rest(move.after, behind)[:, window]
            if not np.isfinite(drain).any():
                continue
            for way in bounds.ways(move):
                forward_s, backward_s = way.forward_s[node.start, window], way.backward_s[node.start, window]
                send_s, tail_s = bounds.send_s(move, way)[window], way.tail_s[node.start, window]
                own_s = count * (forward_s + backward_s)
                before_s = node.before_s + forward_s + backward_s + 2 * send_s
                down_s = node.down_s + bounds.down_s(forward_s, send_s)
                first_tail_s = tail_s if first else node.tail_s
                path_s = np.maximum(node.path_s, node.down_s + own_s + tail_s)
                lead_s = np.maximum(node.lead_s, bounds.lead_s(way, behind)[node.start, window])
                bounds_s = (path_s, down_s + work)
                if bounds.has_trips:
                    path_s = np.maximum(path_s, node.before_s + own_s + first_tail_s)
                    # The last microbatch, which comes after all that a decided stage does before, goes to the end and back.
                    trip_s = node.down_s + before_s - node.before_s + passing
                    bounds_s = (
                        path_s,
                        before_s + drain + first_tail_s,
                        before_s + passing + (count - 1) * send_s + first_tail_s,
                        down_s + work,
                        lead_s + before_s + passing + first_tail_s,
                        lead_s + down_s + back,
                        lead_s + trip_s + tail_s,
                    )
                bound_s = np.maximum.reduce(bounds_s) * self.slack
                guess_s = bound_s + LEFT_WEIGHT * np.maximum(drain, work)
                fits = bounds.fits(way, behind)[node.start, window] & allowed
                for i in np.nonzero(fits & (bound_s < self._cutoff()))[0]:
                    stop = window.start + int(i)
                    yield _Node(
                        move.after,
                        stop,
                        (*node.parts, (replace(way.mesh, ranks=move.ranks), node.start, stop, move)),
                        float(before_s[i]),
                        float(down_s[i]),
                        float(first_tail_s[i] if first else node.tail_s),
                        float(lead_s[i]),
                        float(path_s[i]),
                        max(node.bound_s, float(bound_s[i])),
                        float(guess_s[i]),
                    )


def improve(judge: Judge, bounds: Bounds, rounds: int = 8) -> None:
    """Moves one cut by one block, or changes the mesh of one stage, of the best plan, as long as that helps."""
    for _ in range(rounds):
        parts = judge.parts
        if not any(
            judge.offer_parts(other, bounds.microbatches, bounds.schedule) for other in _neighbours(parts, bounds)
        ):
            return


def _neighbours(parts: tuple[Part, ...], bounds: Bounds) -> Iterator[tuple[Part, ...]]:
    for s in range(len(parts) - 1):
        (left, start, cut, move), (right, _, stop, after) = parts[s : s + 2]
        for moved in (cut - 1, cut + 1):
            if start < moved < stop:
                yield (*parts[:s], (left, start, moved, move), (right, moved, stop, after), *parts[s + 2 :])
    for s, (mesh, start, stop, move) in enumerate(parts):
        for way in bounds.ways(move):
            other = replace(way.mesh, ranks=move.ranks)
            if other != mesh and bounds.fits(way, len(parts) - s - 1)[start, stop]:
                yield (*parts[:s], (other, start, stop, move), *parts[s + 1 :])
