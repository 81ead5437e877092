"""What a group of devices makes of every run of blocks: each mesh, ZeRO level and recompute choice that it may use.

Ranks of a group differ in their devices and rows, so each class of them (cost/mixed.py) has its own figures; seconds are
the slowest class's, memory is held against each class's own. Models of few blocks are asked for every run of blocks. For
others a run is taken to be the sum of its blocks but for what a stage has once, told apart by one block and two of the
commonest kind: a bound and an order for the search, which prices what it returns exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..cost.mixed import rank_classes
from ..cost.types import StageCost
from ..plan import Plan, Recompute, Stage, same_recompute
from ..schedule.orders import schedule_named
from .constraints import SEARCHED_ZEROS
from .methods.bench import split_rows
from .problem import Chain, Problem, Shape
from .replicas import replica_speeds
from .runs import FIELDS, Runs, figures

# Up to so many blocks every run is priced exactly.
EXACT_BLOCKS = 8
# Up to so many devices in a cluster a replica may span hosts, and stages of uneven shares may shard parameters.
MAX_SPREAD = 16
_PEAKS = [FIELDS.index(name) for name in ("transient_bytes", "forward_peak_bytes", "backward_peak_bytes", "buffers")]


@dataclass(frozen=True)
class Mesh:
    """A group of devices as a stage uses it: all of a `Stage` but its blocks."""

    ranks: tuple[int, ...]
    data: int
    tensor: int
    zero: int
    recompute: Recompute
    shares: tuple[int, ...]
    chain: Chain

    def stage(self, start: int, stop: int, layouts: dict | None = None) -> Stage:
        """layouts: those of the plan so far, numbered; by default the chain's own."""
        rows = self.chain.rows(start, stop)
        if layouts is not None:
            rows = tuple(tuple(layouts.setdefault(self.chain.unique[i], len(layouts)) for i in row) for row in rows)
        return Stage(
            start, stop, self.ranks, self.data, self.chain.axes, rows,
            same_recompute(self.recompute, stop - start), self.zero, 0, self.shares,
        )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A mesh with its figures for runs of blocks [start, stop): seconds as arrays, and per class of ranks (runs, limit)."""

    mesh: Mesh
    forward_s: np.ndarray
    backward_s: np.ndarray
    tail_s: np.ndarray
    boundary_bytes: np.ndarray
    classes: tuple[tuple[Runs, int], ...]
    _fits: dict = field(default_factory=dict)

    def most_held(self, slack: float) -> np.ndarray:
        """How many microbatches in flight each run has memory for; less than 1 where none. Gradients lie beside them."""
        if "held" not in self._fits:
            found = np.full(self.forward_s.shape, np.inf)
            for runs, limit_bytes in self.classes:
                fixed = runs.rest_bytes + runs.transient_bytes
                fixed = fixed + np.maximum(runs.forward_peak_bytes, runs.backward_peak_bytes)
                free = limit_bytes * (1 + slack) - fixed
                found = np.minimum(found, free / np.maximum(runs.activation_bytes, 1.0))
            self._fits["held"] = np.where(self.classes[0][0].exists > 0, found, 0.0)
        return self._fits["held"]

    def fits(self, schedule: str, behind: int, microbatches: int, slack: float) -> np.ndarray:
        """Whether each run fits in memory with `behind` stages behind it."""
        key = (schedule, min(behind, microbatches), behind < microbatches)
        if key not in self._fits:
            found = self.classes[0][0].exists > 0
            for runs, limit_bytes in self.classes:
                peaks = runs.peak_bytes(schedule, 0, behind + 1, microbatches)
                found = found & (peaks <= limit_bytes * (1 + slack))
            self._fits[key] = found
        return self._fits[key]


class WayFinder:
    """The ways of every kind of group, per number of microbatches."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.num_blocks = len(problem.graph.blocks)
        self._may_shard = schedule_named(problem.constraints.schedule or "1f1b").may_shard
        self._ways: dict[tuple, tuple[Way, ...]] = {}
        self._chains: dict[tuple[int, int], Chain] = {}

    @property
    def is_exact(self) -> bool:
        return self.num_blocks <= EXACT_BLOCKS

    def ways(self, kind: tuple, ranks: tuple[int, ...], microbatches: int) -> tuple[Way, ...]:
        """Of groups of this kind, of which `ranks` is one."""
        key = (kind, microbatches)
        if key not in self._ways:
            self._ways[key] = tuple(self._find(ranks, microbatches))
        return self._ways[key]

    def least_pass_s(self, microbatches: int) -> float:
        """No pipeline moves on by a microbatch in less: all devices at their best, in replicas that take it whole."""
        speed = 0.0
        for hosts in self._hosts_of_kinds():
            ranks, count = hosts[0], sum(map(len, hosts))
            # Devices that must share a replica with those of other hosts are at their best alone.
            inside = [t for t in self.problem.widths(len(ranks)) if len(ranks) % t == 0] or [1]
            best = 0.0
            for tensor in inside:
                if tensor == 1 or self._has_layouts(tensor, microbatches):
                    chain = self._chain(tensor, microbatches)
                    (each,) = replica_speeds(self.problem, ranks[:tensor], chain, tensor, microbatches)
                    best = max(best, each / tensor)
            speed += count * best
        return 1.0 / speed if speed else math.inf

    def _hosts_of_kinds(self) -> list[list[tuple[int, ...]]]:
        cluster = self.problem.cluster
        hosts: list[dict[int, list[int]]] = [{} for _ in cluster.kinds]
        for rank in range(cluster.world_size):
            hosts[cluster.kind_number(rank)].setdefault(cluster.host(rank), []).append(rank)
        return [[tuple(host) for host in mine.values()] for mine in hosts]

    def _find(self, ranks: tuple[int, ...], microbatches: int) -> Iterator[Way]:
        problem = self.problem
        for data, tensor, shares in self.meshes(ranks, microbatches):
            units = self._units(data, shares, microbatches)
            for zero in self.zeros(data):
                if zero and problem.constraints.zero is None and shares and problem.cluster.world_size > MAX_SPREAD:
                    continue
                for recompute in problem.recompute_choices:
                    mesh = Mesh(ranks, data, tensor, zero, recompute, shares, self._chain(tensor, units))
                    yield self._price(mesh, microbatches)

    def meshes(self, ranks: tuple[int, ...], microbatches: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(data, tensor, shares) of every mesh that a group may have."""
        for data, tensor in self._degrees(ranks):
            shares = self._shares(ranks, data, tensor, microbatches)
            if shares is not None and self._has_layouts(tensor, self._units(data, shares, microbatches)):
                yield data, tensor, shares

    def _has_layouts(self, tensor: int, units: int) -> bool:
        """Whether so many model ranks can do anything, where the batch is cut into so many parts, and keep `layout=`."""
        return self.problem.allows_tensor(tensor, units) and (tensor == 1 or self.problem.has_axes(tensor, units))

    def zeros(self, data: int) -> list[int]:
        """ZeRO levels to look at on so many data ranks."""
        pinned = self.problem.constraints.zero
        levels = SEARCHED_ZEROS if data > 1 and self._may_shard else (0,)
        if pinned is None:
            return list(levels)
        return [pinned] if pinned == 0 or len(levels) > 1 else []

    def _degrees(self, ranks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        cluster, pinned = self.problem.cluster, self.problem.constraints
        widths = Counter(map(cluster.host, ranks)).values()
        for tensor in self.problem.widths(len(ranks)):
            data = len(ranks) // tensor
            if data * tensor != len(ranks) or pinned.data not in (None, data):
                continue
            inside = all(width % tensor == 0 for width in widths)
            # Axes that no host has room for take whole hosts.
            must_spread = pinned.roles and all(tensor > width and tensor % width == 0 for width in widths)
            if not inside and not must_spread and cluster.world_size > MAX_SPREAD:
                continue
            if data == 1 or not self.problem.batch_conflict:
                yield data, tensor

    def _shares(self, ranks: tuple[int, ...], data: int, tensor: int, microbatches: int) -> tuple[int, ...] | None:
        """Rows of a microbatch in proportion to the replicas' speeds; () where they are equal, None for too few."""
        rows = self.problem.graph.batch_size // microbatches
        if rows < data:
            return None
        speeds = [1.0] * data
        if len({self.problem.cluster.kind_number(rank) for rank in ranks}) > 1:
            # As many as the rows allow.
            parts = microbatches * next(d for d in range(data, 0, -1) if rows % d == 0)
            if not self._has_layouts(tensor, parts):
                return None
            speeds = replica_speeds(self.problem, ranks, self._chain(tensor, parts), tensor, parts)
        if rows % data == 0 and len(set(speeds)) == 1:
            return ()
        shares = split_rows(rows, speeds)
        return shares if len(set(shares)) > 1 else ()

    def _units(self, data: int, shares: tuple[int, ...], microbatches: int) -> int:
        return microbatches * (sum(shares) // int(np.gcd.reduce(shares)) if shares else data)

    def _chain(self, tensor: int, units: int) -> Chain:
        """The fastest layouts for what all devices have in common, where the batch is cut into so many parts."""
        if (tensor, units) not in self._chains:
            shape = Shape(1, 1, tensor, units, "1f1b", 0)
            self._chains[tensor, units] = next(iter(self.problem.chains.of(self.problem.as_equal, shape)))
        return self._chains[tensor, units]

    def _price(self, mesh: Mesh, microbatches: int) -> Way:
        classes = rank_classes(self.problem.cluster, mesh.stage(0, self.num_blocks))
        tables, edges = [], np.zeros(self.num_blocks + 1)
        for one in classes:
            tables.append(self._table(mesh, microbatches, one.ranks[0], edges))
        limits = [min(map(self.problem.memory_limit_of, one.ranks)) for one in classes]
        return Way(
            mesh,
            np.maximum.reduce([table.forward_s for table in tables]),
            np.maximum.reduce([table.backward_s for table in tables]),
            np.maximum.reduce([table.tail_s for table in tables]),
            edges,
            tuple(zip(tables, limits, strict=True)),
        )

    def _table(self, mesh: Mesh, microbatches: int, rank: int, edges: np.ndarray) -> Runs:
        """Figures of one rank. edges: [stop], the bytes that leave, to be raised."""

        def ask(start: int, stop: int) -> np.ndarray:
            cost = self.cost(mesh, microbatches, rank, start, stop)
            edges[stop] = max(edges[stop], cost.boundary_bytes)
            return np.array(figures(cost))

        build = _every_run if self.is_exact else _sums
        table = build(self._kinds(mesh.chain), ask)
        if not self.is_exact:
            by_kind = {kind: edges[i + 1] for i, kind in enumerate(self._kinds(mesh.chain)) if edges[i + 1]}
            for i, kind in enumerate(self._kinds(mesh.chain)[:-1]):
                edges[i + 1] = by_kind.get(kind, edges[i + 1])
        return Runs(*table)

    def _kinds(self, chain: Chain) -> list[tuple]:
        blocks = self.problem.graph.blocks
        return [(block.kind, *(row[block.index] for row in chain.rows())) for block in blocks]

    def cost(self, mesh: Mesh, microbatches: int, rank: int, start: int, stop: int) -> StageCost:
        """Of a pipeline in which others have the blocks before and behind; what parameters shared with them cost apart."""
        graph = self.problem.graph
        # Whoever is next is asked for what it costs to reach apart (`Bounds.send_s`).
        around = Mesh(mesh.ranks[:1], mesh.data, 1, 0, "none", mesh.shares, Chain())
        stages = [Stage(0, 0, (), 1)] if start else []
        stages.append(mesh.stage(start, stop))
        if stop < self.num_blocks:
            stages.append(around.stage(stop, stop))
        plan = Plan(
            graph.name, graph.fingerprint, self.problem.cluster.world_size, graph.batch_size, microbatches, "1f1b",
            tuple(stages), mesh.chain.unique, precision=graph.precision,
        )  # fmt: skip
        return self.problem.costs.of_rank(plan, int(start > 0), rank)


def _every_run(kinds: Sequence[tuple], ask: Callable[[int, int], np.ndarray]) -> np.ndarray:
    count = len(kinds)
    table = np.zeros((len(FIELDS), count + 1, count + 1))
    for start in range(count):
        for stop in range(start + 1, count + 1):
            table[:, start, stop] = ask(start, stop)
    return table


def _sums(kinds: Sequence[tuple], ask: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Runs as sums of their blocks, of which each kind is asked once, and ends once more."""
    count = len(kinds)
    known: dict[tuple, np.ndarray] = {}
    for i, kind in enumerate(kinds):
        key = (kind, i == 0, i == count - 1)
        if key not in known:
            known[key] = ask(i, i + 1)
    blocks = np.array([known[kind, i == 0, i == count - 1] for i, kind in enumerate(kinds)])
    pairs = Counter(kinds[i] for i in range(1, count - 2) if kinds[i] == kinds[i + 1])
    once = np.zeros(len(FIELDS))
    if pairs:
        kind = pairs.most_common(1)[0][0]
        i = next(i for i in range(1, count - 2) if kinds[i] == kinds[i + 1] == kind)
        of_pair = ask(i, i + 2)
        once = np.clip(2 * blocks[i] - of_pair, 0.0, blocks[i])
    else:
        of_pair = once
    ends = np.concatenate([np.zeros((1, len(FIELDS))), np.cumsum(blocks - once, axis=0)])
    table = once[:, None, None] + (ends[None, :, :] - ends[:, None, :]).transpose(2, 0, 1)
    exists = np.triu(np.ones((count + 1, count + 1)), 1)
    for field_ in _PEAKS:
        # Entry [start, stop] is the most of blocks start to stop - 1; none is negative.
        table[field_] = np.maximum.accumulate(exists * np.concatenate([[0.0], blocks[:, field_]]), axis=1)
    # Neighbours add to each other's: one block's parameters are gathered beside the other's.
    for field_ in _PEAKS[:3]:
        table[field_] = np.where(table[field_] > 0, np.maximum(table[field_], of_pair[field_]), table[field_])
    table[FIELDS.index("exists")] = 1.0
    return table * exists
