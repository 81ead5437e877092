"""One stage of a plan on one rank, compiled: what it computes per microbatch, and which tensors it needs for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Block, Graph, Op
from ..plan import Layout, Plan, Recompute
from ..schedule.orders import schedule_named
from ..sharding.axes import Places
from ..sharding.batch import BatchLayout, batch_layout
from ..sharding.flow import Run, block_flow, layout_places
from ..sharding.placement import PARTIAL, REPLICATED, SHARED, Split
from ..sharding.rows import Rows, rows_of, stage_shares, stage_units
from .axis import Axis
from .boundary import Handover, Spread
from .rewrite import Rewriter

BlockFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class CompiledBlock:
    """function(chunk, parameters, activations, sides) -> outputs, in training and in evaluation.

    parameters: with their placement at rest on each model axis.
    recompute: what `call_block` computes again in the backward.
    """

    block: Block
    parameters: tuple[tuple[str, Places], ...]
    reduced: Mapping[str, frozenset[int]]
    inputs: tuple[str, ...]
    sides: tuple[str, ...]
    outputs: tuple[str, ...]
    training: BlockFunction
    evaluation: BlockFunction
    recompute: Recompute = "none"


@dataclass(frozen=True, eq=False)
class CompiledStage:
    """blocks, in order; `reduced` of a block: the parameters whose gradient is a summand per rank, and of which model axes.

    sides: side tensors that the blocks read, made per microbatch by `side_function(chunk, batch, whole)`.
    whole: values of the prologue; `prologue_function(chunk, batch, ())` gives one microbatch's summands of them
    (`pending`: which of them are summands over microbatches and data).
    prologue_batch, side_batch: the batch inputs, buffers and constants that the two functions read.
    receives, sends: what crosses the stage's boundaries. rows: what this rank has of the batch.
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
    rows: Rows
    batch_splits: Mapping[str, bool]


def compile_stage(
    graph: Graph,
    plan: Plan,
    index: int,
    data_rank: int,
    axes: Mapping[tuple[int, ...], Axis],
    device: torch.device,
    wanted: frozenset[str] = frozenset(),
    compiled: bool = False,
) -> CompiledStage:
    """Rewrite the blocks of stage `index` for one rank. axes: its model axes by number, alone and several as one.
    wanted: outputs of the module to give out. compiled: whether torch.compile gets the blocks."""
    stage = plan.stages[index]
    rows = rows_of(plan, stage, data_rank)
    shards = rows.units
    batch = batch_layout(graph, shards)
    members = graph.blocks[stage.start : stage.stop]
    deferrable: frozenset[str] = frozenset()
    if schedule_named(plan.schedule).splits_backward:
        uses = Counter(name for block in members for name in block.parameters)
        deferrable = frozenset(name for name, count in uses.items() if count == 1)
    rewriter = Rewriter(graph, batch, rows, stage.axes, axes, device, True, deferrable, wanted, compiled)
    evaluation = Rewriter(graph, batch, rows, stage.axes, axes, device, False, wanted=wanted, compiled=compiled)
    layouts = plan.layouts_of(stage)
    # A replicated parameter used by a split op gets one summand of its gradient per rank. The reduction is linear in
    # the uses, so such a parameter enters every block as SHARED, which defers it to the end of the step.
    reduced: dict[str, frozenset[int]] = {}
    for block, of_block in zip(members, layouts, strict=True):
        for name, numbers in _used_shared(graph, block, of_block, shards).items():
            reduced[name] = reduced.get(name, frozenset()) | numbers
    blocks = [
        _compile_block(graph, block, of_block, reduced, rewriter, evaluation, recompute)
        for block, of_block, recompute in zip(members, layouts, stage.block_recompute, strict=True)
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
        receives=blocks[0].inputs if index > 0 else (),
        sends=blocks[-1].outputs if index < len(plan.stages) - 1 else (),
        rows=rows,
        batch_splits={t: isinstance(batch.placements[t], Split) for t in graph.inputs},
    )


def handovers(graph: Graph, plan: Plan, first: int) -> dict[str, Handover]:
    """What stage `first` hands to the one behind it, by tensor, in the order of `CompiledStage.sends`."""
    names = graph.blocks[plan.stages[first].stop - 1].outputs
    assert names == graph.blocks[plan.stages[first + 1].start].inputs
    sides = []
    for stage, block, side in ((plan.stages[first], -1, "outputs"), (plan.stages[first + 1], 0, "inputs")):
        on_batch = batch_layout(graph, stage_units(plan, stage)).placements
        on_model = placed(plan.layouts_of(stage)[block], side, names)
        mesh = (stage.ranks, (stage.data, *stage.axes))
        sides.append(
            [
                Spread(graph.tensors[t].shape, plan.microbatches, *mesh, (on_batch[t], *places), stage_shares(stage))
                for t, places in zip(names, on_model, strict=True)
            ]
        )
    return {t: Handover(*pair) for t, *pair in zip(names, *sides, strict=True)}


def placed(layouts: Sequence[Layout], side: str, names: Sequence[str]) -> list[Places]:
    """The placements on each model axis of a block's "inputs", "outputs" or "parameters", which are `names`."""
    return layout_places(layouts, side) if layouts else [()] * len(names)


def _compile_block(
    graph: Graph,
    block: Block,
    layouts: Sequence[Layout],
    reduced: Mapping[str, frozenset[int]],
    training: Rewriter,
    evaluation: Rewriter,
    recompute: Recompute,
) -> CompiledBlock:
    steps = block_flow(graph, block, layouts, training.rows.units)
    parameters = tuple(zip(block.parameters, placed(layouts, "parameters", block.parameters), strict=True))
    inputs = tuple(zip(block.inputs, placed(layouts, "inputs", block.inputs), strict=True))
    outputs = list(zip(block.outputs, placed(layouts, "outputs", block.outputs), strict=True))
    produced = {t for op in graph.block_ops(block) for t in op.outputs}
    if graph.loss in produced:
        outputs = [(t, p) for t, p in outputs if t != graph.loss] + [(graph.loss, training.whole)]
    own = {*block.inputs, *block.parameters, *produced}
    read = (t for op in graph.block_ops(block) for t in op.inputs)
    sides = tuple(dict.fromkeys(t for t in read if t not in own))
    reduced = {t: reduced[t] for t in block.parameters if t in reduced}
    entering = [
        (t, tuple(SHARED if i in reduced.get(t, ()) else place for i, place in enumerate(places)))
        for t, places in parameters
    ]
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


def _used_shared(graph: Graph, block: Block, layouts: Sequence[Layout], shards: int) -> dict[str, frozenset[int]]:
    """Parameters of the block that are replicated at rest and used as SHARED, with the model axes where they are."""
    at_rest = dict(zip(block.parameters, placed(layouts, "parameters", block.parameters), strict=True))
    found: dict[str, frozenset[int]] = {}
    for step in block_flow(graph, block, layouts, shards):
        if not isinstance(step, Run):
            continue
        for name, wanted in zip(step.op.inputs, step.inputs, strict=True):
            pairs = enumerate(zip(at_rest.get(name, ()), wanted, strict=False))
            numbers = frozenset(i for i, pair in pairs if pair == (REPLICATED, SHARED))
            if numbers:
                found[name] = found.get(name, frozenset()) | numbers
    return found


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
