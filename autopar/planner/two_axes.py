"""Two model axes in the place of one: layouts for each, by the solver of one axis, the second beside the first.

An axis of degree t = t1 x t2 treats all its ranks alike. Two axes may do different things, such as the sequence over hosts
and heads inside them; so may a second axis that takes its ranks from data, where the batch has too few rows. One axis is
solved alone, then the other with what the first leaves: strategies that fit beside it, and prices in proportion to the
work and the bytes that it leaves to a rank. Both orders are tried; what the plan then costs is the cost model's to say.

Where axes have roles (planner/roles.py) the outer one is solved first, in its role, and leaves the inner one its own.

Ignored while solving: that two collectives over adjacent axes can become one, and that an op's efficiency falls with its
size. The pair is no optimum over both axes, therefore, but each is one given the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..graph import Block, Graph, Op
from ..plan import Layout
from ..sharding.flow import find_strategies
from ..sharding.placement import Placement, Split, parse_placement
from ..sharding.strategies import strategies
from ..sharding.strategy import Strategy
from .axis_prices import AxisPrices
from .layout_chain import chain_layouts, smallest_chain
from .layout_costs import Seconds2
from .layout_options import LayoutOptions
from .problem import Problem, Shape
from .roles import ModelAxis, can_follow
from .sketch import Rows


@dataclass(frozen=True, slots=True)
class AxisShape(Shape):
    """A shape as one of its model axes sees it: `tensor` is that axis's degree, its ranks `stride` apart, and the ranks of
    one data replica are `width`."""

    stride: int = 1
    width: int = 1

    def ranks(self, stage: int) -> tuple[int, ...]:
        return tuple(i * self.width + j * self.stride for i in range(self.data) for j in range(self.tensor))


@dataclass(frozen=True)
class OtherAxis:
    """What is decided about the other axis: layouts of all blocks, its degree, whether it is the outer of the two."""

    graph: Graph
    shards: int
    layouts: Sequence[Layout]
    degree: int
    is_outer: bool

    @cached_property
    def chosen(self) -> Mapping[str, Strategy]:
        """By op."""
        found = {}
        for block, layout in zip(self.graph.blocks, self.layouts, strict=True):
            for op, key in zip(self.graph.block_ops(block), layout.strategies, strict=True):
                (found[op.name],) = find_strategies(self.graph, op, (key,), (self.degree,), self.shards)
        return found

    @cached_property
    def splits(self) -> frozenset[str]:
        """Tensors that it leaves to a rank in part."""
        found = set()
        for block, layout in zip(self.graph.blocks, self.layouts, strict=True):
            for names, tokens in ((block.parameters, layout.parameters), (block.inputs, layout.inputs)):
                found |= {
                    n for n, token in zip(names, tokens, strict=True) if isinstance(parse_placement(token), Split)
                }
            for op in self.graph.block_ops(block):
                places = self.chosen[op.name].outputs
                found |= {n for n, place in zip(op.outputs, places, strict=True) if isinstance(place, Split)}
        return frozenset(found)

    def left(self, tensor: str) -> float:
        """Share of a tensor on each rank."""
        return 1 / self.degree if tensor in self.splits else 1.0

    def allows(self, op: Op, strategy: Strategy, degree: int) -> bool:
        """Whether the strategy, on the axis in question, can stand beside the one chosen here."""
        other = self.chosen.get(op.name)
        if other is None:
            return True
        outer, inner = (
            ((other, self.degree), (strategy, degree)) if self.is_outer else ((strategy, degree), (other, self.degree))
        )
        legal = strategies(self.graph, op, inner[1], self.shards, (outer,))
        return any(one.key == inner[0].key for one in legal)


@dataclass(frozen=True)
class BesidePrices(AxisPrices):
    """`LayoutCosts` of one axis beside another: one that is decided, or one with a role inside of it that is to follow."""

    other: OtherAxis | None = None
    follower: ModelAxis | None = None
    _fitting: dict[str, tuple[Strategy, ...]] = field(default_factory=dict)

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        """ValueError where nothing fits beside the other axis."""
        if op.name not in self._fitting:
            fitting = tuple(s for s in self._uncut(op) if self._fits(op, s))
            self._fitting[op.name] = self.problem.allowed_strategies(op, fitting, self.role)
            if not self._fitting[op.name]:
                raise ValueError(
                    f"nothing that {op.name} of {op.module} may do on one model axis fits beside the other"
                )
        return self._fitting[op.name]

    def _fits(self, op: Op, strategy: Strategy) -> bool:
        if self.other is not None and not self.other.allows(op, strategy, self.shape.tensor):
            return False
        next_ = self.follower
        return next_ is None or can_follow(
            next_.role, self.problem.graph, op, strategy, self.shape.tensor, next_.degree, self.shape.shards
        )

    def op_s(self, op: Op, strategy: Strategy) -> Seconds2:
        forward_s, backward_s = super().op_s(op, strategy)
        share = self.other.chosen[op.name].work if self.other is not None and op.name in self.other.chosen else 1.0
        return forward_s * share, backward_s * share

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        forward_s, backward_s = super().conversion_s(tensor, have, want)
        share = self.other.left(tensor) if self.other is not None else 1.0
        return forward_s * share, backward_s * share

    def rest_s(self, parameter: str, placement: Placement) -> float:
        return super().rest_s(parameter, placement) * (self.other.left(parameter) if self.other is not None else 1.0)


class BesideOptions(LayoutOptions):
    """Blocks are alike only if the other axis lays them out alike too."""

    def __init__(self, graph: Graph, degree: int, costs: BesidePrices) -> None:
        self._beside: dict[int, Layout] = dict(enumerate(costs.other.layouts)) if costs.other is not None else {}
        super().__init__(graph, degree, costs)

    def _signature(self, block: Block) -> tuple:
        return (*super()._signature(block), self._beside.get(block.index))


class AxisPairs:
    """Layouts on two axes, made when first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[tuple, list[Rows]] = {}
        self._in_roles: dict[tuple, tuple[tuple[Layout, ...], tuple[Layout, ...]]] = {}

    def of(self, shape: Shape, outer: int, inner: int) -> Iterator[Rows]:
        """Layouts on axes of degrees (outer, inner) beside the shape's data axis, with either solved first."""
        key = (shape.data, shape.microbatches, shape.zero, outer, inner)
        found = self._known.setdefault(key, [])
        yield from found
        for first_is_outer in (True, False)[len(found) :]:
            try:
                found.append(self._pair(shape, outer, inner, first_is_outer))
            except ValueError:
                # Nothing fits beside what the first axis does.
                continue
            yield found[-1]

    def in_roles(
        self, shape: Shape, axes: Sequence[ModelAxis], recompute: bool, lean: bool
    ) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        """Layouts of the shape on an outer and an inner axis, the fastest or, lean, those that keep least.

        ValueError where nothing fits beside what the outer axis does: only `layout=` can bring that about.
        """
        key = (shape.data, shape.microbatches, shape.zero, *axes, recompute, lean, lean and shape.pipeline)
        if key not in self._in_roles:
            outer, inner = axes
            on_outer, on_inner = _parts(shape, outer.degree, inner.degree)
            follower = inner if inner.role else None
            how = dict(recompute=recompute, lean=lean)
            first = self._solve(on_outer, None, outer.role, follower, **how)
            beside = OtherAxis(self.problem.graph, shape.shards, first, outer.degree, True)
            self._in_roles[key] = first, self._solve(on_inner, beside, inner.role, **how)
        return self._in_roles[key]

    def serve(self, axes: Sequence[ModelAxis], shards: int, others: int) -> bool:
        """Whether layouts on two axes where the batch is cut into `shards` parts are legal where it is into `others`."""
        graph, (outer, inner) = self.problem.graph, axes
        for op in self.problem.distinct_ops:
            here = {s.key for s in strategies(graph, op, outer.degree, others)}
            for one in strategies(graph, op, outer.degree, shards):
                around = ((one, outer.degree),)
                ours, theirs = (
                    {s.key for s in strategies(graph, op, inner.degree, n, around)} for n in (others, shards)
                )
                if one.key not in here or not theirs <= ours:
                    return False
        return True

    def _pair(self, shape: Shape, outer: int, inner: int, first_is_outer: bool) -> Rows:
        on_outer, on_inner = _parts(shape, outer, inner)
        first, second = (on_outer, on_inner) if first_is_outer else (on_inner, on_outer)
        one = self._solve(first, None)
        beside = OtherAxis(self.problem.graph, shape.shards, one, first.tensor, first_is_outer)
        other = self._solve(second, beside)
        return Rows.of((one, other) if first_is_outer else (other, one))

    def _solve(
        self,
        shape: AxisShape,
        other: OtherAxis | None,
        role: str = "",
        follower: ModelAxis | None = None,
        recompute: bool = False,
        lean: bool = False,
    ) -> tuple[Layout, ...]:
        prices = BesidePrices(self.problem, shape, recompute, role=role, other=other, follower=follower)
        options = BesideOptions(self.problem.graph, shape.tensor, prices)
        solve = smallest_chain if lean else chain_layouts
        return solve(options, 0, len(self.problem.graph.blocks)).layouts


def _parts(shape: Shape, outer: int, inner: int) -> tuple[AxisShape, AxisShape]:
    """The shape as an outer and an inner model axis see it."""
    width = outer * inner
    on_outer = AxisShape(**_fields(shape, outer), stride=inner, width=width)
    return on_outer, AxisShape(**_fields(shape, inner), stride=1, width=width)


def _fields(shape: Shape, tensor: int) -> dict:
    return dict(
        pipeline=shape.pipeline, data=shape.data, tensor=tensor, microbatches=shape.microbatches,
        schedule=shape.schedule, zero=shape.zero,
    )  # fmt: skip
