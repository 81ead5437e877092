"""What every search sees: a graph, a cluster, the user's constraints, a cost model, and a memory limit per device.

The space of plans is pipeline x data x tensor = world size, where tensor is the product of the model axes (planner/roles.py
says which these are where context= or expert= is pinned), microbatches among the divisors of batch / data, ZeRO 0
or 3, a schedule, and for each pipeline stage its blocks, its recompute choice and its layouts. `Shape` is the part of
a plan without the stages; `Problem.shapes` lists those that the constraints allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from ..cluster.spec import Cluster, Device
from ..cost.types import StageCost
from ..graph import Graph, Op
from ..plan import Plan, Recompute
from ..schedule.orders import schedule_named
from ..sharding.batch import BatchLayout, batch_layout
from ..sharding.strategies import strategies
from ..sharding.strategy import Strategy
from .budget import Budget
from .conflicts import why_none
from .constraints import SEARCHED_ZEROS, Constraints, Space
from .pins import Pins
from .refusals import check_pins
from .roles import MOST_AXES, ModelAxis, can_be_axes, leaves, model_axes
from .shapes import Chain, Shape

# Share of a device's memory that plans leave free for what the cost model does not count: the CUDA context, NCCL's
# buffers, fragmentation of the allocator. An assumption; memory_limit_bytes= overrules it.
RESERVE_SHARE = 0.1
# On no more each shape gets layouts of its own, and the search is exact over them.
FEW_DEVICES = 8


class Costs(Protocol):
    """What the searches need of a cost model (cost/model.py has the real one, tests have made-up ones).

    Where devices differ they also need `CostModel.of_rank` and `CostModel.on`.
    """

    def stage(self, plan: Plan, index: int) -> StageCost: ...


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

    def least_s(self, problem: Problem, shape: Shape, most_bytes: float, enough_s: float) -> float:
        """Per microbatch, of all blocks on one rank of each stage, with a share of what happens once per step.

        No layouts are faster that keep no more than `most_bytes`; see planner/chains.py.
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
    # What the method can make.
    space: Space = Space()
    # Plans that were priced and lost, the best first, for `explanation.changes`; the methods put them here.
    kept: list[Plan] = field(default_factory=list, compare=False)
    # What gives a method's plan a closer bound, for as much work as `thorough` allows; asked at the end, for its time.
    provers: list[Callable[[Plan], Plan]] = field(default_factory=list, compare=False)
    thorough: bool = False

    def __post_init__(self) -> None:
        # Blocks of one kind are planned as one, so kinds are parted where pins tell them apart.
        object.__setattr__(self, "graph", self.pins.graph)
        check_pins(self)

    @cached_property
    def memory_limit_bytes(self) -> int:
        """What a plan may use of each device; of the smallest, where they differ."""
        return self._limit_of(self.cluster.device)

    def memory_limit_of(self, rank: int) -> int:
        """What a plan may use of the device of a rank."""
        return self._limit_of(self.cluster.device_of(rank)) if self.cluster.hosts else self.memory_limit_bytes

    def _limit_of(self, device: Device) -> int:
        if self.constraints.memory_limit_bytes is not None:
            return self.constraints.memory_limit_bytes
        whole, reserve = device.memory_bytes, self.constraints.memory_reserve
        if reserve is None:
            reserve = RESERVE_SHARE
        limit = int(whole * (1 - reserve)) if isinstance(reserve, float) else whole - reserve
        if limit < 1:
            raise ValueError(f"memory_reserve={reserve!r} leaves nothing of a device's {whole} bytes; reserve less")
        return limit

    def excess_bytes(self, peaks: Mapping[int, int]) -> int:
        """By how much the fullest device is above its limit; not positive where all fit. peaks: bytes by rank."""
        if not self.cluster.hosts:
            return max(peaks.values()) - self.memory_limit_bytes
        return max(peak_bytes - self.memory_limit_of(rank) for rank, peak_bytes in peaks.items())

    @cached_property
    def as_equal(self) -> Problem:
        """The same on the equal cluster that is nowhere better than this one: itself where all hosts are alike.

        A depth of pipeline that only unequal stages can have is left free.
        """
        if not self.cluster.hosts:
            return self
        cluster, pinned = self.cluster.as_equal, self.constraints
        own = math.prod(degree for _, degree in pinned.roles)
        if cluster.world_size % ((pinned.data or 1) * (pinned.tensor or 1) * (pinned.pipeline or 1) * own):
            pinned = replace(pinned, pipeline=None)
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
                f"{why_none(self)}"
            )
        return found

    @cached_property
    def has_shapes(self) -> bool:
        """Whether there is any."""
        return next(self._shapes(), None) is not None

    # -- what is pinned by name: for the inner loops of the searches

    @cached_property
    def pins(self) -> Pins:
        """The layouts and stages that are pinned."""
        return Pins.of(self.graph, self.constraints.layout or (), self.constraints.stage or ())

    def allowed_strategies(self, op: Op, found: Sequence[Strategy], role: str = "") -> tuple[Strategy, ...]:
        """Of an op's strategies on a model axis those that its role and `layout=` leave: all where neither is about the op.

        Every `LayoutCosts.strategies` of a search passes what it finds through here. Ops at one position of blocks of one
        kind are pinned alike, so what is kept per kind stays right. Never empty for a (tensor, data) of `shapes`: of two
        axes one has to keep what `layout=` says, and that may be the one without a role.
        """
        if not role:
            return self.pins.allowed(op, found)
        left = leaves(role, self.graph, op, found)
        return self.pins.allowed(op, left) or left

    def model_axes(self, tensor: int) -> tuple[ModelAxis, ...]:
        """The axes that the `tensor` model ranks of a shape are, outermost first."""
        return model_axes(self.constraints.roles, tensor)

    def allows_tensor(self, tensor: int, data: int) -> bool:
        """Whether `layout=` can be kept on `tensor` model ranks beside `data` ranks."""
        if tensor == 1:
            return not self.pins.needs_axis
        key = (tensor, data)
        if key not in self._allows_tensor:
            axes = self.model_axes(tensor)
            self._allows_tensor[key] = all(
                any(
                    self.pins.allowed(
                        op, leaves(axis.role, self.graph, op, strategies(self.graph, op, axis.degree, data))
                    )
                    for axis in axes
                )
                for op in self.pins.distinct_ops
            )
        return self._allows_tensor[key]

    @cached_property
    def _allows_tensor(self) -> dict[tuple[int, int], bool]:
        return {}

    def allows_stage(self, stage: int, start: int, stop: int, num_stages: int) -> bool:
        """Whether `stage=` lets blocks [start, stop) be stage number `stage` of `num_stages`.

        A plan keeps `stage=` exactly if each of its stages is allowed.
        """
        return self.pins.allows_stage(stage, start, stop, num_stages)

    def stage_mask(self, stage: int, num_stages: int) -> np.ndarray | None:
        """`allows_stage` of all runs of blocks: a boolean array [start, stop]; None where every run is allowed."""
        fixed = self.pins.stages
        if all(one is None for one in fixed):
            return None
        free = [self.pins.allows_stage(stage, b, b + 1, num_stages) for b in range(len(fixed))]
        # blocks of [start, stop) that may not: none
        wrong = np.concatenate([[0], np.cumsum([not one for one in free])])
        return wrong[None, :] == wrong[:, None]

    def refusal(self, plan: Plan) -> str:
        """Why a plan of this space may not be taken, "" if it may: for what is pinned by name, and in a stream for stages
        that share parameters."""
        if refused := self.pins.refusal(plan):
            return refused
        if not schedule_named(plan.schedule).flushes:
            try:
                plan.validate(self.graph, self.cluster)
            except ValueError as error:
                return str(error)
        return ""

    # -- shapes

    def _shapes(self) -> Iterator[Shape]:
        for pipeline, data, tensor in self._triples():
            if tensor > 1 and not self.has_axes(tensor, 1 if self.is_large else data):
                continue
            if not self.allows_tensor(tensor, data):
                continue
            for microbatches in self.microbatch_counts(data):
                for zero in self._zeros(data):
                    for schedule in self._schedules(pipeline, microbatches):
                        if goes_together(schedule, pipeline, microbatches, zero):
                            yield Shape(pipeline, data, tensor, microbatches, schedule, zero)

    def _triples(self) -> Iterator[tuple[int, int, int]]:
        world, pinned = self.cluster.world_size, self.constraints
        for pipeline in _choices(pinned.pipeline, world):
            if pipeline > len(self.graph.blocks) or not self.pins.stages_possible(pipeline):
                continue
            for tensor in self.widths(world // pipeline):
                data = world // pipeline // tensor
                if pipeline * tensor * data != world or pinned.data not in (None, data):
                    continue
                if self.graph.batch_size % data or (data > 1 and self.batch_conflict):
                    continue
                yield pipeline, data, tensor

    def widths(self, most: int) -> Iterator[int]:
        """Model ranks that one replica may have, of `most`."""
        roles, pinned = self.constraints.roles, self.constraints.tensor
        own = math.prod(degree for _, degree in roles)
        # where roles take all the axes that there are, none is left for tensor to choose
        for tensor in _choices(1 if len(roles) == MOST_AXES and pinned is None else pinned, most // own):
            yield own * tensor

    def microbatch_counts(self, data: int = 1) -> Iterator[int]:
        """Into how many microbatches the rows of each of `data` ranks may be cut, ascending."""
        rows = self.graph.batch_size // data
        for count in _choices(self.constraints.microbatches, rows):
            if rows % count == 0 and (count == 1 or not self.time_conflict):
                yield count

    def _zeros(self, data: int) -> tuple[int, ...]:
        """On few devices 1 and 2 are left to the moves at the end."""
        pinned = self.constraints.zero
        if data == 1:
            return (0,) if pinned in (None, 0) else ()
        if pinned is not None:
            return (pinned,)
        return (0, 1, 2, 3) if self.is_large else SEARCHED_ZEROS

    def _schedules(self, pipeline: int, microbatches: int) -> tuple[str, ...]:
        if self.constraints.schedule is not None:
            return (self.constraints.schedule,)
        # With one stage or one microbatch GPipe does what 1F1B does and holds at least as many activations. On many devices
        # it is left to the moves at the end, because all that it can save is the time of a few transfers.
        is_worth_it = pipeline > 1 and microbatches > 1 and not self.is_large
        return ("1f1b", "gpipe") if is_worth_it else ("1f1b",)

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

    def has_axes(self, tensor: int, data: int) -> bool:
        """Whether `tensor` ranks beside `data` ranks can be model axes of the roles that are pinned, and of use."""
        key = (tensor, data)
        if key not in self._has_axes:
            axes = self.model_axes(tensor)
            self._has_axes[key] = all(self.splits(axis.degree, data) for axis in axes if not axis.role) and can_be_axes(
                axes, self.graph, self.distinct_ops, data
            )
        return self._has_axes[key]

    @cached_property
    def _has_axes(self) -> dict[tuple[int, int], bool]:
        return {}

    @cached_property
    def _splits(self) -> dict[tuple[int, int], bool]:
        return {}

    @property
    def is_large(self) -> bool:
        """Whether there are too many shapes for each to have layouts of its own."""
        return self.cluster.world_size > FEW_DEVICES

    @cached_property
    def distinct_ops(self) -> tuple[Op, ...]:
        """One op per block kind and position."""
        kinds = {block.kind: block for block in reversed(self.graph.blocks)}
        return tuple(op for block in kinds.values() for op in self.graph.block_ops(block))

    @cached_property
    def _distinct_parameter_ops(self) -> tuple[Op, ...]:
        """Of these the ones that take a parameter."""
        roles = self.graph.tensors
        return tuple(op for op in self.distinct_ops if any(roles[name].role == "parameter" for name in op.inputs))


def goes_together(schedule: str, pipeline: int, microbatches: int, zero: int) -> bool:
    """Whether the runtime runs such a schedule so."""
    chosen = schedule_named(schedule)
    try:
        chosen.check_microbatches(pipeline, microbatches)
    except ValueError:
        return False
    return zero == 0 or chosen.may_shard


def _choices(pinned: int | None, limit: int) -> Iterator[int]:
    if pinned is not None:
        yield pinned
    else:
        yield from range(1, limit + 1)
