"""The cost model: seconds and bytes of every stage of a plan, from a graph, a cluster, and what was learnt.

    forward   = ops + conversions + side ops, per microbatch
    backward  = their gradients (+ what is computed again) + sums of gradients over microbatches
    reduction = over data, as the ZeRO level has it (cost/data_axis.py), part of it hidden
    memory    = what lies at rest by precision and ZeRO level, activations by storage (cost/memory.py)

Assumed: the optimizer is AdamW. Ignored: differences between the ranks of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..cluster.spec import Cluster
from ..graph import Block, Graph, Op
from ..plan import Layout, Plan, Recompute, Stage
from ..sharding.batch import batch_layout
from ..sharding.flow import Step, block_flow
from ..sharding.placement import SHARED, Placement, conversion, parse_placement
from ..sharding.rows import Parts, stage_parts
from ..sharding.strategy import Strategy
from .block import BlockSeconds, Both, Pricer, Structure, Table, add
from .collectives import collective_s
from .compute import kernel_s, optimizer_s
from .constants import Constants, constants_of
from .corrections import Corrections
from .data_axis import BlockLoad, DataTraffic, data_traffic
from .kernels import Kernel
from .memory import BlockMemory, BlockView, block_memory
from .stage_memory import OPTIMIZER_BYTES_PER_ELEMENT, StageMemory, stage_memory
from .types import StageCost

__all__ = ["OPTIMIZER_BYTES_PER_ELEMENT", "Breakdown", "Constants", "Corrections", "CostModel"]


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Predicted seconds of one microbatch: (forward, backward) by compute class, and by "<link>/<collective>".

    Class "launch" is the time that an asynchronous device waits for the host."""

    compute: Mapping[str, Both]
    collectives: Mapping[str, Both]


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a block's price depends on besides the block: the cut of the batch, and the ranks of its axes.

    shards: into how many parts such as the fullest data rank's the batch is cut (`stage_parts`).
    """

    shards: Parts
    tensor_ranks: tuple[int, ...]
    accumulate: bool
    precision: str

    def key(self, cluster: Cluster) -> tuple:
        crosses = cluster.crosses_hosts(self.tensor_ranks)
        return self.shards, len(self.tensor_ranks), crosses, self.accumulate, self.precision


class _BlockPrice:
    """One block on one rank and microbatch. shared_bytes: of gradients that are summed over the model axis."""

    def __init__(self, seconds: BlockSeconds, memory: BlockMemory, shared_bytes: float) -> None:
        self.seconds, self.memory, self.shared_bytes = seconds, memory, shared_bytes
        self._passes: dict[str, tuple[Mapping[str, Both], Mapping[str, Both], Both]] = {}

    def passes(self, recompute: Recompute) -> tuple[Mapping[str, Both], Mapping[str, Both], Both]:
        """(compute, collectives, (forward, backward) seconds of all of it)."""
        if recompute not in self._passes:
            compute, collectives = self.seconds.passes(recompute)
            pairs = (*compute.values(), *collectives.values())
            self._passes[recompute] = compute, collectives, (sum(f for f, _ in pairs), sum(b for _, b in pairs))
        return self._passes[recompute]


class CostModel:
    """Prices of `graph` on `cluster`. Not thread-safe: answers are remembered.

    constants: in place of those that cost/constants.py has for the cluster.
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
        self.constants = constants or constants_of(cluster)
        self._pricers: dict[str, Pricer] = {}
        self._structures: dict[str, Structure] = {}
        self._flows: dict[tuple, tuple[tuple[Step, ...], BlockMemory, float]] = {}
        self._layouts: dict[Layout, int] = {}
        self._layout_ids: dict[int, tuple[Layout, int]] = {}
        self._blocks: dict[tuple, _BlockPrice] = {}
        self._stages: dict[tuple, StageCost] = {}
        self._side_ops: dict[tuple, tuple[list[Op], list[Op]]] = {}
        self._reads: dict[int, frozenset[str]] = {}
        self._side_order = tuple(op for op in graph.ops if op.name in graph.side_ops)

    def _pricer(self, precision: str) -> Pricer:
        if precision not in self._pricers:
            if precision not in self._structures:
                self._structures[precision] = Structure(self.graph, precision)
            self._pricers[precision] = Pricer(
                self.graph,
                self.cluster,
                self.corrections,
                self.constants,
                precision,
                self._structures[precision],
            )
        return self._pricers[precision]

    def with_constants(self, constants: Constants) -> CostModel:
        """The same model with other constants; what they do not change is shared."""
        other = CostModel(self.graph, self.cluster, self.corrections, constants=constants)
        shared = ("_structures", "_flows", "_layouts", "_layout_ids", "_side_ops", "_reads")
        for name in shared:
            setattr(other, name, getattr(self, name))
        return other

    # -- ops and conversions

    def op_s(self, op: Op, strategy: Strategy | None, *, shards: int, precision: str = "float32") -> Both:
        """(forward, backward) seconds of `op` for one microbatch on one rank, with its inner collectives.

        shards: data degree x microbatches, which cut the batch. Inner collectives are priced within a host. What the
        host of an asynchronous device needs to launch is not here: a block takes the longer of the two sums.
        """
        pricer = self._pricer(precision)
        found = pricer.op_seconds(op, strategy, shards)
        inner_s = 0.0
        if strategy is not None and strategy.collective_bytes:
            ranks = tuple(range(min(max(2, strategy.degree), self.cluster.world_size)))
            inner_s = pricer.inner_collective(op, strategy, shards, ranks)
        return sum(found.forward.values()) + inner_s, sum(found.backward.values())

    def compute_class(self, op: Op) -> str:
        """The class of cluster/rates.py in which the op spends most of its forward; "view" where it spends nothing."""
        seconds = self._pricer("float32").op_seconds(op, None, 1).forward
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
        pricer = self._pricer(precision)
        forward, backward, size = pricer.conversion_actions(tensor, have, want, shards)
        forward_s = sum(pricer.action_seconds(*forward, size, ranks, False))
        return forward_s, sum(pricer.action_seconds(*backward, size, ranks, True)) if backward else 0.0

    # -- stages

    def stage(self, plan: Plan, index: int) -> StageCost:
        """The cost of stage `index` of `plan`."""
        stage = plan.stages[index]
        following = plan.stages[index + 1] if index + 1 < len(plan.stages) else None
        key = (
            self._key(plan, stage),
            stage.ranks,
            index > 0,
            self._first_of_group(plan, index),
            (following.ranks, following.data, following.tensor) if following else None,
            tuple((s.start, s.stop, s.ranks) for s in plan.stages) if self._ties(stage) else None,
        )
        if key not in self._stages:
            self._stages[key] = self._stage(plan, index)
        return self._stages[key]

    def breakdown(self, plan: Plan, index: int) -> Breakdown:
        """Where the seconds of one microbatch of stage `index` go; what is computed again is in the backward's."""
        stage = plan.stages[index]
        compute: Table = {}
        collectives: Table = {}
        for (_, price), recompute in zip(self._prices(plan, stage), stage.block_recompute, strict=True):
            parts = price.passes(recompute)
            for table, part in ((compute, parts[0]), (collectives, parts[1])):
                for name, (forward_s, backward_s) in part.items():
                    add(table, name, forward_s, backward_s)
        shards = stage_parts(stage, plan.microbatches)
        for op in self._sides(stage, shards)[1]:
            for name, seconds in self._pricer(plan.precision).op_seconds(op, None, shards).forward.items():
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

    def _stage(self, plan: Plan, index: int) -> StageCost:
        stage = plan.stages[index]
        prices = self._prices(plan, stage)
        breakdown = self.breakdown(plan, index)
        tables = (*breakdown.compute.values(), *breakdown.collectives.values())
        forward_s, backward_s = sum(f for f, _ in tables), sum(b for _, b in tables)
        pricer = self._pricer(plan.precision)
        memory = stage_memory(self.graph, pricer.local, plan, index, prices, self.constants)
        if plan.microbatches > 1:
            size = 3.0 * sum(memory.local_bytes.values())
            kernel = Kernel("pointwise", size, size, "")
            backward_s += kernel_s(self.cluster.device, kernel, True, self.corrections, self.constants)
        traffic = self._data_traffic(stage, prices, memory, backward_s)
        send_s, boundary_bytes = self._send(plan, index, prices[-1][1].memory.output_bytes)
        once_s = self.constants.step_s if self._asynchronous and self._first_of_group(plan, index) else 0.0
        factor = self.corrections.memory
        return StageCost(
            forward_s=forward_s + traffic.forward_s,
            backward_s=backward_s + traffic.backward_s,
            prologue_s=self._prologue(stage, plan.microbatches, plan.precision) + once_s,
            send_s=send_s,
            boundary_bytes=boundary_bytes,
            reduce_s=traffic.reduce_s,
            reduce_overlap_s=traffic.reduce_overlap_s,
            reduce_model_s=self._model_reduction(plan, index, prices) + traffic.after_s,
            optimizer_s=optimizer_s(
                self.cluster.device,
                (4.0 * count for count in memory.held_elements.values()),
                self.corrections,
                self.constants,
            ),
            parameter_bytes=memory.parameter_bytes,
            gradient_bytes=memory.gradient_bytes,
            optimizer_bytes=memory.optimizer_bytes,
            unsharded_bytes=memory.unsharded_bytes,
            activation_bytes=int(memory.activation_bytes * factor),
            forward_peak_bytes=int(memory.forward_peak_bytes * factor),
            backward_peak_bytes=int(memory.backward_peak_bytes * factor),
        )

    # -- blocks

    def _prices(self, plan: Plan, stage: Stage) -> list[tuple[Block, _BlockPrice]]:
        setting = _Setting(
            stage_parts(stage, plan.microbatches), stage.ranks[: stage.tensor], plan.microbatches > 1, plan.precision
        )
        blocks = self.graph.blocks[stage.start : stage.stop]
        layouts = [found[0] if found else None for found in plan.layouts_of(stage)]
        return [(b, self._block(b, layout, setting)) for b, layout in zip(blocks, layouts, strict=True)]

    def _block(self, block: Block, layout: Layout | None, setting: _Setting) -> _BlockPrice:
        key = (block.kind, self._layout_number(layout), *setting.key(self.cluster))
        if key not in self._blocks:
            self._blocks[key] = self._price_block(block, layout, setting)
        return self._blocks[key]

    def _price_block(self, block: Block, layout: Layout | None, setting: _Setting) -> _BlockPrice:
        pricer = self._pricer(setting.precision)
        degree = len(setting.tensor_ranks)
        key = (block.kind, self._layout_number(layout), setting.shards, degree, setting.accumulate, setting.precision)
        if key not in self._flows:
            self._flows[key] = self._flow(block, layout, setting, pricer)
        steps, memory, summed = self._flows[key]
        at_rest = frozenset(block.parameters)
        seconds = pricer.block_seconds(steps, setting.shards, setting.tensor_ranks, at_rest)
        return _BlockPrice(seconds, memory, summed)

    def _flow(
        self, block: Block, layout: Layout | None, setting: _Setting, pricer: Pricer
    ) -> tuple[tuple[Step, ...], BlockMemory, float]:
        """The steps of a block, its memory, and the bytes of gradients that are summed over the model axis."""
        steps = block_flow(self.graph, block, (layout,) if layout else (), setting.shards.numerator)
        places = [[None] * len(block.inputs), [None] * len(block.parameters)]
        if layout is not None:
            places = [[parse_placement(t) for t in tokens] for tokens in (layout.inputs, layout.parameters)]
        local = pricer.local(setting.shards)
        degree = len(setting.tensor_ranks)
        view = BlockView(self.graph, block, steps, local, degree, pricer.storages, tuple(places[0]), tuple(places[1]))
        memory = block_memory(view, setting.accumulate)
        return steps, memory, self._summed_bytes(block, steps, layout, local.size_bytes)

    def _summed_bytes(self, block: Block, steps: tuple[Step, ...], layout: Layout | None, size) -> float:
        """Bytes of parameters whose gradients are summands on the model axis, to be reduced once per step."""
        if layout is None:
            return 0.0
        rest = dict(zip(block.parameters, map(parse_placement, layout.parameters), strict=True))
        summed = {name for name, place in rest.items() if place == SHARED}
        for step in steps:
            have, want = getattr(step, "have", None), getattr(step, "want", None)
            if have is not None and step.tensor in rest and conversion(have, want).backward == "all_reduce":
                summed.add(step.tensor)
        return float(sum(size(name) for name in summed if self.graph.tensors[name].requires_grad))

    def _layout_number(self, layout: Layout | None) -> int:
        """Layouts are long tuples of strings; a search asks with the same objects again and again."""
        if layout is None:
            return -1
        found = self._layout_ids.get(id(layout))
        if found is None or found[0] is not layout:
            number = self._layouts.setdefault(layout, len(self._layouts))
            found = self._layout_ids[id(layout)] = (layout, number)
        return found[1]

    def _key(self, plan: Plan, stage: Stage) -> tuple:
        layouts = tuple(self._layout_number(plan.layouts[i]) for row in stage.layouts for i in row)
        return (
            stage.start, stage.stop, layouts, stage.data, stage.axes, plan.microbatches, stage.recompute, stage.zero,
            stage.zero_group, stage.shares, plan.precision, plan.offload,
        )  # fmt: skip

    # -- communication outside blocks

    def _data_traffic(
        self, stage: Stage, prices: list[tuple[Block, _BlockPrice]], memory: StageMemory, backward_s: float
    ) -> DataTraffic:
        if stage.data == 1:
            return DataTraffic()
        overlap = self.cluster.link(stage.ranks[:: stage.tensor]).overlap
        if self._asynchronous:
            overlap = min(1.0, overlap * (self.constants.gather_overlap if stage.zero == 3 else self.constants.overlap))
        loads = []
        for (block, price), recompute in zip(prices, stage.block_recompute, strict=True):
            f, b = price.passes(recompute)[2]
            sizes = dict(zip(block.parameters, price.memory.parameter_bytes, strict=True))
            trained = sum(size for name, size in sizes.items() if self.graph.tensors[name].requires_grad)
            loads.append(BlockLoad(sum(sizes.values()), trained * self._reduced_share(), f, b))
        if stage.zero != 3:
            # Parameters that several blocks of the stage use are reduced once, and everything hides behind the whole.
            trained = sum(memory.trainable_bytes.values()) * self._reduced_share()
            loads = [BlockLoad(sum(memory.local_bytes.values()), trained, 0.0, backward_s)]
        return data_traffic(stage, loads, overlap, self.constants, self._collective_s)

    def _reduced_share(self) -> float:
        """Bytes of a gradient as it is reduced, per byte of its parameter as used."""
        return self.constants.reduced_bytes / 2.0 if self.constants.reduced_bytes and self._asynchronous else 1.0

    def _collective_s(self, kind: str, size_bytes: float, ranks: tuple[int, ...]) -> float:
        return collective_s(self.cluster, kind, size_bytes, ranks, self.corrections, self.constants)

    def _model_reduction(self, plan: Plan, index: int, prices: list[tuple[Block, _BlockPrice]]) -> float:
        """Gradients summed once per step over the model axis, and over the stages that share a parameter."""
        stage = plan.stages[index]
        seconds = 0.0
        summed = sum(price.shared_bytes for _, price in prices)
        if summed:
            ranks = stage.ranks[: stage.tensor]
            seconds += self._collective_s("all_reduce", summed, ranks)
        for name in self._ties(stage):
            holders = tuple(
                s.ranks[0]
                for s in plan.stages
                if any(name in b.parameters for b in self.graph.blocks[s.start : s.stop])
            )
            block, price = next((b, p) for b, p in prices if name in b.parameters)
            size = price.memory.parameter_bytes[block.parameters.index(name)]
            seconds += self._collective_s("all_reduce", size, holders)
        return seconds

    def _ties(self, stage: Stage) -> tuple[str, ...]:
        inside = {name for block in self.graph.blocks[stage.start : stage.stop] for name in block.parameters}
        return tuple(name for name in self.graph.shared_parameters if name in inside)

    def _send(self, plan: Plan, index: int, output_bytes: tuple[int, ...]) -> tuple[float, int]:
        """Seconds and bytes of one microbatch's boundary, per rank of the side that holds more of it."""
        if index + 1 >= len(plan.stages):
            return 0.0, 0
        stage, following = plan.stages[index], plan.stages[index + 1]
        sent = sum(output_bytes)
        received = sent * stage.data // following.data
        size = max(sent, received)
        ranks = (stage.ranks[0], following.ranks[0])
        return self._collective_s("send", size, ranks), size

    # -- side ops

    def _prologue(self, stage: Stage, microbatches: int, precision: str) -> float:
        """Batch-wide values, microbatch by microbatch, and their all-reduce over data."""
        shards = stage_parts(stage, microbatches)
        ops, _ = self._sides(stage, shards)
        pricer = self._pricer(precision)
        seconds = microbatches * sum(sum(pricer.op_seconds(op, None, shards).forward.values()) for op in ops)
        if ops:
            seconds += self._collective_s("all_reduce", 8, stage.ranks[:: stage.tensor])
        return seconds

    def _sides(self, stage: Stage, shards: Parts) -> tuple[list[Op], list[Op]]:
        """(prologue ops, side ops per microbatch) that the stage's blocks need."""
        key = (stage.start, stage.stop, shards)
        if key not in self._side_ops:
            blocks = self.graph.blocks[stage.start : stage.stop]
            read = set().union(*(self._read_by(block) for block in blocks))
            whole = set(batch_layout(self.graph, shards.numerator).prologue)
            every = self._ancestors(read, frozenset())
            prologue = self._ancestors({t for op in every for t in op.outputs if t in whole}, frozenset())
            self._side_ops[key] = (prologue, self._ancestors(read - whole, frozenset(whole)))
        return self._side_ops[key]

    def _read_by(self, block: Block) -> frozenset[str]:
        """What a block reads of the side ops."""
        if block.index not in self._reads:
            side, producer = self.graph.side_ops, self.graph.producer
            inputs = (name for op in self.graph.block_ops(block) for name in op.inputs)
            self._reads[block.index] = frozenset(n for n in inputs if n in producer and producer[n].name in side)
        return self._reads[block.index]

    def _ancestors(self, wanted: set[str], stop: frozenset[str]) -> list[Op]:
        """The side ops that lead to `wanted`, not going past `stop`."""
        found: set[str] = set()
        todo = list(wanted)
        while todo:
            op = self.graph.producer.get(todo.pop())
            if op is not None and op.name in self.graph.side_ops and op.name not in found:
                found.add(op.name)
                todo += [name for name in op.inputs if name not in stop]
        return [op for op in self._side_order if op.name in found]
