"""Layouts by name: Megatron's tensor parallelism, with or without its sequence parallelism, built op by op.

Column and row parallel products: Shoeybi et al. 2019, Megatron-LM, section 3; sequence parallelism: Korthikanti et al.
2022, "Reducing activation recomputation in large transformer models", section 4.2.2. Searches find these layouts by
themselves where they are best; by name they are for rebuilding what others have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..graph import Block, Graph, Op
from ..plan import Layout
from .placement import PARTIAL, REPLICATED, Placement, Split
from .strategies import strategies
from .strategy import Strategy

Options = Callable[[Op], Sequence[Strategy]]


def megatron_layouts(
    graph: Graph, degree: int, *, sequence: bool, shards: int = 1, options: Options | None = None
) -> tuple[Layout, ...]:
    """One layout per block: column and row parallel products, vocabulary-parallel embedding and loss.

    sequence: between a row parallel and the next column parallel product everything is split along the sequence.
    shards: data degree x microbatches. options: the strategies of an op, by default all that there are.
    The walk decides op by op: a product of something whole is split by column, a product of something that a product
    has split is split by row, other ops that read something split by a product follow it, and what is left is whole or
    split along the sequence. ValueError where a model has no such layout: an op that none of its strategies fits.
    """
    options = options or (lambda op: strategies(graph, op, degree, shards))
    by_kind: dict[int, tuple[Strategy, ...]] = {}
    layouts = []
    for block in graph.blocks:
        if block.kind not in by_kind:
            inside: dict[str, Placement] = {}  # what a column parallel product has split, and what follows from it
            by_kind[block.kind] = tuple(
                _choose(graph, op, options(op), sequence, inside) for op in graph.block_ops(block)
            )
        chosen = by_kind[block.kind]
        edge = str(Split(1)) if sequence else str(REPLICATED)
        layouts.append(
            Layout(
                degree,
                tuple(strategy.key for strategy in chosen),
                tuple(edge for _ in block.inputs),
                tuple(edge for _ in block.outputs),
                tuple(str(_at_rest(graph, block, chosen, name)) for name in block.parameters),
            )
        )
    return tuple(layouts)


def _choose(
    graph: Graph, op: Op, options: Sequence[Strategy], sequence: bool, inside: dict[str, Placement]
) -> Strategy:
    """The strategy of one op; `inside` learns what a product has split."""
    roles = [graph.tensors[name].role for name in op.inputs]
    weight = next(
        (i for i, n in enumerate(op.inputs) if roles[i] == "parameter" and len(graph.tensors[n].shape) > 1), -1
    )
    split = {i: inside[name] for i, name in enumerate(op.inputs) if name in inside}

    def follows(strategy: Strategy) -> bool:
        return all(strategy.inputs[i] == placement for i, placement in split.items())

    if op.target.startswith("aten.embedding.") and roles[1] == "input":
        return _first(op, (s for s in options if s.inputs[0] == Split(0)))
    if op.target.startswith(("aten.linear.", "aten.addmm.")) and weight >= 0:
        if split:
            return _first(op, (s for s in options if s.outputs[0] == PARTIAL and follows(s)))
        columns = [s for s in options if isinstance(s.inputs[weight], Split) and s.outputs[0] != PARTIAL]
        fused = [s for s in columns if s.inputs[weight].blocks == 3]
        strategy = _first(op, fused or columns)
    elif split:
        strategy = _first(op, (s for s in options if follows(s)))
    else:
        along = [s for s in options if s.outputs[0] in (Split(1), Split(0, graph.batch_size))]
        flat = [s for s in along if len(graph.tensors[op.outputs[0]].shape) > 2 or s.outputs[0] != Split(1)]
        return flat[0] if sequence and flat else options[0]
    inside.update((n, p) for n, p in zip(op.outputs, strategy.outputs, strict=True) if isinstance(p, Split))
    return strategy


def _first(op: Op, found) -> Strategy:
    for strategy in found:
        return strategy
    raise ValueError(
        f"op {op.name} ({op.target}) has no strategy that Megatron's layout needs; is the degree too high?"
    )


def _at_rest(graph: Graph, block: Block, chosen: Sequence[Strategy], parameter: str) -> Placement:
    for op, strategy in zip(graph.block_ops(block), chosen, strict=True):
        for name, placement in zip(op.inputs, strategy.inputs, strict=True):
            if name == parameter and isinstance(placement, Split):
                return placement
    return REPLICATED
