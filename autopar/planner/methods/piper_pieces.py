"""Every stage that Piper may form: pairs of tails of a DAG x tensor degree x data degree, as arrays.

For each piece S = I - I' and tensor degree: its time with the fastest choices, what data parallelism adds, and how many
samples in flight fit with the fastest choices and with the smallest. What the swaps between cost, the inner minimum of
TPS in `piper_dag`, is in `piper_swaps`, and is tabulated here once it is asked for.         `Pieces`, `tails`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.layer_dag import LayerDag, LayerMachine
from .piper_swaps import Swaps, least_from_here, run_starts

# Piper's own limit on downsets.
MAX_TAILS = 40_000
# Pairs of tails at one degree, of which each is a possible stage, and those with one data degree: what fits in memory with
# all that is known of each.
MAX_PIECES, MAX_CANDIDATES = 16_000_000, 48_000_000
# Tails that are held against all others at once.
_BLOCK = 512
# More than any count of stages, in which int32 still has room for sums of it.
MANY = 2**29


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


def least_time_s(dag: LayerDag, machine: LayerMachine) -> float:
    """No plan is faster: all work at its most efficient degree, shared out evenly."""
    degrees = ({t: at for t, at in layer.at.items() if t <= machine.num_devices} for layer in dag.layers)
    work_s = sum(min(t * min(c.time_s for c in at.choices) for t, at in of.items()) for of in degrees)
    return max(work_s / machine.num_devices, 1e-12)


class Pieces:
    """All stages that a plan may have, as arrays: pieces (pairs of tails) x tensor degree x data degree.

    cap_s: leave out what no plan has whose stages all take at most so long, by the work there is. ValueError: more than
    MAX_PIECES, or MAX_CANDIDATES of them with their degrees.
    """

    def __init__(
        self,
        dag: LayerDag,
        machine: LayerMachine,
        members: np.ndarray,
        data: Sequence[int] | None,
        all_devices: bool,
        cap_s: float = math.inf,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.dag, self.machine, self.members, self.all_devices = dag, machine, members, all_devices
        self.most_behind = min(machine.samples, machine.num_devices)
        self.degrees = sorted({t for layer in dag.layers for t in layer.at if t <= machine.num_devices})
        self.size_of = members.sum(1, dtype=np.int64)
        self._bound_work(cap_s)
        self.outer, self.inner = self._pairs(is_over)
        self.swaps: list[Swaps] = []
        tables = [self._at_degree(t) for t in self.degrees]
        self.base_s, self.resync_s, self.fits_fast, self.fits = (
            np.stack([table[i] for table in tables], axis=1) for i in range(4)
        )
        self.start, self.top = np.zeros(self.fits.shape, np.int64), np.zeros_like(self.fits)
        self.extra_s = np.zeros(0)
        self._list_candidates(data, cap_s)

    # -- pairs of tails

    def _bound_work(self, cap_s: float) -> None:
        """num_inner, num_outer: fewest devices for a tail, and for all before it, if they compute `shares` * cap_s seconds;
        held: bytes at least, num_stages: stages for a tail at least."""
        num_devices = self.machine.num_devices
        choices = [
            [(t, c) for t, at in layer.at.items() if t <= num_devices for c in at.choices] for layer in self.dag.layers
        ]
        work_s = np.array([min(t * c.time_s for t, c in of) for of in choices])
        bytes_ = np.array([min(c.each_bytes + c.rest_bytes for _, c in of) for of in choices])
        self.shares, self.held = self.members @ (work_s / cap_s), self.members @ bytes_
        sizes = self.size_of
        full = self.held / self.machine.memory_bytes
        self.num_stages = np.maximum(_up(full), sizes > 0)
        self.num_inner = np.maximum(_up(self.shares), self.num_stages)
        self.num_outer = np.maximum(
            _up(self.shares[-1] - self.shares), np.maximum(_up(full[-1] - full), sizes < sizes[-1])
        )

    def _pairs(self, is_over: Callable[[], bool]) -> tuple[np.ndarray, np.ndarray]:
        """(outer, inner) of all pairs of tails with inner within outer that the bounds leave, by outer; those found when it
        is over."""
        plain = self.members.astype(np.float32)
        outers, inners, total = [], [], 0
        for begin in range(0, len(plain), _BLOCK):
            if is_over():
                break
            block, upto = slice(begin, begin + _BLOCK), slice(0, begin + _BLOCK)
            spare = self.machine.num_devices - self.num_outer[block, None] - self.num_inner[None, upto]
            may = spare >= np.maximum(_up(self.shares[block, None] - self.shares[None, upto]), 1)
            may &= self.held[block, None] - self.held[None, upto] <= self.machine.memory_bytes * (1 + 1e-9)
            may &= self.size_of[block, None] > self.size_of[None, upto]
            if not may.any():
                continue
            outer, inner = np.nonzero(may)
            if len(outer) * 8 < may.size:
                within = ~(plain[inner] > plain[block][outer]).any(1)
            else:
                within = ((1 - plain[block]) @ plain[upto].T == 0)[outer, inner]
            outer, inner = outer[within], inner[within]
            outers.append((outer + begin).astype(np.int32))
            inners.append(inner.astype(np.int32))
            total += len(outer)
            if total * len(self.degrees) > MAX_PIECES:
                raise ValueError(
                    f"the model has more than {MAX_PIECES} contiguous sets of layers, each a possible stage; join "
                    f"layers that run side by side, or that always run together"
                )
        if not outers:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        return np.concatenate(outers), np.concatenate(inners)

    def inside(self, piece: int) -> np.ndarray:
        """The layers of a piece."""
        return np.flatnonzero(self.members[self.outer[piece]] > self.members[self.inner[piece]])

    def _sums(self, per_layer: np.ndarray) -> np.ndarray:
        """Per piece, the sum over its layers."""
        tails_sum = self.members @ per_layer
        return tails_sum[self.outer] - tails_sum[self.inner]

    # -- one degree: time and memory of every piece

    def _at_degree(self, t: int) -> tuple[np.ndarray, ...]:
        """(seconds with the fastest choices and d = 1, seconds of resync / ((d-1)/d), most samples in flight with the
        fastest choices, with the smallest); most samples 0 where the piece cannot run."""
        dag, machine = self.dag, self.machine
        fast = np.zeros((3, len(dag.layers)))
        small = np.zeros((3, len(dag.layers)))
        weight, legal = np.zeros(len(dag.layers)), np.ones(len(dag.layers))
        for v, layer in enumerate(dag.layers):
            at = layer.at.get(t)
            if at is None:
                legal[v] = 0
                continue
            if len(at.choices) > 2:
                raise ValueError(f"layer {layer.name} has {len(at.choices)} choices at degree {t}; two are supported")
            weight[v] = at.parameter_bytes
            ways = [(c.time_s, c.each_bytes, c.rest_bytes) for c in sorted(at.choices, key=_by_time)]
            fast[:, v], small[:, v] = ways[0], ways[-1]
        saved = fast - small
        base_s = self._sums(fast[0]) + self._edge_bytes(t, legal) / machine.bandwidth_bytes_per_s
        resync_s = 4 * self._sums(weight) / machine.samples / machine.bandwidth_bytes_per_s
        swaps = Swaps(
            self.members, self.outer, self.inner, self._sums(fast[1]), self._sums(fast[2]), saved, machine.memory_bytes,
            self.most_behind,
        )  # fmt: skip
        self.swaps.append(swaps)
        runs = self._sums(1 - legal) == 0
        return base_s, resync_s, swaps.fits_fast * runs, swaps.fits * runs

    def _edge_bytes(self, t: int, legal: np.ndarray) -> np.ndarray:
        """Per piece, the bytes a sample that edges bring to it and from it.

        All that a tail reaches is in it; so an edge arrives if it begins outside of the outer tail and ends in the
        piece, and leaves if it begins in the piece and ends in the inner tail.
        """
        edges, layers = self.dag.edges, self.dag.layers
        if not edges:
            return np.zeros(len(self.outer))
        arriving, leaving = np.zeros(len(edges)), np.zeros(len(edges))
        for e, edge in enumerate(edges):
            for sizes, layer in ((arriving, edge.target), (leaving, edge.source)):
                if legal[layer]:
                    sizes[e] = 2 * (edge.size_bytes + layers[layer].at[t].edge_bytes[e])
        source, target = (
            self.members[:, [getattr(e, end) for e in edges]].astype(float) for end in ("source", "target")
        )
        into = ((1 - source) * target) @ arriving
        within = target @ leaving - (source * target) @ leaving
        # those that begin outside of the outer tail and end in the inner one neither arrive nor leave
        over, under = (1 - source) * (arriving + leaving), target
        passing = np.zeros(len(self.outer))
        for begin in range(0, len(self.members), _BLOCK):
            first, last = np.searchsorted(self.outer, [begin, begin + _BLOCK])
            outer, inner = self.outer[first:last], self.inner[first:last]
            if (last - first) * 4 > _BLOCK * (begin + _BLOCK):
                passing[first:last] = (over[begin : begin + _BLOCK] @ under[: begin + _BLOCK].T)[outer - begin, inner]
            else:
                for part in range(first, last, _BLOCK * 16):
                    of = slice(part, min(last, part + _BLOCK * 16))
                    passing[of] = np.einsum("pe,pe->p", over[self.outer[of]], under[self.inner[of]])
        return into[self.outer] + within[self.inner] - passing

    # -- swapped choices

    def _tabulate_extra(self, piece: np.ndarray, degree: np.ndarray, upto: np.ndarray) -> None:
        """Fill in extra_s[start[p, t] + y - fits_fast[p, t] - 1] for y <= top[p, t], where y <= upto may be asked for of
        pairs (p, t), by p: what the swaps cost that y samples in flight need, if no y beyond would do for less."""
        tables, known = [self.extra_s], len(self.extra_s)
        for i, swaps in enumerate(self.swaps):
            wanted = np.flatnonzero((degree == i) & (upto > self.top[piece, i]))
            if not len(wanted):
                continue
            heads = run_starts(piece[wanted])
            pieces, top = piece[wanted][heads], np.maximum.reduceat(upto[wanted], heads)
            fast = self.fits_fast[pieces, i]
            counts = top - fast
            stops = np.cumsum(counts)
            self.start[pieces, i], self.top[pieces, i] = known + stops - counts, top
            row = np.repeat(np.arange(len(pieces)), counts)
            y = fast[row] + 1 + np.arange(len(row)) - (stops - counts)[row]
            # what fits with more in flight fits with y
            tables.append(least_from_here(swaps.cost_s(pieces[row], y), stops[row]))
            known += len(row)
        if len(tables) > 1:
            self.extra_s = np.concatenate(tables)

    def _extra(self, piece: int, i: int, y: int) -> tuple[float, int]:
        """(seconds, the number in flight whose swaps they are) of one piece at the i-th degree, y > fits_fast."""
        ways = np.arange(y, self.fits[piece, i] + 1)
        costs_s = self.swaps[i].cost_s(np.full(len(ways), piece), ways)
        cheapest = int(costs_s.argmin())
        return float(costs_s[cheapest]), int(ways[cheapest])

    # -- candidates

    def _list_candidates(self, data: Sequence[int] | None, cap_s: float) -> None:
        devices, degrees = self.machine.num_devices, np.array(self.degrees, np.int32)
        divisors = [d for d in data or range(1, devices + 1) if self.machine.samples % d == 0]
        pairs = [(i, d) for i, t in enumerate(self.degrees) for d in divisors if t * d <= devices]
        degree, replicas = np.array(pairs, np.int32).reshape(-1, 2).T
        share = (replicas - 1) / replicas
        listed, total = [], 0
        size = max(1, _BLOCK**2 // max(1, len(pairs)))
        for begin in range(0, len(self.outer), size):
            of = slice(begin, begin + size)
            # TPS = (own_s + extra_s) / d
            own_s = self.base_s[of, degree] + self.resync_s[of, degree] * (share * replicas)
            spare = devices - self.num_outer[self.outer[of]] - self.num_inner[self.inner[of]]
            may = (
                (self.fits[of, degree] >= 1)
                & (own_s <= cap_s * replicas)
                & (degrees[degree] * replicas <= spare[:, None])
            )
            piece, which = np.nonzero(may)
            total += len(piece)
            if total > MAX_CANDIDATES:
                raise ValueError(f"more than {MAX_CANDIDATES} stages are possible; join layers that run side by side")
            listed.append(((piece + begin).astype(np.int32), degree[which], replicas[which], own_s[piece, which]))
        columns = zip(*listed, strict=True) if listed else [[np.zeros(0, np.int32)]] * 3 + [[np.zeros(0)]]
        self.c_piece, self.c_degree, self.c_data, self.c_own_s = (np.concatenate(column) for column in columns)
        self.num_candidates = len(self.c_piece)
        self.c_devices = degrees[self.c_degree] * self.c_data
        self.c_outer, self.c_inner = self.outer[self.c_piece], self.inner[self.c_piece]

    def in_flight(self, candidates: np.ndarray, cap_s: float, is_bound: bool = False) -> np.ndarray:
        """y_T of candidates: the most samples in flight, of those a pipeline may need, with which they keep the cap; 0
        where they never do. is_bound: no less than that, found without tables."""
        piece, degree, data = self.c_piece[candidates], self.c_degree[candidates], self.c_data[candidates]
        budget_s = cap_s * data - self.c_own_s[candidates]
        most = np.where(budget_s < 0, 0, -(-self.most_behind // data))
        fast = self.fits_fast[piece, degree]
        low, high = np.minimum(fast, most), np.minimum(self.fits[piece, degree], most)
        open_rows = np.flatnonzero(low < high)
        if cap_s < math.inf:
            for i, swaps in enumerate(self.swaps):
                of = open_rows[degree[open_rows] == i]
                high[of] = np.clip(swaps.affordable(piece[of], budget_s[of]), low[of], high[of])
        if is_bound or cap_s == math.inf:
            return high
        open_rows = open_rows[low[open_rows] < high[open_rows]]
        self._tabulate_extra(piece[open_rows], degree[open_rows], high[open_rows])
        offset = self.start[piece, degree] - fast - 1
        while len(open_rows):
            middle = (low[open_rows] + high[open_rows] + 1) // 2
            ok = self.extra_s[offset[open_rows] + middle] <= budget_s[open_rows]
            low[open_rows] = np.where(ok, middle, low[open_rows])
            high[open_rows] = np.where(ok, high[open_rows], middle - 1)
            open_rows = open_rows[low[open_rows] < high[open_rows]]
        return low

    def time_s(self, candidate: int, behind: int) -> float:
        """Seconds per sample of a candidate with `behind` = its s, which `in_flight` has allowed."""
        piece, i, data = int(self.c_piece[candidate]), int(self.c_degree[candidate]), int(self.c_data[candidate])
        y, fast = math.ceil(behind / data), int(self.fits_fast[piece, i])
        extra_s = 0.0
        if y > fast:
            known = y <= self.top[piece, i]
            extra_s = float(self.extra_s[self.start[piece, i] + y - fast - 1]) if known else self._extra(piece, i, y)[0]
        return (float(self.c_own_s[candidate]) + extra_s) / data

    def stage(self, candidate: int, behind: int) -> DagStage:
        """The stage of such a candidate."""
        piece, i = int(self.c_piece[candidate]), int(self.c_degree[candidate])
        data, t = int(self.c_data[candidate]), self.degrees[int(self.c_degree[candidate])]
        y, fast = math.ceil(behind / data), int(self.fits_fast[piece, i])
        swapped = np.zeros(len(self.dag.layers), bool)
        if y > fast:
            swapped = self.swaps[i].swapped(piece, self._extra(piece, i, y)[1])
        names, layers = [], self.inside(piece).tolist()
        for v in layers:
            choices = sorted(self.dag.layers[v].at[t].choices, key=_by_time)
            names.append(choices[-1 if swapped[v] else 0].name)
        return DagStage(tuple(layers), data, t, tuple(names))


def _by_time(choice) -> float:
    return choice.time_s


def _up(shares: np.ndarray) -> np.ndarray:
    return np.ceil(np.minimum(shares, MANY) * (1 - 1e-9)).astype(np.int32)
