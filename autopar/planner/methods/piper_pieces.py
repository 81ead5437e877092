"""Every stage that Piper may form: pairs of tails of a DAG x tensor degree x data degree, as arrays.

For each piece S = I - I' and tensor degree: its time with the fastest choices, what data parallelism adds, how many
samples in flight fit with the fastest choices and with the smallest, and what the swaps between cost (the inner
minimum of TPS in `piper_dag`).                                                              `Pieces`, `tails`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.layer_dag import LayerDag, LayerMachine

# Piper's own limit on downsets.
MAX_TAILS = 40_000
# Pairs of tails, of which each is a possible stage: what fits in memory with all that is known of each.
MAX_PIECES = 1_500_000


@dataclass(frozen=True, slots=True)
class DagStage:
    """layers: indices, in the DAG's order; choices: the name of each one's configuration."""

    layers: tuple[int, ...]
    data: int
    tensor: int
    choices: tuple[str, ...]


def tails(dag: LayerDag) -> np.ndarray:
    """[tails, layers] membership, smallest tails first: the empty one is row 0, the whole model the last row."""
    num = len(dag.layers)
    after, before = [0] * num, [[] for _ in range(num)]
    for edge in dag.edges:
        after[edge.source] |= 1 << edge.target
        before[edge.target].append(edge.source)
    sinks = frozenset(v for v in range(num) if not after[v])
    level: dict[int, frozenset[int]] = {0: sinks}
    found: list[int] = []
    while level:
        found += level
        if len(found) > MAX_TAILS:
            raise ValueError(
                f"the model has more than {MAX_TAILS} sets of layers that a pipeline could end with; join layers that "
                f"run side by side"
            )
        larger: dict[int, frozenset[int]] = {}
        for tail, ready in level.items():
            for v in ready:
                grown = tail | 1 << v
                if grown not in larger:
                    opened = (u for u in before[v] if not after[u] & ~grown)
                    larger[grown] = (ready - {v}).union(opened)
        level = larger
    width = (num + 7) // 8
    packed = np.frombuffer(b"".join(tail.to_bytes(width, "little") for tail in found), np.uint8)
    return np.unpackbits(packed.reshape(len(found), width), axis=1, count=num, bitorder="little")


class Pieces:
    """All stages that a plan may have, as arrays: pieces (pairs of tails) x tensor degree x data degree."""

    def __init__(
        self,
        dag: LayerDag,
        machine: LayerMachine,
        members: np.ndarray,
        data: Sequence[int] | None,
        all_devices: bool,
    ) -> None:
        self.dag, self.machine, self.members, self.all_devices = dag, machine, members, all_devices
        self.most_behind = min(machine.samples, machine.num_devices)
        self.degrees = sorted({t for layer in dag.layers for t in layer.at if t <= machine.num_devices})
        outer, inner = _pairs(members)
        self.outer, self.inner = outer, inner
        self.inside = (members[outer] - members[inner]).astype(np.float64)
        source, target = (self.inside[:, [getattr(e, end) for e in dag.edges]] for end in ("source", "target"))
        self.arrives, self.leaves = target * (1 - source), source * (1 - target)
        tables = [self._at_degree(t) for t in self.degrees]
        self.base_s, self.resync_s, self.fits_fast, self.fits = (
            np.stack([table[i] for table in tables], axis=1) for i in range(4)
        )
        self._tabulate_extra()
        self._list_candidates(data)

    # -- one degree: time and memory of every piece

    def _at_degree(self, t: int) -> tuple[np.ndarray, ...]:
        """(seconds with the fastest choices and d = 1, seconds of resync / ((d-1)/d), most samples in flight with the
        fastest choices, with the smallest); most samples 0 where the piece cannot run."""
        dag, machine = self.dag, self.machine
        fast = np.zeros((3, len(dag.layers)))
        saved = np.zeros((3, len(dag.layers)))
        weight, legal = np.zeros(len(dag.layers)), np.ones(len(dag.layers))
        for v, layer in enumerate(dag.layers):
            at = layer.at.get(t)
            if at is None:
                legal[v] = 0
                continue
            if len(at.choices) > 2:
                raise ValueError(f"layer {layer.name} has {len(at.choices)} choices at degree {t}; two are supported")
            weight[v] = at.parameter_bytes
            rows = [np.array([c.time_s, c.each_bytes, c.rest_bytes]) for c in sorted(at.choices, key=_by_time)]
            fast[:, v] = rows[0]
            saved[:, v] = rows[0] - rows[-1]
        comm = self._edge_bytes(t, legal)
        base_s = self.inside @ fast[0] + comm / machine.bandwidth_bytes_per_s
        resync_s = 4 * (self.inside @ weight) / machine.samples / machine.bandwidth_bytes_per_s
        each, rest = self.inside @ fast[1], self.inside @ fast[2]
        most = np.full(len(base_s), self.most_behind, np.int64)
        fits_fast = np.clip(_floor((machine.memory_bytes - rest) / np.maximum(each, 1e-30)), 0, most)
        fits_fast = np.where(rest > machine.memory_bytes, 0, fits_fast).astype(np.int32)
        # a choice that frees no memory at any y is never swapped in
        fits = fits_fast.copy()
        open_rows = np.flatnonzero(fits_fast < most)
        low, high = fits_fast[open_rows].astype(np.int64), most[open_rows]
        while (low < high).any():
            middle = (low + high + 1) // 2
            freed = np.maximum(saved[1][None] * middle[:, None] + saved[2][None], 0.0)
            need = each[open_rows] * middle + rest[open_rows] - machine.memory_bytes
            ok = (self.inside[open_rows] * freed).sum(1) >= need * (1 - 1e-12)
            low, high = np.where(ok, middle, low), np.where(ok, high, middle - 1)
        fits[open_rows] = low
        illegal = self.inside @ (1 - legal) > 0
        fits_fast[illegal] = 0
        fits[illegal] = 0
        self._kept = {**getattr(self, "_kept", {}), t: (each, rest, saved)}
        return base_s, resync_s, fits_fast, fits

    def _edge_bytes(self, t: int, legal: np.ndarray) -> np.ndarray:
        arriving, leaving = np.zeros(len(self.dag.edges)), np.zeros(len(self.dag.edges))
        for e, edge in enumerate(self.dag.edges):
            for sizes, layer in ((arriving, edge.target), (leaving, edge.source)):
                if legal[layer]:
                    sizes[e] = 2 * (edge.size_bytes + self.dag.layers[layer].at[t].edge_bytes[e])
        return self.arrives @ arriving + self.leaves @ leaving

    # -- swapped choices

    def _tabulate_extra(self) -> None:
        """extra_s[start[p, t] + y - fits_fast[p, t] - 1]: what the swaps cost that y samples in flight need."""
        counts = self.fits - self.fits_fast
        self.start = np.concatenate([[0], np.cumsum(counts.ravel())])[:-1].reshape(counts.shape)
        self.extra_s = np.zeros(int(counts.sum()))
        for i, t in enumerate(self.degrees):
            later = np.full(len(self.inside), np.inf)
            if not counts[:, i].any():
                continue
            for y in range(int(self.fits[:, i].max()), 0, -1):
                rows = np.flatnonzero((self.fits_fast[:, i] < y) & (y <= self.fits[:, i]))
                if len(rows):
                    # what fits with more in flight fits with y
                    later[rows] = np.minimum(later[rows], self._swap(t, y, rows)[0])
                    self.extra_s[self.start[rows, i] + y - self.fits_fast[rows, i] - 1] = later[rows]

    def _swap(self, t: int, y: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(extra seconds [rows], swapped layers [rows, layers]) that y samples in flight need, least time per byte
        first."""
        each, rest, saved = self._kept[t]
        slower_s, freed = -saved[0], saved[1] * y + saved[2]
        order = np.argsort(np.where(freed > 0, slower_s / np.maximum(freed, 1e-300), np.inf), kind="stable")
        order = order[freed[order] > 0]
        inside = self.inside[rows][:, order]
        need = each[rows] * y + rest[rows] - self.machine.memory_bytes
        need *= 1 - 1e-12
        sums = np.cumsum(inside * freed[order], axis=1)
        position = np.minimum((sums < need[:, None]).sum(1), len(order) - 1)
        left = need - sums[np.arange(len(rows)), position] + (inside * freed[order])[np.arange(len(rows)), position]
        places = np.arange(len(order))
        enough = (inside > 0) & (places >= position[:, None]) & (freed[order] >= left[:, None])
        last = np.where(enough, slower_s[order], np.inf).argmin(1)
        taken = (inside > 0) & (places < position[:, None])
        taken[np.arange(len(rows)), last] = True
        swapped = np.zeros((len(rows), len(freed)), bool)
        swapped[:, order] = taken
        return (taken * slower_s[order]).sum(1), swapped

    # -- candidates

    def _list_candidates(self, data: Sequence[int] | None) -> None:
        devices = self.machine.num_devices
        divisors = [d for d in data or range(1, devices + 1) if self.machine.samples % d == 0]
        pairs = [(i, d) for i, t in enumerate(self.degrees) for d in divisors if t * d <= devices]
        degree, replicas = np.array(pairs, np.int32).reshape(-1, 2).T
        grid = self.fits[:, degree] >= 1
        piece, which = np.nonzero(grid)
        self.num_candidates = len(piece)
        self.c_piece, self.c_degree, self.c_data = piece.astype(np.int32), degree[which], replicas[which]
        self.c_devices = np.array(self.degrees, np.int32)[self.c_degree] * self.c_data
        self.c_outer, self.c_inner = self.outer[piece].astype(np.int32), self.inner[piece].astype(np.int32)
        share = (self.c_data - 1) / self.c_data
        # TPS = (own_s + extra_s) / d
        self.c_own_s = self.base_s[piece, self.c_degree] + self.resync_s[piece, self.c_degree] * share * self.c_data
        sizes = self.members.sum(1, dtype=np.int64)
        self.size_of = sizes

    def least_time_s(self) -> float:
        """No plan is faster: all work at its most efficient degree, shared out evenly; and the largest layer."""
        work = sum(
            min(t * min(c.time_s for c in at.choices) for t, at in layer.at.items() if t <= self.machine.num_devices)
            for layer in self.dag.layers
        )
        return max(work / self.machine.num_devices, 1e-12)

    def most_time_s(self) -> float:
        """No plan with these candidates is slower."""
        slowest = float(self.extra_s.max()) if len(self.extra_s) else 0.0
        return float(self.c_own_s.max()) + slowest

    def in_flight(self, kept: np.ndarray, cap_s: float) -> np.ndarray:
        """y_T of candidates: the most samples in flight with which they keep the cap."""
        piece, degree = self.c_piece[kept], self.c_degree[kept]
        budget_s = cap_s * self.c_data[kept] - self.c_own_s[kept]
        fast = self.fits_fast[piece, degree].astype(np.int64)
        low, high = fast.copy(), self.fits[piece, degree].astype(np.int64)
        offset = self.start[piece, degree] - fast - 1
        open_rows = np.flatnonzero(low < high)
        while len(open_rows):
            middle = (low[open_rows] + high[open_rows] + 1) // 2
            ok = self.extra_s[offset[open_rows] + middle] <= budget_s[open_rows]
            low[open_rows] = np.where(ok, middle, low[open_rows])
            high[open_rows] = np.where(ok, high[open_rows], middle - 1)
            open_rows = open_rows[low[open_rows] < high[open_rows]]
        return low

    def stage(self, candidate: int, behind: int) -> tuple[DagStage, float]:
        """The stage of a candidate with `behind` = its s, and its time per sample."""
        piece, i = int(self.c_piece[candidate]), int(self.c_degree[candidate])
        data, t = int(self.c_data[candidate]), self.degrees[int(self.c_degree[candidate])]
        y, fast = math.ceil(behind / data), int(self.fits_fast[piece, i])
        layers = np.flatnonzero(self.inside[piece])
        extra_s, swapped = 0.0, np.zeros(len(self.dag.layers), bool)
        if y > fast:
            # the swaps of a larger y may be the cheaper ones
            ways = []
            for more in range(y, int(self.fits[piece, i]) + 1):
                found_s, found = self._swap(t, more, np.array([piece]))
                ways.append((float(found_s[0]), more, found[0]))
                if found_s[0] <= self.extra_s[self.start[piece, i] + y - fast - 1] * (1 + 1e-12):
                    break
            extra_s, _, swapped = min(ways, key=lambda way: way[:2])
        names = []
        for v in layers:
            choices = sorted(self.dag.layers[v].at[t].choices, key=_by_time)
            names.append(choices[-1 if swapped[v] else 0].name)
        stage = DagStage(tuple(map(int, layers)), data, t, tuple(names))
        return stage, (float(self.c_own_s[candidate]) + extra_s) / data


def _by_time(choice) -> float:
    return choice.time_s


def _floor(values: np.ndarray) -> np.ndarray:
    return np.floor(np.minimum(values * (1 + 1e-12), 2.0**31))


def _pairs(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(outer, inner) of all pairs of tails with inner within outer, by outer."""
    plain = members.astype(np.float32)
    outers, inners, total = [], [], 0
    for begin in range(0, len(members), 512):
        missing = 1 - plain[begin : begin + 512]
        within = missing @ plain[: begin + 512].T == 0
        outer, inner = np.nonzero(within)
        outer += begin
        keep = outer != inner
        outers.append(outer[keep])
        inners.append(inner[keep])
        total += int(keep.sum())
        if total > MAX_PIECES:
            raise ValueError(
                f"the model has more than {MAX_PIECES} contiguous sets of layers, each a possible stage; join layers "
                f"that run side by side, or that always run together"
            )
    return np.concatenate(outers), np.concatenate(inners)
