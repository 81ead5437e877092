"""PipeDream's partitioning: stages x replicas for a steady asynchronous 1F1B pipeline, level by level of bandwidth.

A stage i..j is what head j of the model has beyond head i (`pipedream_heads`). With T(i..j) the time of a minibatch on
one device, W its parameter bytes, a_j the bytes that cross the end of j,

    stage(i..j, m)  = [T(i..j) + 4 (m-1)/m W(i..j) / B] / m                                         `_stage_s`
    A(i..j, m)      = min( stage(i..j, m),
                           min over i < k < j, m' < m of
                           max( A(i..k, m - m'), stage(k..j, m'), 2 a_k / (B m') ) )                `_split`

subject to ceil((M - m) / m') x (activations + parameters of k..j) <= memory, m counting the devices up to and with
the stage, because that many minibatches are in flight behind it. On a cluster of levels (devices of a host, hosts),
T(i..j) of a level is A(i..j, M) of the level below. The transfer term is optional, as in the authors' program.

Reference: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .pipedream_heads import Heads


@dataclass(frozen=True, slots=True)
class Level:
    """`num` parts (devices of a host, or hosts) joined by links of this bandwidth each."""

    num: int
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Replicated:
    """Heads i..j on `replicas` devices."""

    start: int
    stop: int
    replicas: int


@dataclass(frozen=True, slots=True)
class PipeDreamPlan:
    stages: tuple[Replicated, ...]
    time_s: float


def pipedream_levels(
    heads: Heads,
    levels: Sequence[Level],
    memory_bytes: float = math.inf,
    transfers: bool = True,
    replicas: Sequence[int] | None = None,
) -> PipeDreamPlan | None:
    """The plan of least time per minibatch; None where none fits in memory.

    replicas: what a stage may have (at a single level), by default anything.
    """
    last = len(heads.time_s) - 1
    whole_s = np.where(heads.within, heads.time_s[None, :] - heads.time_s[:, None], math.inf)
    tables = []
    for number, level in enumerate(levels):
        table = _Table(heads, whole_s, level, memory_bytes, transfers, replicas, number == len(levels) - 1)
        tables.append(table)
        whole_s = table.best_s[level.num]
    if not math.isfinite(whole_s[0, last]):
        return None
    stages = _expand(tables, len(tables) - 1, 0, last)
    return PipeDreamPlan(tuple(stages), float(whole_s[0, last]))


def stages_time_s(
    heads: Heads, stages: Sequence[Replicated], bandwidth_bytes_per_s: float, transfers: bool = True
) -> float:
    """The objective of given stages on one level of bandwidth."""
    slowest_s = 0.0
    for stage in stages:
        i, j, m = stage.start, stage.stop, stage.replicas
        weights = heads.parameter_bytes[j] - heads.parameter_bytes[i]
        sync_s = 4 * (m - 1) / m * weights / bandwidth_bytes_per_s
        slowest_s = max(slowest_s, (heads.time_s[j] - heads.time_s[i] + sync_s) / m)
        if transfers:
            slowest_s = max(slowest_s, 2 * heads.output_bytes[i] / (bandwidth_bytes_per_s * m))
    return float(slowest_s)


def best_cuts(
    heads: Heads, replicas: Sequence[int], bandwidth_bytes_per_s: float, transfers: bool = True
) -> PipeDreamPlan:
    """The best places to cut for given numbers of replicas, from the first stage to the last."""
    num, last = len(heads.time_s), len(heads.time_s) - 1
    best_s, choice = np.full(num, math.inf), []
    best_s[0] = 0.0
    for m in replicas:
        whole_s = np.where(heads.within, heads.time_s[None, :] - heads.time_s[:, None], math.inf)
        stage_s = _stage_s(heads, whole_s, bandwidth_bytes_per_s, m)
        if transfers:
            stage_s = np.maximum(stage_s, (2 * heads.output_bytes / (bandwidth_bytes_per_s * m))[:, None])
        ways = np.maximum(best_s[:, None], stage_s)
        choice.append(ways.argmin(0))
        best_s = ways.min(0)
    stages, stop = [], last
    for m, chosen in zip(reversed(replicas), reversed(choice), strict=True):
        stages.append(Replicated(int(chosen[stop]), stop, m))
        stop = int(chosen[stop])
    return PipeDreamPlan(tuple(reversed(stages)), float(best_s[last]))


def _stage_s(heads: Heads, whole_s: np.ndarray, bandwidth_bytes_per_s: float, m: int) -> np.ndarray:
    weights = heads.parameter_bytes[None, :] - heads.parameter_bytes[:, None]
    return (whole_s + 4 * (m - 1) / m * weights / bandwidth_bytes_per_s) / m


class _Table:
    """A of one level: best_s[m][i, j], with how each was made."""

    def __init__(self, heads, whole_s, level: Level, memory_bytes, transfers, replicas, top: bool) -> None:
        self.heads, self.level, self.memory_bytes = heads, level, memory_bytes
        self.transfers = transfers
        num, num_heads = level.num, len(heads.time_s)
        # only what starts at the empty head is asked of the top level
        self.rows = np.arange(1 if top else num_heads)
        allowed = [m for m in range(1, num + 1) if replicas is None or m in replicas]
        stage_s = {m: _stage_s(heads, whole_s, level.bandwidth_bytes_per_s, m) for m in allowed}
        self.best_s: list[np.ndarray] = [np.full((len(self.rows), num_heads), math.inf) for _ in range(num + 1)]
        self.split: list[dict[tuple[int, int], tuple[int, int]]] = [{} for _ in range(num + 1)]
        stash = heads.activation_bytes + heads.parameter_bytes
        self.stash = stash[None, :] - stash[:, None]
        for m in range(1, num + 1):
            if m in stage_s:
                self._take(m, self._fitting(stage_s[m], m, m)[self.rows], m, None)
            for m_last in (one for one in allowed if one < m):
                self._split(m, m_last, self._fitting(stage_s[m_last], m, m_last))

    def _fitting(self, stage_s: np.ndarray, m: int, m_last: int) -> np.ndarray:
        held = math.ceil((self.level.num - m) / m_last) * self.stash
        return np.where(held <= self.memory_bytes, stage_s, math.inf)

    def _split(self, m: int, m_last: int, stage_s: np.ndarray) -> None:
        """A(i..k, m - m_last), then the stage k..j on m_last."""
        if self.transfers:
            send_s = 2 * self.heads.output_bytes / (self.level.bandwidth_bytes_per_s * m_last)
            stage_s = np.maximum(stage_s, send_s[:, None])
        front = self.best_s[m - m_last]
        # heads that nothing was found for cannot be split at
        useful = np.flatnonzero(np.isfinite(front).any(0))
        for row in self.rows:
            ways = np.maximum(front[row, useful, None], stage_s[useful])
            if len(useful):
                self._take(m, ways.min(0), m_last, useful[ways.argmin(0)], row)

    def _take(self, m: int, found_s: np.ndarray, m_last: int, cut: np.ndarray | None, row: int | None = None) -> None:
        table = self.best_s[m] if row is None else self.best_s[m][row]
        for where in zip(*np.nonzero(found_s < table), strict=True):
            table[where] = found_s[where]
            i, j = (int(where[0]), int(where[1])) if row is None else (int(row), int(where[0]))
            self.split[m][i, j] = (m_last, -1 if cut is None else int(cut[j]))


def _expand(tables: Sequence[_Table], number: int, start: int, stop: int, m: int | None = None) -> list[Replicated]:
    """The stages of start..stop on m parts of a level; the parts' own stages are cut by the level below."""
    table = tables[number]
    m = table.level.num if m is None else m
    m_last, cut = table.split[m][start, stop]
    before = [] if cut < 0 else _expand(tables, number, start, cut, m - m_last)
    own = start if cut < 0 else cut
    if number == 0:
        return [*before, Replicated(own, stop, m_last)]
    inner = _expand(tables, number - 1, own, stop)
    return [*before, *(Replicated(s.start, s.stop, s.replicas * m_last) for s in inner)]
