"""A block under a layout, as the steps that run it: ops with their strategies, and the conversions between them.

The cost model prices exactly these steps and the runtime emits exactly these steps, so they agree by construction.
A tensor is converted from its producer's placement once per wanted placement, whoever asks first; all consumers that
want the same placement share it (and with it the backward collective).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Block, Graph, Op
from ..plan import Layout
from .axes import Places, changes
from .batch import batch_layout
from .placement import REPLICATED, Placement, parse_placement
from .strategies import strategies
from .strategy import Strategy


@dataclass(frozen=True, slots=True)
class Run:
    """Run `op` as `strategies` say, one per model axis."""

    op: Op
    strategies: tuple[Strategy, ...]

    @property
    def strategy(self) -> Strategy | None:
        """On the first model axis; None where there is none."""
        return self.strategies[0] if self.strategies else None

    @property
    def inputs(self) -> tuple[Places, ...]:
        """Per tensor argument its placement on each model axis."""
        return tuple(tuple(s.inputs[i] for s in self.strategies) for i in range(len(self.op.inputs)))

    @property
    def outputs(self) -> tuple[Places, ...]:
        return tuple(tuple(s.outputs[i] for s in self.strategies) for i in range(len(self.op.outputs)))


@dataclass(frozen=True, slots=True)
class Convert:
    """Change `tensor` from `have` to `want` on the model axes `axes`, which act as one where there are several.

    before, after: its placements on all model axes, splits of one dim in absolute form (see sharding/axes.py).
    """

    tensor: str
    have: Placement
    want: Placement
    axes: tuple[int, ...]
    before: Places
    after: Places


Step = Run | Convert


def block_flow(graph: Graph, block: Block, layouts: Sequence[Layout], shards: int = 1) -> tuple[Step, ...]:
    """The steps of `block` on one rank, in execution order.

    layouts: one per model axis; () when the stage has none (then there are no conversions).
    shards: data degree x microbatches, which already cut the batch dim.
    The loss leaves its block REPLICATED; other outputs leave as the layouts say.
    Raises ValueError when a layout names a strategy that the op does not have.
    """
    if not layouts:
        return tuple(Run(op, ()) for op in graph.block_ops(block))
    return _Flow(graph, block, layouts, shards).steps()


class _Flow:
    def __init__(self, graph: Graph, block: Block, layouts: Sequence[Layout], shards: int) -> None:
        self.graph, self.block, self.layouts, self.shards = graph, block, layouts, shards
        self.degrees = tuple(layout.degree for layout in layouts)
        self.whole: Places = (REPLICATED,) * len(layouts)
        # Where one axis stands alone there is one way to convert, however the batch is cut.
        self.batch = batch_layout(graph, shards) if len(layouts) > 1 and shards > 1 else None
        self.have: dict[str, Places] = {}
        self.available: set[tuple[str, Places]] = set()
        self.found: list[Step] = []

    def steps(self) -> tuple[Step, ...]:
        graph, block = self.graph, self.block
        self.have.update(zip(block.inputs, layout_places(self.layouts, "inputs"), strict=True))
        self.have.update(zip(block.parameters, layout_places(self.layouts, "parameters"), strict=True))
        rows = zip(*(layout.strategies for layout in self.layouts), strict=True)
        for op, keys in zip(graph.block_ops(block), rows, strict=True):
            run = Run(op, find_strategies(graph, op, keys, self.degrees, self.shards))
            on_batch = self.batch.strategies[op.name].inputs if self.batch else (REPLICATED,) * len(op.inputs)
            for tensor, want, cut in zip(op.inputs, run.inputs, on_batch, strict=True):
                self._require(tensor, want, cut)
            self.found.append(run)
            self.have.update(zip(op.outputs, run.outputs, strict=True))
        for tensor, places in zip(block.outputs, layout_places(self.layouts, "outputs"), strict=True):
            self._require(tensor, places, self._cut(tensor))
        if graph.loss in self.have and graph.producer[graph.loss].name in block.ops:
            self._require(graph.loss, self.whole, self._cut(graph.loss))
        return tuple(self.found)

    def _cut(self, tensor: str) -> Placement:
        return self.batch.placements[tensor] if self.batch else REPLICATED

    def _require(self, tensor: str, want: Places, cut: Placement) -> None:
        """cut: how the tensor lies on the batch axis when it is wanted."""
        # Side tensors, batch inputs, buffers and constants are whole on every rank of the axes.
        have = self.have.setdefault(tensor, self.whole)
        shape, degrees = self.graph.tensors[tensor].shape, (self.shards, *self.degrees)
        path = changes(shape, (cut, *have), (cut, *want), degrees)
        known = max((i + 1 for i, c in enumerate(path) if (tensor, c.after[1:]) in self.available), default=0)
        for change in path[known:]:
            before, after = change.before[1:], change.after[1:]
            self.available.add((tensor, after))
            axes = tuple(i - 1 for i in change.axes)
            self.found.append(Convert(tensor, change.have, change.want, axes, before, after))


def layout_places(layouts: Sequence[Layout], field: str) -> list[Places]:
    """The placements on each model axis of a block's "inputs", "outputs" or "parameters"."""
    return [
        tuple(map(parse_placement, tokens)) for tokens in zip(*(getattr(one, field) for one in layouts), strict=True)
    ]


def find_strategies(
    graph: Graph, op: Op, keys: Sequence[str], degrees: Sequence[int], shards: int = 1
) -> tuple[Strategy, ...]:
    """The strategy with these keys on each model axis, outermost first; ValueError names the legal keys."""
    found: tuple[Strategy, ...] = ()
    for key, degree in zip(keys, degrees, strict=True):
        outer = tuple(zip(found, degrees, strict=False))
        legal = strategies(graph, op, degree, shards, outer)
        strategy = next((s for s in legal if s.key == key), None)
        if strategy is None:
            inside = f" inside {', '.join(s.key for s in found)}" if found else ""
            raise ValueError(
                f"op {op.name} ({op.target}) cannot run as {key!r} on {degree} ranks{inside}; "
                f"legal: {', '.join(s.key for s in legal)}"
            )
        found += (strategy,)
    return found
