"""One stage of a plan on one rank, compiled: what it computes per microbatch, and which tensors it needs for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Block, Graph, Op
from ..plan import Layout, Plan, Recompute, Stage
from ..sharding.batch import BatchLayout, batch_layout
from ..sharding.flow import Convert, block_flow
from ..sharding.local import local_shape
from ..sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split, parse_placement
from .axis import Axis
from .rewrite import Rewriter
from .transport import TensorSpec

BlockFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class CompiledBlock:
    """function(chunk, parameters, activations, sides) -> outputs, in training and in evaluation.

    recompute: what `call_block` computes again in the backward."""

    block: Block
    parameters: tuple[tuple[str, Placement], ...]
    reduced: frozenset[str]
    inputs: tuple[str, ...]
    sides: tuple[str, ...]
    outputs: tuple[str, ...]
    training: BlockFunction
    evaluation: BlockFunction
    recompute: Recompute = "none"


@dataclass(frozen=True, eq=False)
class CompiledStage:
    """blocks, in order; `reduced` of a block are the parameters whose gradient is a summand per rank of the model axis.

    sides: side tensors that the blocks read, made per microbatch by `side_function(chunk, batch, whole)`.
    whole: values of the prologue; `prologue_function(chunk, batch, ())` gives one microbatch's summands of them
    (`pending`: which of them are summands over microbatches and data).
    prologue_batch, side_batch: the batch inputs, buffers and constants that the two functions read.
    receives, sends: what crosses the stage's boundaries; specs: its local shapes and dtypes.
    batch_splits: for every batch input, whether its rows are cut over data and time.
    """

    index: int
    blocks: tuple[CompiledBlock, ...]
    whole: tuple[str, ...]
    pending: tuple[bool, ...]
    prologue_batch: tuple[str, ...]
    prologue_function: BlockFunction | None
    side_batch: tuple[str, ...]
    sides: tuple[str, ...]
    side_function: BlockFunction
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    specs: Mapping[str, TensorSpec]
    batch_splits: Mapping[str, bool]


def compile_stage(graph: Graph, plan: Plan, index: int, tensor_axis: Axis, device: torch.device) -> CompiledStage:
    """Rewrite the blocks of stage `index` for the rank whose model axis is `tensor_axis`."""
    stage = plan.stages[index]
    shards = stage.data * plan.microbatches
    batch = batch_layout(graph, shards)
    rewriter = Rewriter(graph, batch, shards, tensor_axis if stage.tensor > 1 else None, device)
    evaluation = Rewriter(graph, batch, shards, rewriter.model_axis, device, training=False)
    layouts = stage_layouts(plan, stage)
    members = graph.blocks[stage.start : stage.stop]
    # A replicated parameter used by a split op gets one summand of its gradient per rank. The reduction is linear in
    # the uses, so such a parameter enters every block as SHARED, which defers it to the end of the step.
    reduced = {
        t for block, layout in zip(members, layouts, strict=True) for t in _used_shared(graph, block, layout, shards)
    }
    blocks = [
        _compile_block(
            graph, block, layout, frozenset(reduced.intersection(block.parameters)), rewriter, evaluation, recompute
        )
        for block, layout, recompute in zip(members, layouts, stage.block_recompute, strict=True)
    ]
    sides = tuple(dict.fromkeys(t for block in blocks for t in block.sides))
    whole, prologue_ops = _prologue(graph, batch, sides)
    side_ops = _ancestors(graph, sides, stop=whole)
    side_batch = _leaves(graph, side_ops, sides, stop=whole)
    prologue_batch = _leaves(graph, prologue_ops, whole, stop=())
    prologue_function = None
    pending: tuple[bool, ...] = ()
    if whole:
        pending = tuple(batch.placements[t] == PARTIAL for t in whole)
        prologue_function = rewriter.sides("prologue", prologue_ops, prologue_batch, (), whole)
    first, last = blocks[0], blocks[-1]
    receives = first.inputs if index > 0 else ()
    sends = last.outputs if index < len(plan.stages) - 1 else ()
    tokens: dict[str, Placement] = {}
    for names, layout, side in ((receives, layouts[0], "inputs"), (sends, layouts[-1], "outputs")):
        places = getattr(layout, side) if layout else ["R"] * len(names)
        tokens.update(zip(names, map(parse_placement, places), strict=False))
    specs = {
        name: (
            local_shape(graph.tensors[name].shape, [(batch.placements[name], shards), (place, stage.tensor)]),
            graph.tensors[name].dtype,
        )
        for name, place in tokens.items()
    }
    return CompiledStage(
        index=index,
        blocks=tuple(blocks),
        whole=whole,
        pending=pending,
        prologue_batch=prologue_batch,
        prologue_function=prologue_function,
        side_batch=side_batch,
        sides=sides,
        side_function=rewriter.sides("sides", side_ops, side_batch, whole, sides),
        receives=receives,
        sends=sends,
        specs=specs,
        batch_splits={t: isinstance(batch.placements[t], Split) for t in graph.inputs},
    )


def stage_layouts(plan: Plan, stage: Stage) -> list[Layout | None]:
    """The layout of every block of a stage on its one model axis; None where there is no such axis."""
    return [layouts[0] if layouts else None for layouts in plan.layouts_of(stage)]


def _compile_block(
    graph: Graph,
    block: Block,
    layout: Layout | None,
    reduced: frozenset[str],
    training: Rewriter,
    evaluation: Rewriter,
    recompute: Recompute,
) -> CompiledBlock:
    steps = block_flow(graph, block, layout, training.shards)
    at_rest = [REPLICATED] * len(block.parameters)
    arriving = [REPLICATED] * len(block.inputs)
    leaving = [REPLICATED] * len(block.outputs)
    if layout is not None:
        at_rest = [parse_placement(t) for t in layout.parameters]
        arriving = [parse_placement(t) for t in layout.inputs]
        leaving = [parse_placement(t) for t in layout.outputs]
    parameters = tuple(zip(block.parameters, at_rest, strict=True))
    inputs = tuple(zip(block.inputs, arriving, strict=True))
    outputs = list(zip(block.outputs, leaving, strict=True))
    produced = {t for op in graph.block_ops(block) for t in op.outputs}
    if graph.loss in produced:
        outputs = [(t, p) for t, p in outputs if t != graph.loss] + [(graph.loss, REPLICATED)]
    own = {*block.inputs, *block.parameters, *produced}
    read = (t for op in graph.block_ops(block) for t in op.inputs)
    sides = tuple(dict.fromkeys(t for t in read if t not in own))
    entering = [(t, SHARED if t in reduced else p) for t, p in parameters]
    name, keeps = f"block{block.index}", recompute == "selective"
    return CompiledBlock(
        block=block,
        parameters=parameters,
        reduced=reduced,
        inputs=block.inputs,
        sides=sides,
        outputs=tuple(t for t, _ in outputs),
        training=training.block(name, steps, entering, inputs, sides, outputs, keeps),
        evaluation=evaluation.block(name, steps, entering, inputs, sides, outputs, keeps),
        recompute=recompute,
    )


def _used_shared(graph: Graph, block: Block, layout: Layout | None, shards: int) -> list[str]:
    """Parameters of the block that are replicated at rest and used as SHARED."""
    if layout is None:
        return []
    at_rest = dict(zip(block.parameters, layout.parameters, strict=True))
    return [
        step.tensor
        for step in block_flow(graph, block, layout, shards)
        if isinstance(step, Convert) and step.want == SHARED and at_rest.get(step.tensor) == str(REPLICATED)
    ]


def _prologue(graph: Graph, batch: BatchLayout, sides: Sequence[str]) -> tuple[tuple[str, ...], list[Op]]:
    """The prologue values that `sides` need, and the ops that make them."""
    needed = {t for op in _ancestors(graph, sides, stop=()) for t in op.outputs} | set(sides)
    whole = tuple(t for t in batch.prologue if t in needed)
    return whole, _ancestors(graph, whole, stop=())


def _ancestors(graph: Graph, wanted: Sequence[str], stop: Sequence[str]) -> list[Op]:
    """The side ops that compute `wanted` from batch inputs, state and the values in `stop`, in order."""
    found: set[str] = set()
    todo = [t for t in wanted if t not in stop]
    while todo:
        op = graph.producer.get(todo.pop())
        if op is not None and op.name not in found:
            found.add(op.name)
            todo.extend(t for t in op.inputs if t not in stop)
    return [op for op in graph.ops if op.name in found]


def _leaves(graph: Graph, ops: Sequence[Op], wanted: Sequence[str], stop: Sequence[str]) -> tuple[str, ...]:
    """Batch inputs, buffers and constants that `ops` read or that are wanted themselves."""
    read = [t for op in ops for t in op.inputs] + list(wanted)
    return tuple(dict.fromkeys(t for t in read if t not in graph.producer and t not in stop))
