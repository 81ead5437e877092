"""What every search sees: a graph, a cluster, the user's constraints, a cost model, and a memory limit per device.

The space of plans is pipeline x data x tensor = world size, microbatches among the divisors of batch / data, ZeRO 0
or 3, a schedule, and for each pipeline stage its blocks, its recompute choice and its layouts. `Shape` is the part of
a plan without the stages; `Problem.shapes` lists those that the constraints allow.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Protocol

from ..cluster.spec import Cluster, Device
from ..cost.types import StageCost
from ..graph import Graph
from ..plan import Layout, Plan, Recompute
from ..plan_validate import nearest_divisors
from ..sharding.batch import BatchLayout, batch_layout
from ..sharding.strategies import strategies
from .budget import Budget

# Share of a device's memory that plans leave free for what the cost model does not count: the CUDA context, NCCL's
# buffers, fragmentation of the allocator. An assumption; memory_limit_bytes= overrules it.
RESERVE_SHARE = 0.1
# The searches' bounds are proved for these; other schedules run by a plan that names them.
SEARCHED_SCHEDULES = ("1f1b", "gpipe")


class Costs(Protocol):
    """What the searches need of a cost model (cost/model.py has the real one, tests have made-up ones).

    Where devices differ they also need `CostModel.of_rank` and `CostModel.on`.
    """

    def stage(self, plan: Plan, index: int) -> StageCost: ...


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user pins; None leaves it to the search. ValueError for values that no problem allows."""

    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    zero: int | None = None
    recompute: str | None = None
    memory_limit_bytes: int | None = None
    context: int | None = None
    expert: int | None = None

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "microbatches", "memory_limit_bytes", "context", "expert"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: expected a positive integer, or None to let the search choose")
        for name in ("context", "expert"):
            if getattr(self, name) not in (None, 1):
                raise ValueError(
                    f"{name}={getattr(self, name)}: only 1 is supported; context and expert parallelism come with "
                    f"other layouts of the model axis, which tensor= now names alone; leave {name} out"
                )
        for name, legal in (("schedule", SEARCHED_SCHEDULES), ("zero", (0, 3)), ("recompute", ("none", "full"))):
            value = getattr(self, name)
            if value is not None and (value not in legal or isinstance(value, bool)):
                near = difflib.get_close_matches(str(value), map(str, legal), 1)
                raise ValueError(
                    f"{name}={value!r}: expected one of {', '.join(map(repr, legal))}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )

    def __str__(self) -> str:
        pinned = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) is not None]
        return ", ".join(pinned) or "no constraints"


@dataclass(frozen=True, slots=True)
class Shape:
    """A plan without its stages."""

    pipeline: int
    data: int
    tensor: int
    microbatches: int
    schedule: str
    zero: int

    @property
    def shards(self) -> int:
        """How many ways the batch is cut: over the data axis, then in time."""
        return self.data * self.microbatches

    def ranks(self, stage: int) -> tuple[int, ...]:
        """Ranks of a stage: tensor innermost, then data, pipeline outermost."""
        width = self.data * self.tensor
        return tuple(range(stage * width, (stage + 1) * width))

    @property
    def group(self) -> tuple[int, int, int, int]:
        """What the table of candidates has one row for."""
        return (self.pipeline, self.data, self.tensor, self.zero)

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}, {self.microbatches} "
            f"microbatch{'es' if self.microbatches > 1 else ''}, {self.schedule}, zero {self.zero}"
        )


@dataclass(frozen=True, eq=False)
class Chain:
    """Layouts of all blocks on one model axis, neighbours agreeing at their boundary; () where there is no such axis.

    unique: the distinct layouts; index: per block, which of them.
    """

    unique: tuple[Layout, ...] = ()
    index: tuple[int, ...] = ()

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Chain:
        order = {layout: i for i, layout in enumerate(dict.fromkeys(layouts))}
        return cls(tuple(order), tuple(order[layout] for layout in layouts))


