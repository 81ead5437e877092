"""`strategies(graph, op, degree)`: every way to run an op on a model axis that is worth considering."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..graph import Graph, Op
from .analysis import Analysis, analysis, rule, unknown_ops, use_rules
from .batch import BatchLayout, batch_layout
from .placement import REPLICATED, Placement, Split
from .rule import Rule, divides, partial_strategy, split_strategy, together_strategy, whole_strategies
from .strategy import Strategy

__all__ = ["Outer", "rule", "strategies", "unknown_ops", "use_rules"]


Outer = tuple[tuple[Strategy, int], ...]
"""The strategy of an op on each model axis outside of the one in question, and that axis's degree."""


def strategies(graph: Graph, op: Op, degree: int, shards: int = 1, outer: Outer = ()) -> tuple[Strategy, ...]:
    """The strategies of `op` on a model axis of `degree` ranks, "-" first; the same tuple for isomorphic blocks.

    shards: data degree x microbatches, which already cut the batch dim; every split offered also divides what is left.
    outer: how the op runs on the model axes before this one. What is offered then is a part of what is offered without:
    splits that divide what those leave, and no second special algorithm.
    Side ops run whole on every rank of the axis, so they have "-" alone.
    Raises ValueError where `shards` does not divide the batch, or where rows of the batch meet and shards > 1.
    """
    found = analysis(graph)
    key = (found.representative[op.name], degree, shards, outer)
    if key not in found.strategies:
        model = graph.op[key[0]]
        if outer:
            options = strategies(graph, model, degree, shards)
            on_batch = _on_batch(graph, model, shards)
            found.strategies[key] = tuple(
                s for s in options if s.degree == 1 or _fits(found.rule(model), s, degree, on_batch, shards, outer)
            )
        else:
            found.strategies[key] = _strategies(found, model, degree, shards)
    return found.strategies[key]


def _on_batch(graph: Graph, op: Op, shards: int) -> Sequence[Placement]:
    """Placements of an op's tensors on the batch axis; () where the batch is whole."""
    if shards == 1:
        return ()
    chosen = batch_layout(graph, shards).strategies[op.name]
    return (*chosen.inputs, *chosen.outputs)


def _strategies(found: Analysis, op: Op, degree: int, shards: int) -> tuple[Strategy, ...]:
    if op.name in found.graph.side_ops or degree == 1:
        return whole_strategies(found.rule(op), found.gradient(op))[:1]
    whole, options = _options(found, op, degree)
    cut_later: list[tuple[int, Split]] = []
    if shards > 1:
        layout = batch_layout(found.graph, shards)
        if layout.conflict:
            raise ValueError(f"{shards} parts of the batch were asked for, but {layout.conflict}")
        cut_later = list(_cut_later(found.graph, op, layout))
    on_batch = _on_batch(found.graph, op, shards)
    op_rule = found.rule(op)
    fitting = [
        s
        for s in options
        if _fits(op_rule, s, degree, on_batch, shards) and not any(s.outputs[i] == split for i, split in cut_later)
    ]
    every = (*whole, *{s.key: s for s in fitting}.values())
    # The same tuple for every cut of the batch that leaves the same, so that what is worked out for one serves all.
    return found.offered.setdefault((op.name, degree, tuple(s.key for s in every)), every)


def _options(found: Analysis, op: Op, degree: int) -> tuple[tuple[Strategy, ...], tuple[Strategy, ...]]:
    """Of an op that stands for its like: ways to run it whole, and all others, however the batch is cut."""
    key = (op.name, degree)
    if key not in found.options:
        op_rule, gradient = found.rule(op), found.gradient(op)
        names = found.candidates.options[op.name]
        options = [split_strategy(op_rule, name, outer, degree, gradient) for name, outer in names]
        for group in op_rule.together:
            outers = {outer for name, outer in names if name == group.free} | {1}
            options += [together_strategy(op_rule, group, degree, gradient, outer) for outer in sorted(outers)]
        pending = found.candidates.pending[op.name]
        options += [partial_strategy(op_rule, group, gradient) for group in op_rule.linear if group & pending]
        found.options[key] = whole_strategies(op_rule, gradient), tuple(s for s in options if s is not None)
    return found.options[key]


def _cut_later(graph: Graph, op: Op, layout: BatchLayout) -> Iterator[tuple[int, Split]]:
    """Outputs that are whole on the batch axis but that some consumer cuts there, with that cut.

    Of two equal splits the batch axis makes the outer one, which cannot be had from a part that a model axis has cut.
    """
    for i, name in enumerate(op.outputs):
        for consumer in graph.consumers[name]:
            for tensor, want in zip(consumer.inputs, layout.strategies[consumer.name].inputs, strict=True):
                if tensor == name and isinstance(want, Split) and want != layout.placements[name]:
                    yield i, want


def _go_together(op_rule: Rule, one: Strategy, other: Strategy) -> bool:
    """Whether two axes may run their special algorithms in one op: the same one, which takes several dims or has one."""
    if not (one.special and other.special) or one.key == other.key:
        return True
    composes = [key in op_rule.specials and op_rule.specials[key].composes for key in (one.key, other.key)]
    return one.special == other.special and all(composes)


def _fits(
    op_rule: Rule, strategy: Strategy, degree: int, on_batch: Sequence[Placement], shards: int, outer: Outer = ()
) -> bool:
    """Whether a split divides what the batch and the outer axes leave, and goes together with what these run."""
    if not all(_go_together(op_rule, other, strategy) for other, _ in outer):
        return False
    # Axes that split one dim, one inside the other, are one line of ranks. A dim may be a factor of tensors' dims that
    # would divide still.
    line = degree * math.prod(n for other, n in outer if other.key == strategy.key)
    name, _, at = strategy.key.partition("@")
    if name in op_rule.sizes and op_rule.sizes[name] % (int(at or 1) * line):
        return False
    special = op_rule.specials.get(strategy.key)
    if special and special.window and special.window.parts(line) is None:
        return False
    if not on_batch and not outer:
        return True
    on_batch = on_batch or (REPLICATED,) * len(op_rule.shapes)
    sides = [((*s.inputs, *s.outputs), n) for s, n in (*outer, (strategy, degree))]
    return all(
        divides(shape, [(batch, shards), *((places[i], n) for places, n in sides)])
        for i, (shape, batch) in enumerate(zip(op_rule.shapes, on_batch, strict=True))
    )
