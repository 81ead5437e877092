"""The cost model: seconds and bytes of every stage of a plan, from a graph, a cluster, and what was learnt.

    forward   = ops + conversions + side ops, per microbatch
    backward  = their gradients (+ what is computed again) + sums of gradients over microbatches
    reduction = over data, as the ZeRO level has it (cost/data_axis.py), part of it hidden
    memory    = what lies at rest by precision and ZeRO level, activations by storage (cost/memory.py)

Assumed: the optimizer is AdamW. Ranks of a stage differ by their devices and the links among them (cost/mixed.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from ..cluster.hosts import seen_by
from ..cluster.spec import Cluster
from ..graph import Block, Graph, Op
from ..plan import Plan, Recompute, Stage
from ..sharding.placement import REPLICATED, Placement
from ..sharding.rows import stage_parts
from ..sharding.strategy import Strategy
from .block import Both, ModelAxes, Table, add
from .block_prices import BlockPrice, BlockPrices, Setting
from .collectives import collective_s
from .compute import kernel_s, optimizer_s
from .constants import Constants, constants_of
from .corrections import Corrections
from .data_axis import BlockLoad, DataTraffic, data_traffic
from .kernels import Kernel
from .memory import BlockMemory
from .mixed import RankClass, boundary_pairs, rank_classes, slowest
from .side_ops import SideOps
from .stage_memory import OPTIMIZER_BYTES_PER_ELEMENT, BlockParameters, StageMemory, as_run, stage_memory
from .types import StageCost

__all__ = ["OPTIMIZER_BYTES_PER_ELEMENT", "Breakdown", "Constants", "Corrections", "CostModel"]


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Predicted seconds of one microbatch: (forward, backward) by compute class, and by "<link>/<collective>".

    Class "launch" is the time that an asynchronous device waits for the host."""

    compute: Mapping[str, Both]
    collectives: Mapping[str, Both]


@dataclass(frozen=True, slots=True)
class _Run:
    """A `stage_memory.BlockRun`: consecutive blocks of a stage with one price and one recompute choice."""

    block: Block
    count: int
    price: BlockPrice
    recompute: Recompute
    shares_parameters: bool

    @property
    def memory(self) -> BlockMemory:
        return self.price.memory