class ChainSource(Protocol):
    """Where layouts come from: planner/chains.py, or a test's own."""

    def of(self, problem: Problem, shape: Shape) -> Iterable[Chain]:
        """The chains that the shape may use, the fastest first."""
        ...

    def smallest(self, problem: Problem, shape: Shape) -> Chain:
        """The chain that keeps least."""
        ...

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> Sequence[float]:
        """Per block, forward and backward on `tensor` ranks of one of `shards` shares of the batch.

        No layout is faster; what happens once per step apart.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """One planning task. ValueError when the constraints contradict each other, the batch, the model or the cluster."""

    graph: Graph
    cluster: Cluster
    costs: Costs
    chains: ChainSource
    constraints: Constraints = Constraints()
    # Whether the methods may put stages of different meshes beside each other.
    unequal_stages: bool = True
    # How long the search may go on; every method asks it in its loops.
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        self._check_batch()
        self._check_degrees()
        self._check_tensor()

    @cached_property
    def memory_limit_bytes(self) -> int:
        """What a plan may use of each device; of the smallest, where they differ."""
        return self._limit_of(self.cluster.device)

    def memory_limit_of(self, rank: int) -> int:
        """What a plan may use of the device of a rank."""
        return self._limit_of(self.cluster.device_of(rank)) if self.cluster.hosts else self.memory_limit_bytes

    def _limit_of(self, device: Device) -> int:
        given = self.constraints.memory_limit_bytes
        return given if given is not None else int(device.memory_bytes * (1 - RESERVE_SHARE))

    def excess_bytes(self, peaks: Mapping[int, int]) -> int:
        """By how much the fullest device is above its limit; not positive where all fit. peaks: bytes by rank."""
        if not self.cluster.hosts:
            return max(peaks.values()) - self.memory_limit_bytes
        return max(peak_bytes - self.memory_limit_of(rank) for rank, peak_bytes in peaks.items())

    @cached_property
    def as_equal(self) -> Problem:
        """The same on the equal cluster that is nowhere better than this one: itself where all hosts are alike.

        Degrees that only unequal stages can have are left free.
        """
        if not self.cluster.hosts:
            return self
        cluster, pinned = self.cluster.as_equal, self.constraints
        if cluster.world_size % ((pinned.data or 1) * (pinned.tensor or 1) * (pinned.pipeline or 1)):
            pinned = replace(pinned, data=None, tensor=None, pipeline=None)
        return replace(self, cluster=cluster, costs=self.costs.on(cluster), constraints=pinned)

    @property
    def recompute_choices(self) -> tuple[Recompute, ...]:
        """What a stage may do, the fastest first."""
        return (self.constraints.recompute,) if self.constraints.recompute else ("none", "full")

    @cached_property
    def batch_conflict(self) -> str:
        """Why data ranks cannot share the batch, "" if they can."""
        layout = self._cut_batch
        return str(layout.conflict) if layout and layout.conflict else ""

    @cached_property
    def time_conflict(self) -> str:
        """Why there can be no more than one microbatch, "" if there can."""
        layout = self._cut_batch
        return str(layout.time_conflict) if layout and layout.time_conflict else ""

    @cached_property
    def _cut_batch(self) -> BatchLayout | None:
        """The layout of the batch in as few parts as it can be cut into."""
        rows = self.graph.batch_size
        least = next((d for d in range(2, rows + 1) if rows % d == 0), None)
        return batch_layout(self.graph, least) if least else None

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """All shapes that the constraints allow, 1F1B before GPipe. ValueError if there is none."""
        found = tuple(self._shapes())
        if not found:
            raise ValueError(
                f"no plan of {self.graph.name} on {self.cluster.world_size} devices meets {self.constraints}: "
                f"{self._why_none()}"
            )
        return found

    def _shapes(self) -> Iterator[Shape]:
        pinned = self.constraints
        for pipeline, data, tensor in self._triples():
            if tensor > 1 and not self.splits(tensor, data):
                continue
            for microbatches in self._microbatches(data):
                for zero in (0, 3) if data > 1 else (0,):
                    if pinned.zero not in (None, zero):
                        continue
                    for schedule in self._schedules(pipeline, microbatches):
                        yield Shape(pipeline, data, tensor, microbatches, schedule, zero)

    def _triples(self) -> Iterator[tuple[int, int, int]]:
        world, pinned = self.cluster.world_size, self.constraints
        for pipeline in _choices(pinned.pipeline, world):
            if pipeline > len(self.graph.blocks):
                continue
            for tensor in _choices(pinned.tensor, world // pipeline):
                data = world // pipeline // tensor
                if pipeline * tensor * data != world or pinned.data not in (None, data):
                    continue
                if self.graph.batch_size % data or (data > 1 and self.batch_conflict):
                    continue
                yield pipeline, data, tensor

    def _microbatches(self, data: int) -> Iterator[int]:
        rows = self.graph.batch_size // data
        for count in _choices(self.constraints.microbatches, rows):
            if rows % count == 0 and (count == 1 or not self.time_conflict):
                yield count

    def _schedules(self, pipeline: int, microbatches: int) -> tuple[str, ...]:
        if self.constraints.schedule is not None:
            return (self.constraints.schedule,)
        # With one stage or one microbatch GPipe does what 1F1B does and holds at least as many activations.
        return ("1f1b", "gpipe") if pipeline > 1 and microbatches > 1 else ("1f1b",)

    def splits(self, tensor: int, data: int) -> bool:
        """Whether any op that uses a parameter can share its work out over `tensor` ranks beside `data` ranks."""
        key = (tensor, data)
        if key not in self._splits:
            self._splits[key] = any(
                strategy.work < 1
                for op in self._distinct_parameter_ops
                for strategy in strategies(self.graph, op, tensor, data)
            )
        return self._splits[key]

    @cached_property
    def _splits(self) -> dict[tuple[int, int], bool]:
        return {}

    @cached_property
    def _distinct_parameter_ops(self):
        """One op per block kind and position, of those that take a parameter."""
        kinds: set[int] = set()
        ops = []
        for block in self.graph.blocks:
            if block.kind not in kinds:
                kinds.add(block.kind)
                ops += [
                    op
                    for op in self.graph.block_ops(block)
                    if any(self.graph.tensors[name].role == "parameter" for name in op.inputs)
                ]
        return tuple(ops)

    def _check_batch(self) -> None:
        pinned, rows = self.constraints, self.graph.batch_size
        if pinned.data and rows % pinned.data:
            raise ValueError(
                f"data={pinned.data} does not divide the batch of {rows} rows; data could be "
                f"{nearest_divisors(rows, pinned.data)}, or capture with another batch"
            )
        if pinned.microbatches and rows % ((pinned.data or 1) * pinned.microbatches):
            per_rank = rows // (pinned.data or 1)
            raise ValueError(
                f"microbatches={pinned.microbatches} does not divide the {per_rank} rows of each data rank "
                f"({rows} rows over data={pinned.data or 1}); microbatches could be "
                f"{nearest_divisors(per_rank, pinned.microbatches)}"
            )
        for name in ("data", "microbatches"):
            if (getattr(pinned, name) or 1) == 1:
                continue
            conflict = self.batch_conflict if name == "data" else self.time_conflict
            if conflict:
                raise ValueError(
                    f"{name}={getattr(pinned, name)}: the rows of {self.graph.name}'s batch depend on each other: "
                    f"{conflict}; set {name}=1"
                )
        if pinned.zero == 3 and pinned.data == 1:
            raise ValueError("zero=3 shards parameters over the data axis, but data=1; set zero=0, or data above 1")

    def _check_degrees(self) -> None:
        pinned, world = self.constraints, self.cluster.world_size
        given = {name: getattr(pinned, name) for name in ("data", "tensor", "pipeline") if getattr(pinned, name)}
        if pinned.pipeline and pinned.pipeline > len(self.graph.blocks):
            raise ValueError(
                f"pipeline={pinned.pipeline}, but {self.graph.name} has {len(self.graph.blocks)} blocks and each stage "
                f"needs one; pipeline can be at most {len(self.graph.blocks)}"
            )
        product = 1
        for degree in given.values():
            product *= degree
        words = " x ".join(f"{name}={degree}" for name, degree in given.items())
        if len(given) > 1:
            words += f" = {product}"
        if len(given) == 3 and product != world:
            raise ValueError(f"{words}, but the cluster has {world} devices; change a degree, or leave one out")
        if self.cluster.hosts and len(given) < 3 and product <= world:
            return  # stages may have different numbers of devices
        if world % product:
            raise ValueError(
                f"{words}, which does not divide the cluster's {world} devices; the product could be "
                f"{nearest_divisors(world, product)}"
            )

    def _check_tensor(self) -> None:
        pinned = self.constraints
        if (pinned.tensor or 1) == 1 or self.splits(pinned.tensor, pinned.data or 1):
            return
        dims = sorted({size for t in self.graph.parameters for size in t.shape if size > 1})
        world = self.cluster.world_size
        possible = [t for t in range(2, world + 1) if world % t == 0 and self.splits(t, 1)]
        raise ValueError(
            f"tensor={pinned.tensor}: no op of {self.graph.name} that uses a parameter can be split {pinned.tensor} "
            f"ways; its parameters' dims are {', '.join(map(str, dims)) or 'none'}; tensor could be "
            f"{' or '.join(map(str, [1, *possible]))} on {world} devices"
        )

    def _why_none(self) -> str:
        """Which constraints contradict, when each alone is possible."""
        pinned, world, rows = self.constraints, self.cluster.world_size, self.graph.batch_size
        triples = list(self._triples())
        if not triples:
            if self.batch_conflict:
                return (
                    f"data must be 1, because the rows of the batch depend on each other ({self.batch_conflict}); "
                    f"raise tensor or pipeline, or use fewer devices"
                )
            return (
                f"the rest of the {world} devices would be data ranks, and no such degree divides the batch of {rows} "
                f"rows; use a batch that is a multiple of it, or other degrees"
            )
        if pinned.zero == 3 and all(data == 1 for _, data, _ in triples):
            return "zero=3 needs data above 1, but the other degrees leave data=1"
        if pinned.microbatches and all(rows // data % pinned.microbatches for _, data, _ in triples):
            return (
                f"microbatches={pinned.microbatches} does not divide the rows of a data rank for any of data="
                f"{sorted({data for _, data, _ in triples})}"
            )
        needed = " or ".join(map(str, sorted({t for _, _, t in triples})))
        return (
            f"the degrees left need tensor={needed}, but no op that uses a parameter can be split so many ways; "
            f"use another number of devices or another batch than {rows} rows"
        )


def _choices(pinned: int | None, limit: int) -> Iterator[int]:
    if pinned is not None:
        yield pinned
    else:
        yield from range(1, limit + 1)
