"""The least step time of the pipelines that complete a state of `Room`, by dynamic programming from the end.

With f, b, h, t the forward, backward, send and tail seconds of a stage, c = f + b, and M microbatches, the bounds of
planner/stages.py, taken over all groups of devices that the next stage may have (r stages are left, from block i on):

    passing[x, r, i] = min over move, way, stop of (c + 2 h) + passing[x', r - 1, stop]
    drain[x, r, i]   = min of max(M c, (c + 2 h) + drain[x', r - 1, stop])
    work[x, r, i]    = min of max(M c + t, (f + h) + work[x', r - 1, stop])

x' being the state behind the move; a way counts where it fits in memory with r - 1 stages behind it. drain is exactly
the least over all completions of its own path, work of its own; their maximum at the start bounds every plan. A boundary
is taken to be sent over the fastest link that it may have, and to be no larger than what leaves.

`quick`: without memory, for the fastest ways alone, whatever the number of stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import Problem
from .stages import FIT_SLACK
from .unequal_room import START, Move, Room, State
from .unequal_ways import Way, WayFinder

# Runs that are sums of their blocks may be off by so much of their memory, and whole plans by so much of their time.
SUM_SLACK = 0.005
TIME_SLACK = 0.995


class Bounds:
    """One number of microbatches and a schedule. most_stages: that a pipeline has."""

    def __init__(
        self,
        problem: Problem,
        room: Room,
        finder: WayFinder,
        microbatches: int,
        schedule: str,
        most_stages: int,
        quick: bool,
    ) -> None:
        self.problem, self.room, self.finder = problem, room, finder
        self.microbatches, self.schedule, self.quick = microbatches, schedule, quick
        self.num_blocks = len(problem.graph.blocks)
        self.most_stages = 1 if quick else most_stages
        self._least: dict[tuple, tuple[np.ndarray, ...] | None] = {}
        self._sends: dict[tuple, np.ndarray] = {}
        self.passing: dict[State, np.ndarray] = {}
        self.drain: dict[State, np.ndarray] = {}
        self.work: dict[State, np.ndarray] = {}
        self._tabulate()

    def ways(self, move: Move) -> Sequence[Way]:
        return self.finder.ways(move.kind, move.ranks, self.microbatches, self.quick)

    def fits(self, way: Way, behind: int) -> np.ndarray:
        slack = FIT_SLACK if self.finder.is_exact else SUM_SLACK
        return way.fits(self.schedule, behind, self.microbatches, slack)

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

    def least(self, move: Move) -> tuple[np.ndarray, ...] | None:
        """(c, c + 2 h, f + h, M c + t) at their least over the ways of a move, each [stages behind, start, stop]."""
        key = (move.kind, move.joined)
        if key not in self._least:
            self._least[key] = self._find_least(move)
        return self._least[key]

    def _find_least(self, move: Move) -> tuple[np.ndarray, ...] | None:
        shape = (self.most_stages, self.num_blocks + 1, self.num_blocks + 1)
        tables = tuple(np.full(shape, math.inf) for _ in range(4))
        for way in self.ways(move):
            send_s = self.send_s(move, way)[None, :]
            compute_s = way.forward_s + way.backward_s
            values = (
                compute_s,
                compute_s + 2 * send_s,
                way.forward_s + send_s,
                self.microbatches * compute_s + way.tail_s,
            )
            for behind in range(self.most_stages):
                open_ = way.classes[0][0].exists > 0 if self.quick else self.fits(way, behind)
                for table, value in zip(tables, values, strict=True):
                    np.minimum(table[behind], np.where(open_, value, math.inf), out=table[behind])
        return tables if np.isfinite(tables[0]).any() else None

    def _tabulate(self) -> None:
        stages, blocks, count = self.most_stages, self.num_blocks, self.microbatches
        rows = 1 if self.quick else stages + 1
        end = np.full((rows, blocks + 1), math.inf)
        end[0, blocks] = 0.0
        for state in self.room.states():
            tables = [np.full((rows, blocks + 1), math.inf) for _ in range(3)]
            for move in self.room.moves(state):
                least = self.least(move)
                if least is None:
                    continue
                over = self.room.is_end(move.after)
                passing, drain, work = (
                    (end,) * 3 if over else (t[move.after] for t in (self.passing, self.drain, self.work))
                )
                behind = slice(0, rows if self.quick else rows - 1)
                compute_s, pass_s, down_s, tail_s = least
                found = (
                    (pass_s + passing[behind, None, :]).min(axis=2),
                    np.maximum(count * compute_s, pass_s + drain[behind, None, :]).min(axis=2),
                    np.maximum(tail_s, down_s + work[behind, None, :]).min(axis=2),
                )
                own = slice(0, rows) if self.quick else slice(1, rows)
                for table, values in zip(tables, found, strict=True):
                    np.minimum(table[own], values, out=table[own])
            self.passing[state], self.drain[state], self.work[state] = tables
        self.end = end

    def rest(self, state: State, stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(passing, drain, work) of what is left behind a state in so many stages: [first block]."""
        if self.room.is_end(state):
            return (self.end[stages],) * 3
        return self.passing[state][stages], self.drain[state][stages], self.work[state][stages]

    def root_s(self, stages: int = 0) -> float:
        """No plan of so many stages is faster."""
        found = max(float(self.drain[START][stages, 0]), float(self.work[START][stages, 0]))
        return found * (1.0 if self.finder.is_exact else TIME_SLACK)