class CostModel:
    """Prices of `graph` on `cluster`. Not thread-safe: answers are remembered.

    constants: in place of those that cost/constants.py has for the cluster.

    Where devices differ, stages are priced by the devices of their ranks; single ops and conversions by what all devices
    have in common (`Cluster.device`).
    """

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        corrections: Corrections | None = None,
        *,
        constants: Constants | None = None,
    ) -> None:
        self.graph, self.cluster = graph, cluster
        self.corrections = corrections or Corrections()
        self._given = constants
        self.constants = constants or constants_of(cluster)
        self._seen: dict[int, CostModel] = {}
        self._classes: dict[tuple, tuple[RankClass, ...]] = {}
        self._blocks = BlockPrices(graph, cluster, self.corrections, self.constants)
        self._stages: dict[tuple, StageCost] = {}
        self._sides = SideOps(graph)
        self._parameters = BlockParameters(graph, self.constants)
        # Seconds to update a parameter, by how many elements of it a rank holds.
        self._updates: dict[float, float] = {}

    def with_constants(self, constants: Constants) -> CostModel:
        """The same model with other constants; what they do not change is shared."""
        return self._sharing(self.cluster, constants)

    def on(self, cluster: Cluster) -> CostModel:
        """The same model on another cluster; what that does not change is shared."""
        return self._sharing(cluster, self._given)

    def of_graph(self, graph: Graph) -> CostModel:
        """The same model of another graph."""
        return CostModel(graph, self.cluster, self.corrections, constants=self._given)

    def _sharing(self, cluster: Cluster, constants: Constants | None) -> CostModel:
        other = CostModel(self.graph, cluster, self.corrections, constants=constants)
        other._blocks.share(self._blocks)
        other._sides = self._sides
        return other

    # -- ops and conversions

    def op_s(self, op: Op, strategy: Strategy | None, *, shards: int, precision: str = "float32") -> Both:
        """(forward, backward) seconds of `op` for one microbatch on one rank, with its inner collectives.

        shards: data degree x microbatches, which cut the batch. Inner collectives are priced within a host. What the
        host of an asynchronous device needs to launch is not here: a block takes the longer of the two sums.
        """
        pricer = self._blocks.pricer(precision)
        found = pricer.op_seconds(op, (strategy,) if strategy is not None else (), shards)
        inner: list[Both] = []
        if strategy is not None:
            ranks = tuple(range(min(max(2, strategy.degree), self.cluster.world_size)))
            inner = list(pricer.inner_seconds(op, (strategy,), 0, shards, ranks).values())
        forward_s, backward_s = (sum(seconds[way] for seconds in inner) for way in (0, 1))
        return sum(found.forward.values()) + forward_s, sum(found.backward.values()) + backward_s

    def compute_class(self, op: Op) -> str:
        """The class of cluster/rates.py in which the op spends most of its forward; "view" where it spends nothing."""
        seconds = self._blocks.pricer("float32").op_seconds(op, (), 1).forward
        return max(seconds, key=lambda name: seconds[name], default="view")

    def conversion_s(
        self,
        tensor: str,
        have: Placement,
        want: Placement,
        *,
        shards: int,
        ranks: tuple[int, ...],
        precision: str = "float32",
    ) -> Both:
        """(forward, backward) seconds of turning `tensor` from `have` into `want` on the axis of global `ranks`."""
        pricer = self._blocks.pricer(precision)
        forward, backward = pricer.conversion_actions(tensor, have, want)
        size = pricer.local(shards).size_bytes(tensor)
        seen = 1 - self.constants.tensor_overlap
        wire_s, copy_s = pricer.action_seconds(*forward, size, ranks, False)
        wire_back_s, copy_back_s = pricer.action_seconds(*backward, size, ranks, True) if backward else (0.0, 0.0)
        return seen * wire_s + copy_s, seen * wire_back_s + copy_back_s

    # -- stages

    def stage(self, plan: Plan, index: int) -> StageCost:
        """The cost of stage `index` of `plan`: of its slowest rank, and of its fullest."""
        if not self.cluster.hosts:
            return self._stage_of(plan, index, None)
        return slowest([self._of_class(plan, index, one) for one in self._classes_of(plan.stages[index])])

    def of_rank(self, plan: Plan, index: int, rank: int) -> StageCost:
        """The cost of stage `index` as one of its ranks has it, alone."""
        classes = self._classes_of(plan.stages[index])
        return self._of_class(plan, index, next(one for one in classes if rank in one.ranks))

    def _classes_of(self, stage: Stage) -> tuple[RankClass, ...]:
        key = (stage.ranks, stage.data, stage.shares)
        if key not in self._classes:
            self._classes[key] = rank_classes(self.cluster, stage)
        return self._classes[key]

    def _of_class(self, plan: Plan, index: int, one: RankClass) -> StageCost:
        return self._as_if(one.device)._stage_of(plan, index, one.data_rank)

    def _as_if(self, device: int) -> CostModel:
        """The model as if all devices were this one of `Cluster.devices`, the links as they are."""
        if self.cluster.is_equal:
            return self
        if device not in self._seen:
            self._seen[device] = self.on(seen_by(self.cluster, self.cluster.devices[device]))
        return self._seen[device]

    def _stage_of(self, plan: Plan, index: int, data_rank: int | None) -> StageCost:
        stage = plan.stages[index]
        following = plan.stages[index + 1] if index + 1 < len(plan.stages) else None
        key = (
            self._key(plan, stage),
            stage.ranks,
            index > 0,
            self._first_of_group(plan, index),
            (following.ranks, following.data, following.tensor, following.shares) if following else None,
            tuple((s.start, s.stop, s.ranks) for s in plan.stages) if self._ties(stage) else None,
            data_rank,
        )
        if key not in self._stages:
            self._stages[key] = self._stage(plan, index, data_rank)
        return self._stages[key]

    def breakdown(self, plan: Plan, index: int) -> Breakdown:
        """Where the seconds of one microbatch of stage `index` go; what is computed again is in the backward's. Where
        ranks differ, those of the slowest."""
        if not self.cluster.hosts:
            return self._breakdown(plan, index, None)
        found = [
            self._as_if(one.device)._breakdown(plan, index, one.data_rank)
            for one in self._classes_of(plan.stages[index])
        ]
        return max(found, key=lambda one: sum(f + b for f, b in (*one.compute.values(), *one.collectives.values())))

    def _breakdown(self, plan: Plan, index: int, data_rank: int | None, runs: Sequence[_Run] = ()) -> Breakdown:
        """runs: those of the stage for this rank, where they are known."""
        stage = plan.stages[index]
        runs = runs or self._runs(plan, stage, data_rank)
        compute: Table = {}
        collectives: Table = {}
        for run in runs:
            parts = run.price.passes(run.recompute)
            for table, part in ((compute, parts[0]), (collectives, parts[1])):
                for name, (forward_s, backward_s) in part.items():
                    add(table, name, run.count * forward_s, run.count * backward_s)
        shards = stage_parts(stage, plan.microbatches, data_rank)
        for op in self._sides.of(stage.start, stage.stop, shards)[1]:
            for name, seconds in self._blocks.pricer(plan.precision).op_seconds(op, (), shards).forward.items():
                add(compute, name, seconds, 0.0)
        if self._asynchronous:
            add(compute, "launch", self.constants.microbatch_s, 0.0)
        return Breakdown(compute, collectives)

    @property
    def _asynchronous(self) -> bool:
        return self.cluster.device.asynchronous

    @staticmethod
    def _first_of_group(plan: Plan, index: int) -> bool:
        """Whether no earlier stage runs on the same ranks."""
        return all(plan.stages[i].ranks != plan.stages[index].ranks for i in range(index))

    def _stage(self, plan: Plan, index: int, data_rank: int | None) -> StageCost:
        stage = plan.stages[index]
        runs = self._runs(plan, stage, data_rank)
        breakdown = self._breakdown(plan, index, data_rank, runs)
        tables = (*breakdown.compute.values(), *breakdown.collectives.values())
        forward_s, backward_s = sum(f for f, _ in tables), sum(b for _, b in tables)
        pricer = self._blocks.pricer(plan.precision)
        memory = stage_memory(self.graph, pricer.local, plan, index, runs, self.constants, data_rank, self._parameters)
        if plan.microbatches > 1:
            size = 3.0 * memory.local_bytes
            kernel = Kernel("pointwise", size, size, "")
            backward_s += kernel_s(self.cluster.device, kernel, True, self.corrections, self.constants)
        traffic = self._data_traffic(as_run(plan, index, self.constants), runs, memory, backward_s)
        send_s, boundary_bytes = self._send(plan, index, runs[-1].memory.output_bytes)
        once_s = self.constants.step_s if self._asynchronous and self._first_of_group(plan, index) else 0.0
        factor = self.corrections.memory
        return StageCost(
            forward_s=forward_s + traffic.forward_s,
            backward_s=backward_s + traffic.backward_s,
            prologue_s=self._prologue(stage, plan.microbatches, plan.precision, data_rank) + once_s,
            send_s=send_s,
            boundary_bytes=boundary_bytes,
            reduce_s=traffic.reduce_s,
            reduce_overlap_s=traffic.reduce_overlap_s,
            reduce_model_s=self._model_reduction(plan, index, runs, data_rank) + traffic.after_s,
            optimizer_s=sum(count * self._update_s(held) for held, count in memory.held_elements.items()),
            parameter_bytes=memory.parameter_bytes,
            gradient_bytes=memory.gradient_bytes,
            optimizer_bytes=memory.optimizer_bytes,
            unsharded_bytes=memory.unsharded_bytes,
            activation_bytes=int(memory.activation_bytes * factor),
            forward_peak_bytes=int(memory.forward_peak_bytes * factor),
            backward_peak_bytes=int(memory.backward_peak_bytes * factor),
            backward_weight_s=min(backward_s, sum(run.count * run.price.seconds.weight_s for run in runs)),
            gradients_stay=self._gradients_stay(traffic, runs, memory),
            deferred_bytes=int(sum(run.count * run.memory.deferred_bytes for run in runs) * factor),
        )

    def _update_s(self, elements: float) -> float:
        if elements not in self._updates:
            self._updates[elements] = optimizer_s(
                self.cluster.device, {4.0 * elements: 1}, self.corrections, self.constants
            )
        return self._updates[elements]

    # -- blocks

    def _runs(self, plan: Plan, stage: Stage, data_rank: int | None) -> list[_Run]:
        parts = stage_parts(stage, plan.microbatches, data_rank)
        setting = Setting(parts, _axes(stage, data_rank), plan.microbatches > 1, plan.precision)
        where = setting.key(self.cluster)
        blocks = self.graph.blocks[stage.start : stage.stop]
        indices = list(zip(*stage.layouts, strict=True)) if stage.axes else [()] * len(blocks)
        prices: dict[tuple, BlockPrice] = {}
        traits = self._traits
        found: list[list] = []
        known: tuple = ()
        for block, layouts, recompute in zip(blocks, indices, stage.block_recompute, strict=True):
            trained, shares = traits[block.index]
            key = (block.kind, layouts, trained, recompute)
            if key == known and not shares and not found[-1][-1]:
                found[-1][1] += 1
                continue
            known, of_price = key, key[:-1]
            if of_price not in prices:
                prices[of_price] = self._blocks.of(block, tuple(plan.layouts[i] for i in layouts), setting, where)
            found.append([block, 1, prices[of_price], recompute, shares])
        return [_Run(*one) for one in found]

    @cached_property
    def _traits(self) -> list[tuple[tuple[bool, ...], bool]]:
        """Per block, which of its parameters take gradients, and whether other blocks use some of them."""
        tensors, shared = self.graph.tensors, set(self.graph.shared_parameters)
        return [
            (
                tuple(bool(tensors[name].requires_grad) for name in block.parameters),
                not shared.isdisjoint(block.parameters),
            )
            for block in self.graph.blocks
        ]

    def _key(self, plan: Plan, stage: Stage) -> tuple:
        layouts = tuple(self._blocks.layout_number(plan.layouts[i]) for row in stage.layouts for i in row)
        return (
            stage.start, stage.stop, layouts, stage.data, stage.axes, plan.microbatches, stage.recompute, stage.zero,
            stage.zero_group, stage.shares, plan.precision, plan.offload,
        )  # fmt: skip

    # -- communication outside blocks

    def _data_traffic(self, stage: Stage, runs: Sequence[_Run], memory: StageMemory, backward_s: float) -> DataTraffic:
        if stage.data == 1:
            return DataTraffic()
        overlap = self.cluster.link(stage.ranks[:: stage.tensor]).overlap
        if self._asynchronous:
            overlap = min(1.0, overlap * (self.constants.gather_overlap if stage.zero == 3 else self.constants.overlap))
        if stage.zero != 3:
            # Parameters that several blocks of the stage use are reduced once, and everything hides behind the whole.
            trained = memory.trainable_bytes * self.reduced_share
            loads = [BlockLoad(memory.local_bytes, trained, 0.0, backward_s)]
            return data_traffic(stage, loads, overlap, self.constants, self._collective_s)
        loads = []
        for run in runs:
            sizes = run.memory.parameter_bytes
            flags = self._traits[run.block.index][0]
            trained = sum(size for size, is_trained in zip(sizes, flags, strict=True) if is_trained)
            passes = run.price.passes(run.recompute)[2]
            loads.append(BlockLoad(sum(sizes), trained * self.reduced_share, *passes, run.count))
        return data_traffic(stage, loads, overlap, self.constants, self._collective_s)

    @property
    def reduced_share(self) -> float:
        """Bytes of a gradient as it is reduced, per byte of its parameter as used."""
        return self.constants.reduced_bytes / 2.0 if self.constants.reduced_bytes and self._asynchronous else 1.0

    def _collective_s(self, kind: str, size_bytes: float, ranks: tuple[int, ...]) -> float:
        return collective_s(self.cluster, kind, size_bytes, ranks, self.corrections, self.constants)

    def _model_reduction(self, plan: Plan, index: int, runs: Sequence[_Run], data_rank: int | None) -> float:
        """Gradients summed once per step over the model axis, and over the stages that share a parameter."""
        stage = plan.stages[index]
        axes = _axes(stage, data_rank)
        summed = _summed_bytes(runs).items()
        seconds = sum((self._collective_s("all_reduce", size, axes.ranks_of(over)) for over, size in summed), 0.0)
        for name in self._ties(stage):
            holders = tuple(
                s.ranks[0]
                for s in plan.stages
                if any(name in b.parameters for b in self.graph.blocks[s.start : s.stop])
            )
            run = next(run for run in runs if name in run.block.parameters)
            size = run.memory.parameter_bytes[run.block.parameters.index(name)]
            seconds += self._collective_s("all_reduce", size, holders)
        return seconds

    @staticmethod
    def _gradients_stay(traffic: DataTraffic, runs: Sequence[_Run], memory: StageMemory) -> bool:
        """As in `StageCost`: where buffers stay, those of gradients that are summed over ranks, if they are most of them."""
        if memory.gradients_stay is not None:
            return memory.gradients_stay
        return traffic.reduce_s > 0 or 2 * sum(_summed_bytes(runs).values()) > memory.trainable_bytes

    def _ties(self, stage: Stage) -> tuple[str, ...]:
        """Of a stage's parameters, those that several blocks use."""
        if not self.graph.shared_parameters:
            return ()
        inside = {name for block in self.graph.blocks[stage.start : stage.stop] for name in block.parameters}
        return tuple(name for name in self.graph.shared_parameters if name in inside)

    def _send(self, plan: Plan, index: int, output_bytes: tuple[int, ...]) -> tuple[float, int]:
        """Seconds and bytes of one microbatch's boundary, per rank of the side that holds more of it."""
        if index + 1 >= len(plan.stages):
            return 0.0, 0
        stage, following = plan.stages[index], plan.stages[index + 1]
        sent = sum(output_bytes)
        # What the fullest data ranks of both have of a microbatch.
        received = int(sent * Fraction(stage_parts(stage, 1)) / stage_parts(following, 1))
        size = max(sent, received)
        if self._scatters(plan, stage, following):
            group = stage.ranks[: stage.tensor]
            handing_s = self._handing_s(size / stage.tensor, stage.ranks, following.ranks)
            return handing_s + self._collective_s("all_gather", size, group), size
        return self._handing_s(size, stage.ranks, following.ranks), size

    def _scatters(self, plan: Plan, stage: Stage, following: Stage) -> bool:
        """Whether the ranks of an axis send parts of what they hold whole."""
        if not (self.constants.scatter_sends and self._asynchronous) or stage.tensor == 1:
            return False
        whole = all(out == str(REPLICATED) for axis in stage.layouts for out in plan.layouts[axis[-1]].outputs)
        return whole and stage.tensor == following.tensor

    def boundary_s(self, size_bytes: float, sender: tuple[int, ...], receiver: tuple[int, ...]) -> float:
        """Seconds to hand a message of this size from each of the sender's data ranks on to the receiver's."""
        models = {id(model): model for model in (self._as_if(self.cluster.device_number(rank)) for rank in sender)}
        return max(model._handing_s(size_bytes, sender, receiver) for model in models.values())

    def _handing_s(self, size_bytes: float, sender: tuple[int, ...], receiver: tuple[int, ...]) -> float:
        pairs = [(sender[0], receiver[0])]
        if self.cluster.hosts:
            pairs = boundary_pairs(self.cluster, sender, receiver)
        return max(self._collective_s("send", size_bytes, ranks) for ranks in pairs)

    def _prologue(self, stage: Stage, microbatches: int, precision: str, data_rank: int | None) -> float:
        """Batch-wide values, microbatch by microbatch, and their all-reduce over data."""
        shards = stage_parts(stage, microbatches, data_rank)
        ops, _ = self._sides.of(stage.start, stage.stop, shards)
        pricer = self._blocks.pricer(precision)
        seconds = microbatches * sum(sum(pricer.op_seconds(op, (), shards).forward.values()) for op in ops)
        if ops:
            seconds += self._collective_s("all_reduce", 8, stage.ranks[:: stage.tensor])
        return seconds


def _summed_bytes(runs: Sequence[_Run]) -> dict[tuple[int, ...], float]:
    """Bytes of gradients that are summed over model axes, by these."""
    summed: dict[tuple[int, ...], float] = {}
    for run in runs:
        for over, size in run.price.shared_bytes.items():
            summed[over] = summed.get(over, 0.0) + run.count * size
    return summed


def _axes(stage: Stage, data_rank: int | None) -> ModelAxes:
    """The model axes of a data rank's replica, by default the first one's."""
    first = (data_rank or 0) * stage.tensor
    return ModelAxes(stage.axes, stage.ranks[first : first + stage.tensor])
