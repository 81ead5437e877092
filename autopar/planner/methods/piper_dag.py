"""Piper's search over a DAG of layers: contiguous stages, each with its data and tensor degree and recomputation.

A tail I is a set of layers that contains all successors of its members. A pipeline is a chain of tails, empty = I_0
< I_1 < ... < I_S = all, and stage j runs S = I_j - I_{j-1} with d-way data and t-way tensor parallelism on t d
devices. With N samples a batch, s the sum of the data degrees of the stage and of those behind it, and one choice l
per layer v, the time of a stage per sample (TPS) is

    TPS(S, t, d, s) = min over l of  sum_v p_vl / d + [2 boundary(S, t) / d + 4 (d-1)/d sum_v w_v / N] / bandwidth
    such that                        sum_v A_vl ceil(s / d) + B_vl <= memory                           `Pieces`
    D[I][k][s]      = min over I', t, d of max(D[I'][k - t d][s - d], TPS(I - I', t, d, s))
    answer          = D[all][devices][N]

The inner choice starts from the fastest choices and swaps layers in the order of least time per byte freed; the last
swap is the cheapest one that suffices.

The DP is not walked over values of TPS. A stage in front of a tail needs more memory the larger the tail's s is, and
nothing else of the tail matters to it; so for a cap T on TPS

    s_T[I][k] = min over I', t, d of s_T[I'][k - t d] + d   such that  ceil(that / d) <= y_T(I - I', t, d)

says all: y_T is the most samples in flight with which the stage keeps T. `_Caps.solve` evaluates it for all tails of
one size, candidates and k at once, on the k between what I needs at least and what the rest leaves; `piper_dag`
bisects T.

Reference: Tarnawski, Narayanan and Phanishayee, "Piper: Multidimensional Planner for DNN Parallelization", NeurIPS
2021, section 4. The cap, the bounds on k and the last swap are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.layer_dag import LayerDag, LayerMachine
from .piper_pieces import MANY, DagStage, Pieces, least_time_s, tails
from .piper_swaps import run_starts

# The answer is within this share of the optimum of the recursion above.
TOLERANCE = 1e-5
# The first cap is so much above a bound that leaves memory out; three times as much if no plan keeps it, and so on up to
# the most, after which there is none.
FIRST_EXCESS, MOST_EXCESS = 0.02, 2.0
# Of so many tails all pairs are looked at once; of more, those only that a cap leaves, anew for each, and so the next cap
# is but twice as far.
MAX_FREE, MOST_EXCESS_OF_MANY = 1500, 0.2

_NEVER = np.int32(MANY)


@dataclass(frozen=True, slots=True)
class DagPlan:
    """Stages from the first to the last; time_s per sample, of the slowest of them."""

    stages: tuple[DagStage, ...]
    time_s: float


@dataclass(frozen=True, slots=True)
class _Found:
    """A DagPlan whose stages are (candidate, the sum of its data degree and of those behind it)."""

    stages: tuple[tuple[int, int], ...]
    time_s: float


def piper_dag(
    dag: LayerDag,
    machine: LayerMachine,
    data: Sequence[int] | None = None,
    all_devices: bool = False,
    is_over: Callable[[], bool] = lambda: False,
) -> DagPlan | None:
    """The plan of least time per sample that fits in memory; None if there is none.

    data: the data degrees that stages may have, by default anything that divides the samples. all_devices: use every
    device, also where fewer would do. is_over: asked often; once it is true the best so far is the answer, None if there is
    none yet.
    ValueError: a graph with too many tails, or layers with more than two choices (as in Piper's own program).
    """
    if any(min(layer.at) > machine.num_devices for layer in dag.layers):
        return None
    members = tails(dag)

    def pieces_under(cap_s: float) -> Pieces:
        return Pieces(dag, machine, members, data, all_devices, cap_s, is_over)

    def plan_of(pieces: Pieces, found: _Found) -> DagPlan:
        return DagPlan(tuple(pieces.stage(candidate, behind) for candidate, behind in found.stages), found.time_s)

    all_pieces = pieces_under(math.inf) if len(members) <= MAX_FREE else None
    most_excess = MOST_EXCESS if all_pieces else MOST_EXCESS_OF_MANY
    lower_s, excess = least_time_s(dag, machine), FIRST_EXCESS
    least_s, best = lower_s, None
    while best is None or best.time_s > least_s * (1 + TOLERANCE):
        cap_s = math.inf if excess > most_excess else lower_s * (1 + excess)
        if best is not None:
            cap_s = math.sqrt(least_s * best.time_s)
        pieces = all_pieces or pieces_under(cap_s)
        caps = _Caps(pieces, np.arange(pieces.num_candidates), cap_s)
        found = caps.solve(is_over, bound_first=True)
        if found is None and (cap_s == math.inf or is_over()):
            break
        if found is None:
            least_s, excess = cap_s, excess * (3 if all_pieces else 2)
        elif cap_s < math.inf or all_pieces:
            return plan_of(pieces, _refine(pieces, caps.kept, found, least_s, is_over))
        else:
            best = plan_of(pieces, found)
    return best


def _refine(pieces: Pieces, among: np.ndarray, best: _Found, least_s: float, is_over: Callable[[], bool]) -> _Found:
    """The optimum, given a plan and a time that none goes below. among: the stages that a better one may consist of."""
    # A plan is often better than the cap that it was found under, and the optimum at once: so every other time the cap
    # is what would prove that, and else the middle.
    proves = True
    while best.time_s > least_s * (1 + TOLERANCE) and not is_over():
        cap_s = best.time_s * (1 - TOLERANCE) if proves else math.sqrt(least_s * best.time_s)
        caps = _Caps(pieces, among, cap_s)
        found = caps.solve(is_over)
        if found is None:
            least_s, proves = cap_s, False
        else:
            best, proves, among = found, not proves, caps.kept
    return best


def dag_plan_time_s(dag: LayerDag, machine: LayerMachine, stages: Sequence[DagStage]) -> float:
    """Time per sample of the slowest stage, term by term from the definition; infinite if one does not fit.

    ValueError where the stages are no plan: a layer missing or twice, an edge that goes back, too many devices, or a
    data degree that does not divide the samples of a batch.
    """
    place = {v: s for s, stage in enumerate(stages) for v in stage.layers}
    if len(place) != len(dag.layers) or sum(len(stage.layers) for stage in stages) != len(dag.layers):
        raise ValueError("each layer must stand in exactly one stage")
    if any(place[edge.source] > place[edge.target] for edge in dag.edges):
        raise ValueError("an edge leads from a stage to one before it")
    devices = sum(stage.data * stage.tensor for stage in stages)
    if devices > machine.num_devices or any(machine.samples % stage.data for stage in stages):
        raise ValueError(f"{devices} devices of {machine.num_devices}, data degrees {[s.data for s in stages]}")
    slowest_s, behind = 0.0, sum(stage.data for stage in stages)
    if behind > machine.samples:
        raise ValueError(f"data degrees sum to {behind}, the batch has {machine.samples} samples")
    for stage in stages:
        in_flight = math.ceil(behind / stage.data)
        behind -= stage.data
        compute_s = edge_bytes = resync_bytes = memory_bytes = 0.0
        for v, name in zip(stage.layers, stage.choices, strict=True):
            at = dag.layers[v].at[stage.tensor]
            choice = next(one for one in at.choices if one.name == name)
            compute_s += choice.time_s
            memory_bytes += choice.each_bytes * in_flight + choice.rest_bytes
            resync_bytes += 4 * (stage.data - 1) / stage.data * at.parameter_bytes / machine.samples
            for e, edge in enumerate(dag.edges):
                if v in (edge.source, edge.target) and place[edge.source] != place[edge.target]:
                    edge_bytes += 2 * (edge.size_bytes + at.edge_bytes[e])
        if memory_bytes > machine.memory_bytes * (1 + 1e-9):
            return math.inf
        stage_s = compute_s / stage.data
        stage_s += (edge_bytes / stage.data + resync_bytes) / machine.bandwidth_bytes_per_s
        slowest_s = max(slowest_s, stage_s)
    return slowest_s


class _Caps:
    """The recursion for s_T over the candidates that keep a cap. Levels: tails of one size, which do not depend on
    each other."""

    def __init__(self, pieces: Pieces, among: np.ndarray, cap_s: float) -> None:
        self.pieces, self.num_devices, self.cap_s = pieces, pieces.machine.num_devices, cap_s
        self.kept = among

    def solve(self, is_over: Callable[[], bool], bound_first: bool = False) -> _Found | None:
        num_tails = len(self.pieces.members)
        # what is hopeless even at the least price of swaps needs no table of them
        for is_bound in (True, False) if bound_first else (False,):
            self._admit(self.pieces.in_flight(self.kept, self.cap_s, is_bound))
            if not len(self.kept) or not self._bound_front_and_back(num_tails):
                return None
        width = int((self.num_devices - self.front[self.lo < _NEVER] - self.lo[self.lo < _NEVER]).max()) + 1
        # column 0 stands for too few devices, column j + 1 for lo + j of them
        table = np.full((num_tails, width + 1), _NEVER, np.int32)
        table[0, 1 : 2 if self.pieces.all_devices else None] = 0
        columns = np.arange(1, width + 1, dtype=np.int32)
        shift = self.lo[self.outer] - self.devices - self.lo[self.inner]
        for begin, end, starts, owners in self._levels():
            if is_over():
                return None
            sub, data = self.inner[begin:end, None], self.data[begin:end, None]
            index = np.maximum(columns + shift[begin:end, None], 0)
            behind = table[sub, index] + data
            behind[behind > self.most[begin:end, None]] = _NEVER
            table[owners, 1:] = np.minimum.reduceat(behind, starts, axis=0)
        last = self.num_devices - int(self.lo[-1]) + 1
        if table[-1, last] >= _NEVER:
            return None
        return self._trace(table, shift)

    def _admit(self, in_flight: np.ndarray) -> None:
        self.kept, in_flight = self.kept[in_flight > 0], in_flight[in_flight > 0]
        pieces, kept = self.pieces, self.kept
        self.outer, self.inner = pieces.c_outer[kept], pieces.c_inner[kept]
        self.data, self.devices = pieces.c_data[kept], pieces.c_devices[kept]
        # s <= most: the stage fits, and keeps the cap, with so much behind it
        self.most = np.minimum(in_flight.astype(np.int64) * self.data, pieces.most_behind).astype(np.int32)

    def _bound_front_and_back(self, num_tails: int) -> bool:
        """lo[I]: fewest devices for tail I, front[I]: for all before it, both as if every tail had its least s; drops
        candidates that need more than there are. False if that leaves nothing."""
        levels = self._levels()
        # rows: least s, fewest devices
        fewest, steps = np.full((2, num_tails), _NEVER, np.int32), np.stack([self.data, self.devices])
        fewest[:, 0] = 0
        for begin, end, starts, owners in levels:
            sums = fewest[:, self.inner[begin:end]] + steps[:, begin:end]
            np.copyto(sums, _NEVER, where=sums[0] > self.most[begin:end])
            fewest[:, owners] = np.minimum.reduceat(sums, starts, axis=1)
        least, lo = fewest
        if lo[-1] > self.num_devices:
            return False
        runs = (least[self.inner] + self.data <= self.most) & (lo[self.inner] < _NEVER)
        step = np.where(runs, self.devices, _NEVER)
        front = np.full(num_tails, _NEVER, np.int32)
        front[-1] = 0
        for begin, end, _, _ in reversed(levels):
            np.minimum.at(front, self.inner[begin:end], front[self.outer[begin:end]] + step[begin:end])
        front = np.minimum(front, _NEVER)
        self._keep(runs & (lo[self.inner] + self.devices + front[self.outer] <= self.num_devices))
        self.lo, self.front = np.where(front < _NEVER, lo, _NEVER), front
        return bool(len(self.kept))

    def _keep(self, which: np.ndarray) -> None:
        for name in ("kept", "outer", "inner", "data", "devices", "most"):
            setattr(self, name, getattr(self, name)[which])

    def _levels(self) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """(first, last + 1 candidate, where each tail's begin within, the tails) per size of tail."""
        if not len(self.outer):
            return []
        heads = run_starts(self.outer)
        owners = self.outer[heads]
        firsts = run_starts(self.pieces.size_of[owners])
        lasts, stops = np.append(firsts[1:], len(heads)), np.append(heads, len(self.outer))
        begins, ends = heads[firsts].tolist(), stops[lasts].tolist()
        parts = zip(begins, ends, firsts.tolist(), lasts.tolist(), strict=True)
        return [(begin, end, heads[a:b] - begin, owners[a:b]) for begin, end, a, b in parts]

    def _trace(self, table: np.ndarray, shift: np.ndarray) -> _Found:
        stages, slowest_s = [], 0.0
        tail, column = len(table) - 1, self.num_devices - int(self.lo[-1]) + 1
        while tail:
            begin, end = np.searchsorted(self.outer, [tail, tail + 1])
            index = np.maximum(column + shift[begin:end], 0)
            behind = table[self.inner[begin:end], index] + self.data[begin:end]
            legal = (behind <= self.most[begin:end]) & (behind == table[tail, column])
            chosen = begin + int(np.flatnonzero(legal)[0])
            candidate, num_behind = int(self.kept[chosen]), int(table[tail, column])
            stages.append((candidate, num_behind))
            slowest_s = max(slowest_s, self.pieces.time_s(candidate, num_behind))
            tail, column = int(self.inner[chosen]), int(max(column + shift[chosen], 0))
        return _Found(tuple(stages), slowest_s)
