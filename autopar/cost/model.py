"""The cost model: seconds and bytes of every stage of a plan, from a graph, a cluster, and what was learnt.

    forward   = ops + conversions + side ops, per microbatch
    backward  = their gradients (+ the forward again under recompute) + sums of gradients over microbatches
    reduction = bucketed all-reduce over data (ZeRO 0), or per-block reduce-scatter (ZeRO 3), part of it hidden
    memory    = parameters, gradients and AdamW's two float32 moments at rest, activations by storage (cost/memory.py)

Assumed: the optimizer is AdamW. Ignored: differences between the ranks of a stage, slowdown of compute by transfers
other than what `Link.overlap` holds, and fragmentation of the allocator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..cluster.spec import Cluster
from ..graph import Block, Graph, Op
from ..plan import Layout, Plan, Stage
from ..sharding.batch import batch_layout
from ..sharding.flow import Step, block_flow
from ..sharding.placement import SHARED, Placement, conversion, parse_placement
from ..sharding.rows import Parts, stage_parts
from ..sharding.strategy import Strategy
from .block import Both, Pricer, Table, add
from .collectives import collective_s
from .compute import kernel_s, optimizer_s
from .corrections import Corrections
from .kernels import Kernel
from .memory import BlockMemory, BlockView, block_memory
from .stage_memory import StageMemory, stage_memory
from .types import StageCost

# DistributedDataParallel's default bucket (Li et al., VLDB 2020, section 3.2).
BUCKET_BYTES = 25 * 2**20

# AdamW keeps two moments in float32 per parameter element.
OPTIMIZER_BYTES_PER_ELEMENT = 8


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Predicted seconds of one microbatch: (forward, backward) by compute class, and by "<link>/<collective>"."""

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

    def key(self, cluster: Cluster) -> tuple:
        return self.shards, len(self.tensor_ranks), cluster.crosses_hosts(self.tensor_ranks), self.accumulate


@dataclass(frozen=True, slots=True)
class _BlockPrice:
    compute: Mapping[str, Both]
    collectives: Mapping[str, Both]
    memory: BlockMemory
    shared_bytes: float


