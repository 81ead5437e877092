"""A block under a layout, as the steps that run it: ops with their strategies, and the conversions between them.

The cost model prices exactly these steps and the runtime emits exactly these steps, so they agree by construction.
A tensor is converted from its producer's placement once per wanted placement, whoever asks first; all consumers that
want the same placement share it (and with it the backward collective).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Block, Graph, Op
from ..plan import Layout
from .placement import REPLICATED, Placement, parse_placement
from .strategies import strategies
from .strategy import Strategy


@dataclass(frozen=True, slots=True)
class Run:
    """Run `op` on the model axis as `strategy` says; None where the stage has no model axis."""

    op: Op
    strategy: Strategy | None


@dataclass(frozen=True, slots=True)
class Convert:
    """Change `tensor` from its producer's placement `have` to `want`."""

    tensor: str
    have: Placement
    want: Placement


Step = Run | Convert


def block_flow(graph: Graph, block: Block, layout: Layout | None, shards: int = 1) -> tuple[Step, ...]:
    """The steps of `block` on one rank, in execution order.

    layout: None when the stage has no model axis (then there are no conversions).
    shards: data degree x microbatches, which already cut the batch dim.
    The loss leaves its block REPLICATED; other outputs leave as the layout says.
    Raises ValueError when the layout names a strategy that the op does not have.
    """
    if layout is None:
        return tuple(Run(op, None) for op in graph.block_ops(block))
    have: dict[str, Placement] = dict(zip(block.inputs, map(parse_placement, layout.inputs), strict=True))
    have.update(zip(block.parameters, map(parse_placement, layout.parameters), strict=True))
    available: set[tuple[str, Placement]] = set(have.items())
    steps: list[Step] = []

    def require(tensor: str, want: Placement) -> None:
        # Side tensors, batch inputs, buffers and constants are whole on every rank of the axis.
        placed = have.setdefault(tensor, REPLICATED)
        available.add((tensor, placed))
        if (tensor, want) not in available:
            available.add((tensor, want))
            steps.append(Convert(tensor, placed, want))

    for op, key in zip(graph.block_ops(block), layout.strategies, strict=True):
        strategy = find_strategy(graph, op, key, layout.degree, shards)
        for tensor, want in zip(op.inputs, strategy.inputs, strict=True):
            require(tensor, want)
        steps.append(Run(op, strategy))
        for tensor, placed in zip(op.outputs, strategy.outputs, strict=True):
            have[tensor] = placed
            available.add((tensor, placed))
    for tensor, token in zip(block.outputs, layout.outputs, strict=True):
        require(tensor, parse_placement(token))
    if graph.loss in have and graph.producer[graph.loss].name in block.ops:
        require(graph.loss, REPLICATED)
    return tuple(steps)


def find_strategy(graph: Graph, op: Op, key: str, degree: int, shards: int = 1) -> Strategy:
    """The strategy of `op` with this key; ValueError names the legal keys."""
    legal = strategies(graph, op, degree, shards)
    for strategy in legal:
        if strategy.key == key:
            return strategy
    raise ValueError(
        f"op {op.name} ({op.target}) cannot run as {key!r} on {degree} ranks; legal: {', '.join(s.key for s in legal)}"
    )
