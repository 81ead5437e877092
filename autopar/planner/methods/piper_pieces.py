"""Every stage that Piper may form: pairs of tails of a DAG x tensor degree x data degree, as arrays.

For each piece S = I - I' and tensor degree: its time with the fastest choices, what data parallelism adds, and how many
samples in flight fit with the fastest choices and with the smallest. What the swaps between cost, the inner minimum of
TPS in `piper_dag`, is in `piper_swaps`, and is tabulated here once it is asked for.         `Pieces`, `tails`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.layer_dag import LayerDag, LayerMachine
from .piper_swaps import Swaps, least_from_here

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
        self.swaps: list[Swaps] = []
        tables = [self._at_degree(t) for t in self.degrees]
        self.base_s, self.resync_s, self.fits_fast, self.fits = (
            np.stack([table[i] for table in tables], axis=1) for i in range(4)
        )
        self.start, self.extra_s = np.full(self.fits.shape, -1, np.int64), np.zeros(0)
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
        swaps = Swaps(self.inside, each, rest, saved, machine.memory_bytes, self.most_behind)
        self.swaps.append(swaps)
        runs = self.inside @ (1 - legal) == 0
        return base_s, resync_s, swaps.fits_fast * runs, swaps.fits * runs

    def _edge_bytes(self, t: int, legal: np.ndarray) -> np.ndarray:
        arriving, leaving = np.zeros(len(self.dag.edges)), np.zeros(len(self.dag.edges))
        for e, edge in enumerate(self.dag.edges):
            for sizes, layer in ((arriving, edge.target), (leaving, edge.source)):
                if legal[layer]:
                    sizes[e] = 2 * (edge.size_bytes + self.dag.layers[layer].at[t].edge_bytes[e])
        return self.arrives @ arriving + self.leaves @ leaving

    # -- swapped choices

    def _tabulate_extra(self, piece: np.ndarray, degree: np.ndarray) -> None:
        """Fill in start[p, t] and extra_s[start[p, t] + y - fits_fast[p, t] - 1] of pairs (p, t) that may be asked for:
        what the swaps cost that y samples in flight need."""
        tables, known = [self.extra_s], len(self.extra_s)
        unknown = self.start[piece, degree] < 0
        for i, swaps in enumerate(self.swaps):
            pieces = np.unique(piece[unknown & (degree == i)])
            fast, counts = self.fits_fast[pieces, i], (self.fits - self.fits_fast)[pieces, i]
            stops = np.cumsum(counts)
            self.start[pieces, i] = known + stops - counts
            row = np.repeat(np.arange(len(pieces)), counts)
            y = fast[row] + 1 + np.arange(len(row)) - (stops - counts)[row]
            # what fits with more in flight fits with y
            tables.append(least_from_here(swaps.cost_s(pieces[row], y), stops[row]))
            known += len(row)
        self.extra_s = np.concatenate(tables)

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
        return float(self.c_own_s.max()) + max(float(swaps.slower_s.sum()) for swaps in self.swaps)

    def in_flight(self, candidates: np.ndarray, cap_s: float, swaps_are_free: bool = False) -> np.ndarray:
        """y_T of candidates: the most samples in flight, of those a pipeline may need, with which they keep the cap; 0
        where they never do. swaps_are_free: a bound on it, without tables."""
        piece, degree, data = self.c_piece[candidates], self.c_degree[candidates], self.c_data[candidates]
        budget_s = cap_s * data - self.c_own_s[candidates]
        most = np.where(budget_s < 0, 0, -(-self.most_behind // data))
        fast = self.fits_fast[piece, degree]
        low, high = np.minimum(fast, most), np.minimum(self.fits[piece, degree], most)
        if swaps_are_free:
            return high
        open_rows = np.flatnonzero(low < high)
        self._tabulate_extra(piece[open_rows], degree[open_rows])
        offset = self.start[piece, degree] - fast - 1
        while len(open_rows):
            middle = (low[open_rows] + high[open_rows] + 1) // 2
            ok = self.extra_s[offset[open_rows] + middle] <= budget_s[open_rows]
            low[open_rows] = np.where(ok, middle, low[open_rows])
            high[open_rows] = np.where(ok, high[open_rows], middle - 1)
            open_rows = open_rows[low[open_rows] < high[open_rows]]
        return low

    def has_tables(self, candidates: np.ndarray) -> bool:
        """Whether what the swaps of most of them cost is known."""
        return np.count_nonzero(self.start[self.c_piece[candidates], self.c_degree[candidates]] < 0) * 2 < len(
            candidates
        )

    def time_s(self, candidate: int, behind: int) -> float:
        """Seconds per sample of a candidate with `behind` = its s, which `in_flight` has allowed."""
        piece, i, data = int(self.c_piece[candidate]), int(self.c_degree[candidate]), int(self.c_data[candidate])
        more = math.ceil(behind / data) - int(self.fits_fast[piece, i])
        extra_s = float(self.extra_s[self.start[piece, i] + more - 1]) if more > 0 else 0.0
        return (float(self.c_own_s[candidate]) + extra_s) / data

    def stage(self, candidate: int, behind: int) -> DagStage:
        """The stage of such a candidate."""
        piece, i = int(self.c_piece[candidate]), int(self.c_degree[candidate])
        data, t = int(self.c_data[candidate]), self.degrees[int(self.c_degree[candidate])]
        y, fast = math.ceil(behind / data), int(self.fits_fast[piece, i])
        swapped = np.zeros(len(self.dag.layers), bool)
        if y > fast:
            # the swaps of a larger y may be the cheaper ones
            ways = np.arange(y, self.fits[piece, i] + 1)
            costs_s = self.swaps[i].cost_s(np.full(len(ways), piece), ways)
            swapped = self.swaps[i].swapped(piece, int(ways[costs_s.argmin()]))
        names = []
        for v in np.flatnonzero(self.inside[piece]):
            choices = sorted(self.dag.layers[v].at[t].choices, key=_by_time)
            names.append(choices[-1 if swapped[v] else 0].name)
        return DagStage(tuple(map(int, np.flatnonzero(self.inside[piece]))), data, t, tuple(names))


def _by_time(choice) -> float:
    return choice.time_s


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