class CostModel:
    """Prices of `graph` on `cluster`. Not thread-safe: answers are remembered."""

    def __init__(self, graph: Graph, cluster: Cluster, corrections: Corrections | None = None) -> None:
        self.graph, self.cluster = graph, cluster
        self.corrections = corrections or Corrections()
        self._pricer = Pricer(graph, cluster, self.corrections)
        self._layouts: dict[Layout, int] = {}
        self._layout_ids: dict[int, tuple[Layout, int]] = {}
        self._blocks: dict[tuple, _BlockPrice] = {}
        self._stages: dict[tuple, StageCost] = {}
        self._side_ops: dict[tuple, tuple[list[Op], list[Op]]] = {}
        self._reads: dict[int, frozenset[str]] = {}
        self._side_order = tuple(op for op in graph.ops if op.name in graph.side_ops)

    # -- ops and conversions

    def op_s(self, op: Op, strategy: Strategy | None, *, shards: int) -> Both:
        """(forward, backward) seconds of `op` for one microbatch on one rank, with its inner collectives.

        shards: data degree x microbatches, which cut the batch. Inner collectives are priced within a host.
        """
        forward, backward = self._pricer.op_seconds(op, strategy, shards)
        inner_s = 0.0
        if strategy is not None and strategy.collective_bytes:
            ranks = tuple(range(min(max(2, strategy.degree), self.cluster.world_size)))
            inner_s = self._pricer.inner_collective(op, strategy, shards, ranks)
        return sum(forward.values()) + inner_s, sum(backward.values())

    def compute_class(self, op: Op) -> str:
        """The class of cluster/rates.py in which the op spends most of its forward; "view" where it spends nothing."""
        seconds, _ = self._pricer.op_seconds(op, None, 1)
        return max(seconds, key=lambda name: seconds[name], default="view")

    def conversion_s(
        self, tensor: str, have: Placement, want: Placement, *, shards: int, ranks: tuple[int, ...]
    ) -> Both:
        """(forward, backward) seconds of turning `tensor` from `have` into `want` on the axis of global `ranks`."""
        forward, backward, size = self._pricer.conversion_actions(tensor, have, want, shards)
        forward_s = sum(self._pricer.action_seconds(*forward, size, ranks, False))
        return forward_s, sum(self._pricer.action_seconds(*backward, size, ranks, True)) if backward else 0.0

    # -- stages

    def stage(self, plan: Plan, index: int) -> StageCost:
        """The cost of stage `index` of `plan`."""
        stage = plan.stages[index]
        following = plan.stages[index + 1] if index + 1 < len(plan.stages) else None
        key = (
            self._key(plan, stage),
            stage.ranks,
            index > 0,
            (following.ranks, following.data, following.tensor) if following else None,
            tuple((s.start, s.stop, s.ranks) for s in plan.stages) if self._ties(stage) else None,
        )
        if key not in self._stages:
            self._stages[key] = self._stage(plan, index)
        return self._stages[key]

    def breakdown(self, plan: Plan, index: int) -> Breakdown:
        """Where the seconds of one microbatch of stage `index` go; the recomputed forward is in the backward's."""
        stage = plan.stages[index]
        compute: Table = {}
        collectives: Table = {}
        for (_, price), recompute in zip(self._prices(plan, stage), stage.block_recompute, strict=True):
            for table, part in ((compute, price.compute), (collectives, price.collectives)):
                for name, (forward_s, backward_s) in part.items():
                    add(table, name, forward_s, backward_s + (forward_s if recompute == "full" else 0.0))
        parts = stage_parts(stage, plan.microbatches)
        for op in self._sides(stage, parts)[1]:
            for name, seconds in self._pricer.op_seconds(op, None, parts)[0].items():
                add(compute, name, seconds, 0.0)
        return Breakdown(compute, collectives)

    def _stage(self, plan: Plan, index: int) -> StageCost:
        stage = plan.stages[index]
        prices = self._prices(plan, stage)
        breakdown = self.breakdown(plan, index)
        tables = (*breakdown.compute.values(), *breakdown.collectives.values())
        forward_s, backward_s = sum(f for f, _ in tables), sum(b for _, b in tables)
        memory = stage_memory(self.graph, self._pricer.local, plan, index, prices, OPTIMIZER_BYTES_PER_ELEMENT)
        if plan.microbatches > 1:
            size = 3.0 * sum(memory.local_bytes.values())
            backward_s += kernel_s(self.cluster.device, Kernel("pointwise", size, size, ""), True, self.corrections)
        data_ranks = stage.ranks[:: stage.tensor]
        reduce_s = reduce_overlap_s = 0.0
        if stage.data > 1 and stage.zero == 0:
            reduce_s, reduce_overlap_s = self._replicated_reduction(memory, data_ranks, backward_s)
        elif stage.data > 1:
            exposed_forward_s, exposed_backward_s, reduce_s, reduce_overlap_s = self._sharded_transfers(
                prices, data_ranks, stage
            )
            forward_s += exposed_forward_s
            backward_s += exposed_backward_s
        send_s, boundary_bytes = self._send(plan, index, prices[-1][1].memory.output_bytes)
        factor = self.corrections.memory
        return StageCost(
            forward_s=forward_s,
            backward_s=backward_s,
            prologue_s=self._prologue(stage, plan.microbatches),
            send_s=send_s,
            boundary_bytes=boundary_bytes,
            reduce_s=reduce_s,
            reduce_overlap_s=reduce_overlap_s,
            reduce_model_s=self._model_reduction(plan, index, prices),
            optimizer_s=optimizer_s(
                self.cluster.device,
                (b / (stage.data if stage.zero == 3 else 1) for b in memory.local_bytes.values()),
                self.corrections,
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
        setting = _Setting(stage_parts(stage, plan.microbatches), stage.ranks[: stage.tensor], plan.microbatches > 1)
        blocks = self.graph.blocks[stage.start : stage.stop]
        layouts = [found[0] if found else None for found in plan.layouts_of(stage)]
        return [(b, self._block(b, layout, setting)) for b, layout in zip(blocks, layouts, strict=True)]

    def _block(self, block: Block, layout: Layout | None, setting: _Setting) -> _BlockPrice:
        key = (block.kind, self._layout_number(layout), *setting.key(self.cluster))
        if key not in self._blocks:
            self._blocks[key] = self._price_block(block, layout, setting)
        return self._blocks[key]

    def _price_block(self, block: Block, layout: Layout | None, setting: _Setting) -> _BlockPrice:
        steps = block_flow(self.graph, block, layout, setting.shards.numerator)
        places = [[None] * len(block.inputs), [None] * len(block.parameters)]
        if layout is not None:
            places = [[parse_placement(t) for t in tokens] for tokens in (layout.inputs, layout.parameters)]
        local = self._pricer.local(setting.shards)
        degree = len(setting.tensor_ranks)
        at_rest = frozenset(block.parameters)
        seconds = self._pricer.block_seconds(steps, setting.shards, setting.tensor_ranks, at_rest)
        view = BlockView(
            self.graph, block, steps, local, degree, self._pricer.storages, tuple(places[0]), tuple(places[1])
        )
        return _BlockPrice(
            seconds.compute,
            seconds.collectives,
            block_memory(view, setting.accumulate),
            self._summed_bytes(block, steps, layout, local.size_bytes),
        )

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
            stage.shares,
        )  # fmt: skip

    # -- communication outside blocks

    def _replicated_reduction(self, memory: StageMemory, ranks: tuple[int, ...], backward_s: float) -> Both:
        """(seconds, of them hidden) of the bucketed all-reduce of all gradients."""
        size = sum(memory.trainable_bytes.values())
        buckets = max(1, round(size / BUCKET_BYTES))
        one_s = collective_s(self.cluster, "all_reduce", size / buckets, ranks, self.corrections)
        reduce_s = buckets * one_s
        # The last bucket is full only when the backward has ended, so nothing hides it.
        hidden_s = self.cluster.link(ranks).overlap * min(reduce_s - one_s, backward_s)
        return reduce_s, hidden_s

    def _sharded_transfers(
        self, prices: list[tuple[Block, _BlockPrice]], ranks: tuple[int, ...], stage: Stage
    ) -> tuple[float, float, float, float]:
        """ZeRO 3: (exposed gathers in the forward, in the backward, reduce-scatters, hidden part of those).

        Each block's parameters are gathered while the block before computes, and again in the backward; gradients are
        scattered block by block while the next block's backward runs.
        """
        overlap = self.cluster.link(ranks).overlap
        forward_s = backward_s = reduce_s = hidden_s = 0.0
        previous: _BlockPrice | None = None
        for _, price in prices:
            size = sum(price.memory.parameter_bytes)
            if size == 0:
                previous = price
                continue
            gather_s = collective_s(self.cluster, "all_gather", size, ranks, self.corrections)
            scatter_s = collective_s(self.cluster, "reduce_scatter", size, ranks, self.corrections)
            computing = [0.0, 0.0]
            if previous is not None:
                computing = [sum(pair[way] for pair in previous.compute.values()) for way in (0, 1)]
            forward_s += gather_s - overlap * min(gather_s, computing[0])
            backward_s += gather_s - overlap * min(gather_s, computing[1])
            reduce_s += scatter_s
            hidden_s += overlap * min(scatter_s, computing[1])
            previous = price
        return forward_s, backward_s, reduce_s, hidden_s

    def _model_reduction(self, plan: Plan, index: int, prices: list[tuple[Block, _BlockPrice]]) -> float:
        """Gradients summed once per step over the model axis, and over the stages that share a parameter."""
        stage = plan.stages[index]
        seconds = 0.0
        summed = sum(price.shared_bytes for _, price in prices)
        if summed:
            ranks = stage.ranks[: stage.tensor]
            seconds += collective_s(self.cluster, "all_reduce", summed, ranks, self.corrections)
        for name in self._ties(stage):
            holders = tuple(
                s.ranks[0]
                for s in plan.stages
                if any(name in b.parameters for b in self.graph.blocks[s.start : s.stop])
            )
            block, price = next((b, p) for b, p in prices if name in b.parameters)
            size = price.memory.parameter_bytes[block.parameters.index(name)]
            seconds += collective_s(self.cluster, "all_reduce", size, holders, self.corrections)
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
        return collective_s(self.cluster, "send", size, ranks, self.corrections), size

    # -- side ops

    def _prologue(self, stage: Stage, microbatches: int) -> float:
        """Batch-wide values, microbatch by microbatch, and their all-reduce over data."""
        shards = stage_parts(stage, microbatches)
        ops, _ = self._sides(stage, shards)
        seconds = microbatches * sum(sum(self._pricer.op_seconds(op, None, shards)[0].values()) for op in ops)
        if ops:
            seconds += collective_s(self.cluster, "all_reduce", 8, stage.ranks[:: stage.tensor], self.corrections)
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
