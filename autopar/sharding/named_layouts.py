"""Layouts by name: Megatron's tensor parallelism, with or without its sequence parallelism, and context parallelism, built
op by op.

Column and row parallel products: Shoeybi et al. 2019, Megatron-LM, section 3; sequence parallelism: Korthikanti et al.
2022, "Reducing activation recomputation in large transformer models", section 4.2.2. Context parallelism: Jacobs et al.
2023, DeepSpeed Ulysses, section 3. Searches find these layouts by
themselves where they are best; by name they are for rebuilding what others have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


def context_layouts(graph: Graph, degree: int, *, shards: int = 1, gathered: bool = True) -> tuple[Layout, ...]:
    """One layout per block: everything split along the sequence, but attention over heads, for which it is exchanged.

    So the parts of a causal attention are equal, as they are not where each rank keeps its queries. Grouped keys and
    values are gathered, and queries alone exchanged, which leaves the groups to a tensor axis. Block edges are split on
    dim 1. gathered: parameters lie split and are gathered where they are used, as ZeRO 3 has them on data ranks.
    ValueError where an op has no strategy along the sequence.
    """
    by_kind: dict[int, tuple[Strategy, ...]] = {}
    layouts = []
    edge = Split(1)
    for block in graph.blocks:
        if block.kind not in by_kind:
            # Where the sequence is in each tensor; batch inputs have it where block edges do.
            along = dict.fromkeys(block.inputs, edge) | dict.fromkeys(graph.inputs, edge)
            by_kind[block.kind] = tuple(
                _along_sequence(graph, op, strategies(graph, op, degree, shards), along)
                for op in graph.block_ops(block)
            )
        chosen = by_kind[block.kind]
        rest = [_split_at_rest(graph, name, degree) if gathered else REPLICATED for name in block.parameters]
        layouts.append(
            Layout(
                degree,
                tuple(strategy.key for strategy in chosen),
                tuple(str(edge) for _ in block.inputs),
                tuple(str(REPLICATED if name == graph.loss else edge) for name in block.outputs),
                tuple(map(str, rest)),
            )
        )
    return tuple(layouts)


def _along_sequence(graph: Graph, op: Op, options: Sequence[Strategy], along: dict[str, Placement]) -> Strategy:
    """The strategy of one op; `along` learns where its results have the sequence."""
    known = {i: along[name] for i, name in enumerate(op.inputs) if name in along}
    if not known:
        return options[0]
    follows = (s for s in options if s.degree > 1 and not s.special and all(s.inputs[i] == p for i, p in known.items()))
    if op.target.startswith("aten.scaled_dot_product_attention."):
        heads = len(graph.tensors[op.outputs[0]].shape) - 3
        over_heads = [
            s for s in options if s.degree > 1 and isinstance(s.inputs[0], Split) and s.inputs[0].dim == heads
        ]
        over_heads.sort(key=lambda s: isinstance(s.inputs[1], Split))
        along[op.outputs[0]] = known[0]
        return _first(op, over_heads, "context parallelism")
    strategy = _first(op, follows, "context parallelism")
    along.update((n, p) for n, p in zip(op.outputs, strategy.outputs, strict=True) if isinstance(p, Split))
    return strategy


def _split_at_rest(graph: Graph, parameter: str, degree: int) -> Placement:
    return REPLICATED if graph.tensors[parameter].shape[0] % degree else Split(0)


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


def _first(op: Op, found: Iterable[Strategy], name: str = "Megatron's layout") -> Strategy:
    for strategy in found:
        return strategy
    raise ValueError(f"op {op.name} ({op.target}) has no strategy that {name} needs; is the degree too high?")


def _at_rest(graph: Graph, block: Block, chosen: Sequence[Strategy], parameter: str) -> Placement:
    for op, strategy in zip(graph.block_ops(block), chosen, strict=True):
        for name, placement in zip(op.inputs, strategy.inputs, strict=True):
            if name == parameter and isinstance(placement, Split):
                return placement
    return REPLICATED
