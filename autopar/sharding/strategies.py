"""`strategies(graph, op, degree)`: every way to run an op on a model axis that is worth considering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..graph import Graph, Op
from .analysis import Analysis, analysis, rule, unknown_ops, use_rules
from .batch import BatchLayout, batch_layout
from .placement import Placement, Split
from .rule import Rule, divides, partial_strategy, split_strategy, whole_strategies
from .strategy import Strategy

__all__ = ["rule", "strategies", "unknown_ops", "use_rules"]


def strategies(graph: Graph, op: Op, degree: int, shards: int = 1) -> tuple[Strategy, ...]:
    """The strategies of `op` on a model axis of `degree` ranks, "-" first; the same tuple for isomorphic blocks.

    shards: data degree x microbatches, which already cut the batch dim; every split offered also divides what is left.
    Side ops run whole on every rank of the axis, so they have "-" alone.
    Raises ValueError where `shards` does not divide the batch, or where rows of the batch meet and shards > 1.
    """
    found = analysis(graph)
    key = (found.representative[op.name], degree, shards)
    if key not in found.strategies:
        found.strategies[key] = _strategies(found, graph.op[key[0]], degree, shards)
    return found.strategies[key]


def _strategies(found: Analysis, op: Op, degree: int, shards: int) -> tuple[Strategy, ...]:
    op_rule, gradient = found.rule(op), found.gradient(op)
    whole = whole_strategies(op_rule, gradient)
    if op.name in found.graph.side_ops or degree == 1:
        return whole[:1]
    on_batch: Sequence[Placement] = ()
    cut_later: list[tuple[int, Split]] = []
    if shards > 1:
        layout = batch_layout(found.graph, shards)
        if layout.conflict:
            raise ValueError(f"{shards} parts of the batch were asked for, but {layout.conflict}")
        chosen = layout.strategies[op.name]
        on_batch = (*chosen.inputs, *chosen.outputs)
        cut_later = list(_cut_later(found.graph, op, layout))
    options = [
        split_strategy(op_rule, name, outer, degree, gradient) for name, outer in found.candidates.options[op.name]
    ]
    pending = found.candidates.pending[op.name]
    options += [partial_strategy(op_rule, group, gradient) for group in op_rule.linear if group & pending]
    fitting = [
        s
        for s in options
        if s is not None
        and _fits(op_rule, s, degree, on_batch, shards)
        and not any(s.outputs[i] == split for i, split in cut_later)
    ]
    return (*whole, *{s.key: s for s in fitting}.values())


def _cut_later(graph: Graph, op: Op, layout: BatchLayout) -> Iterator[tuple[int, Split]]:
    """Outputs that are whole on the batch axis but that some consumer cuts there, with that cut.

    Of two equal splits the batch axis makes the outer one, which cannot be had from a part that a model axis has cut.
    """
    for i, name in enumerate(op.outputs):
        for consumer in graph.consumers[name]:
            for tensor, want in zip(consumer.inputs, layout.strategies[consumer.name].inputs, strict=True):
                if tensor == name and isinstance(want, Split) and want != layout.placements[name]:
                    yield i, want


def _fits(op_rule: Rule, strategy: Strategy, degree: int, on_batch: Sequence[Placement], shards: int) -> bool:
    if not on_batch:
        return True
    placed = (*strategy.inputs, *strategy.outputs)
    return all(
        divides(shape, [(batch, shards), (model, degree)])
        for shape, batch, model in zip(op_rule.shapes, on_batch, placed, strict=True)
    )
