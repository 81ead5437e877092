"""The least step time of the pipelines that complete a state of `Room`, by dynamic programming from the end.

With f, b, h, t the forward, backward, send and tail seconds of a stage, c = f + b, M microbatches of which 1F1B keeps K in
flight at a stage, and x' the state behind a move, over all groups of devices that the next stage may have (r stages are
left, from block i on):

    passing[x, r, i] = min over move, way, stop of (c + 2 h) + passing[x', r - 1, stop]
    drain[x, r, i]   = min of max(M c, (c + 2 h) + drain[x', r - 1, stop])
    back[x, r, i]    = min of max((f + h) + back[x', r - 1, stop], (c + 2 h) + t + passing[x', r - 1, stop])
    work[x, r, i]    = min of max(M c + t, (f + h) + work[x', r - 1, stop], lead + the same as back)

passing is the round trip of a microbatch; drain the work of the slowest stage between the trips to it and back; back what
the last microbatch takes down to the end and back up to some stage, whose tail follows; and lead = (M - 1) f + (M - K) b
what a stage does before that microbatch. Each is the length of paths that every schedule contains, so that the most of
them bounds every plan; a way counts where it fits in memory with r - 1 stages behind it. A boundary is taken to be sent
over the fastest link that it may have, and to be no larger than what leaves.

So it is under 1F1B and GPipe. Where backwards come in halves, the stages behind may still owe their weight halves when a stage
ends, so that of these paths only the ones down to a stage are left, and without a flush nothing but a stage's own work:

    work[x, r, i]    = min of max(M c + t, (f + h) + work[x', r - 1, stop])                 f + h = 0 without a flush
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..schedule.orders import schedule_named
from .constraints import SEARCHED_SCHEDULES
from .problem import Problem
from .stages import FIT_SLACK
from .unequal_room import START, Move, Room, State
from .unequal_ways import Way, WayFinder

# Runs that are sums of their blocks may be off by so much of their memory, and whole plans by so much of their time.
SUM_SLACK = 0.005
TIME_SLACK = 0.995

# What `least` has: c, c + 2 h, f + h, M c + t, lead + f + h, lead + c + 2 h + t, c + 2 h + t.
_NUM_TERMS = 7


class Bounds:
    """One number of microbatches and a schedule. most_stages: that a pipeline has."""

    def __init__(
        self, problem: Problem, room: Room, finder: WayFinder, microbatches: int, schedule: str, most_stages: int
    ) -> None:
        self.problem, self.room, self.finder = problem, room, finder
        self.microbatches, self.schedule, self.most_stages = microbatches, schedule, most_stages
        self.num_blocks = len(problem.graph.blocks)
        self.has_trips = schedule in SEARCHED_SCHEDULES
        self._flushes = schedule_named(schedule).flushes
        # Sums of blocks are no more exact than single precision.
        self._dtype = np.float64 if finder.is_exact else np.float32
        in_flight = schedule_named(schedule).in_flight
        # By stages behind.
        self.held = np.array([in_flight(0, behind + 1, microbatches) for behind in range(most_stages)])
        self._least: dict[tuple, np.ndarray | None] = {}
        self._sends: dict[tuple, np.ndarray] = {}
        self._tables: dict[State, np.ndarray] = {}
        self._end = np.full((4, most_stages + 1, self.num_blocks + 1), math.inf, self._dtype)
        self._end[:, 0, self.num_blocks] = 0.0
        # A round trip through no stage.
        self.end_trip = self._end[0]
        self._tabulate()

    def ways(self, move: Move) -> Sequence[Way]:
        return self.finder.ways(move.kind, move.ranks, self.microbatches)

    def fits(self, way: Way, behind: int) -> np.ndarray:
        """Whether each run fits with so many stages behind it."""
        if self.finder.is_exact:
            return way.fits(self.schedule, behind, self.microbatches, FIT_SLACK)
        return way.most_held(SUM_SLACK) >= self.held[behind]

    def lead_s(self, way: Way, behind: int) -> np.ndarray:
        """What a stage does before it begins with the last microbatch."""
        count = self.microbatches
        return (count - 1) * way.forward_s + max(0, count - int(self.held[behind])) * way.backward_s

    def down_s(self, forward_s: np.ndarray, send_s: np.ndarray) -> np.ndarray:
        """How much later the next stage begins than this one."""
        return forward_s + send_s if self._flushes else np.zeros_like(forward_s)

    def send_s(self, move: Move, way: Way) -> np.ndarray:
        """[stop]: the least that handing on takes."""
        key = (move.kind, move.joined, id(way))
        if key not in self._sends:
            self._sends[key] = self._send_s(move, way)
        return self._sends[key]

    def _send_s(self, move: Move, way: Way) -> np.ndarray:
        found = np.zeros(self.num_blocks + 1)
        pairs = [(move.ranks, move.ranks)] if move.joined else self._beside(move)
        for size in set(way.boundary_bytes[1:-1]):
            if pairs and size:
                seconds = min(self.problem.costs.boundary_s(size, *pair) for pair in pairs)
                found[1:-1][way.boundary_bytes[1:-1] == size] = seconds
        return found

    def _beside(self, move: Move) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """One rank of each kind of another host to send to."""
        cluster, mine = self.problem.cluster, {self.problem.cluster.host(rank) for rank in move.ranks}
        found = {}
        for hosts in self.room.hosts:
            for host in hosts:
                if cluster.host(host[0]) not in mine:
                    found[cluster.kind_number(host[0])] = (move.ranks, (host[0],))
        return list(found.values())

    def least(self, move: Move) -> np.ndarray | None:
        """The terms of a stage at their least over the ways of a move: [term, stages behind, start, stop]."""
        key = (move.kind, move.joined)
        if key not in self._least:
            self._least[key] = self._find_least(move)
        return self._least[key]

    def _find_least(self, move: Move) -> np.ndarray | None:
        shape = (_NUM_TERMS, self.most_stages, self.num_blocks + 1, self.num_blocks + 1)
        found = np.full(shape, math.inf, self._dtype)
        levels, level_of = np.unique(self.held, return_inverse=True)
        for way in self.ways(move):
            send_s = self.send_s(move, way)[None, :]
            compute_s, down_s = way.forward_s + way.backward_s, self.down_s(way.forward_s, send_s)
            pass_s = compute_s + 2 * send_s
            plain = (compute_s, pass_s, down_s, self.microbatches * compute_s + way.tail_s)
            for level in range(len(levels)):
                behinds = np.nonzero(level_of == level)[0]
                lead_s = self.lead_s(way, behinds[0])
                terms = np.stack([*plain, lead_s + down_s, lead_s + pass_s + way.tail_s, pass_s + way.tail_s])
                for behind in behinds if self.finder.is_exact else behinds[:1]:
                    open_ = self.fits(way, behind)
                    if not open_.any():
                        break
                    np.minimum(found[:, behind], np.where(open_, terms, math.inf), out=found[:, behind])
        if not self.finder.is_exact:
            found = found[:, [int(np.argmax(level_of == level)) for level in level_of]]
        return found if np.isfinite(found[0]).any() else None

    def _tabulate(self) -> None:
        count = self.microbatches
        for state in self.room.states():
            # As many stages as there are devices left.
            rows = min(self.most_stages, self.room.left(state))
            table = np.full_like(self._end, math.inf)
            for move in self.room.moves(state):
                least = self.least(move)
                if least is None:
                    continue
                over = self.room.is_end(move.after)
                num = 1 if over else rows
                rest = self._end if over else self._tables[move.after]
                passing, drain, work, back = rest[:, :num, None, :]
                compute_s, pass_s, down_s, tail_s, lead_down_s, lead_tail_s, pass_tail_s = least[:, :num]
                work_s = np.maximum(tail_s, down_s + work)
                if self.has_trips:
                    mirrored_s = np.maximum(lead_down_s + back, lead_tail_s + passing)
                    found = (
                        pass_s + passing,
                        np.maximum(count * compute_s, pass_s + drain),
                        np.maximum(work_s, mirrored_s),
                        np.maximum(down_s + back, pass_tail_s + passing),
                    )
                else:
                    found = self._no_trips(work_s)
                for mine, values in zip(table, found, strict=True):
                    np.minimum(mine[1 : num + 1], values.min(axis=2), out=mine[1 : num + 1])
            self._tables[state] = table

    def rest(self, state: State, stages: int) -> np.ndarray:
        """(passing, drain, work, back) of what is left behind a state in so many stages: [table, first block]."""
        return (self._end if self.room.is_end(state) else self._tables[state])[:, stages]

    @staticmethod
    def _no_trips(work_s: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tables in which only `work` says more than whether there is any way."""
        open_ = np.where(np.isfinite(work_s), 0.0, math.inf)
        return open_, open_, work_s, open_

    @staticmethod
    def _no_trips(work_s: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tables in which `work` alone says more than whether there is any way."""
        open_ = np.where(np.isfinite(work_s), 0.0, math.inf)
        return open_, open_, work_s, open_

    def root_s(self, stages: int) -> float:
        """No plan of so many stages is faster."""
        _, drain, work, _ = self.rest(START, stages)[:, 0]
        return float(max(drain, work)) * (1.0 if self.finder.is_exact else TIME_SLACK)
