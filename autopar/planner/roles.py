"""Roles of model axes: what `context=` and `expert=` pin, as a choice among the strategies that ops have on one axis.

    context   positions are split: attention by its queries, or by heads that are exchanged for positions (Ulysses), and
              products on a part of the rows with whole weights
    expert    routed rows are split by their experts, whatever way rows get there

On an axis with a role no parameter is cut, nor what is made of parameters alone, but those of routed experts by expert=:
an axis that cuts the weights of products is a tensor axis, which `tensor=` asks for beside. Ops that a role is not about,
or that cannot be split so (a head on all positions but one), do what is cheapest under that rule. As on every model axis,
rows of the batch are left to data ranks.

An axis with a role is the outer one, a tensor axis beside it the inner one, on the faster links; of two roles context is
outer. An axis without a role lies as the search likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..graph import Graph, Op
from ..plan import Plan
from ..sharding.flow import find_strategies
from ..sharding.placement import Split
from ..sharding.rows import stage_units
from ..sharding.strategies import Outer, strategies
from ..sharding.strategy import Strategy
from .pins import ATTENTION, ROUTED

# Model axes of a plan that the search makes at most: planner/two_axes.py lays out one beside one other.
MOST_AXES = 2


@dataclass(frozen=True, slots=True)
class Role:
    """concerns: whether the axis is there to split an op; does: whether a strategy of such an op does so.

    is_core: of these ops the ones without which a graph has nothing for the axis to do, if it has any; splits: what each
    of them must have a way to do. cuts: the parameters that it may cut.
    """

    concerns: Callable[[Graph, Op], bool]
    does: Callable[[Graph, Op, Strategy], bool]
    is_core: Callable[[Graph, Op], bool]
    splits: Callable[[Graph, Op, Strategy], bool]
    cuts: Callable[[Graph], frozenset[str]]


def _cuts(graph: Graph, op: Op, strategy: Strategy, but: frozenset[str] = frozenset()) -> bool:
    """Whether a parameter that is not among `but`, or what is made of such, is cut."""
    made = graph.made_of_parameters
    return any(
        isinstance(place, Split) and name in made and not made[name] <= but
        for name, place in zip(op.inputs, strategy.inputs, strict=True)
    )


def _is_attention(graph: Graph, op: Op) -> bool:
    return op.target.startswith(ATTENTION)


def _has_positions(graph: Graph, op: Op) -> bool:
    """Attention, and products with a weight whose result is [batch, positions, features]."""
    made, tensors = graph.made_of_parameters, graph.tensors
    if _is_attention(graph, op):
        return True
    if op.target == ROUTED or len(op.outputs) != 1 or op.outputs[0] in made:
        return False
    return len(tensors[op.outputs[0]].shape) == 3 and any(
        name in made and len(tensors[name].shape) > 1 for name in op.inputs
    )


def _by_queries(graph: Graph, op: Op, strategy: Strategy) -> bool:
    return strategy.outputs[0] == Split(len(graph.tensors[op.outputs[0]].shape) - 2)


def _by_positions(graph: Graph, op: Op, strategy: Strategy) -> bool:
    """Attention [batch, heads, positions, features] by queries or heads, results [batch, positions, features] by rows."""
    if _is_attention(graph, op):
        by_heads = len(graph.tensors[op.outputs[0]].shape) == 4 and strategy.outputs[0] == Split(1)
        return by_heads or _by_queries(graph, op, strategy)
    return strategy.outputs[0] == Split(1) and not _cuts(graph, op, strategy)


def _is_routed(graph: Graph, op: Op) -> bool:
    return op.target == ROUTED


def _of_experts(graph: Graph) -> frozenset[str]:
    made = graph.made_of_parameters
    return frozenset().union(*(made.get(name, ()) for op in graph.ops if _is_routed(graph, op) for name in op.inputs))


def _by_experts(graph: Graph, op: Op, strategy: Strategy) -> bool:
    return strategy.key.partition("@")[0] in ("e", "n+e")


ROLES: Mapping[str, Role] = {
    "context": Role(_has_positions, _by_positions, _is_attention, _by_queries, lambda graph: frozenset()),
    "expert": Role(_is_routed, _by_experts, _is_routed, _by_experts, _of_experts),
}


@dataclass(frozen=True, slots=True)
class ModelAxis:
    """One axis of a shape; role: a name of `ROLES`, "" for an axis that may be laid out in any way."""

    degree: int
    role: str = ""


def model_axes(roles: Sequence[tuple[str, int]], width: int) -> tuple[ModelAxis, ...]:
    """The axes of `width` model ranks, outermost first; roles: the pinned (name, degree), whose product divides it."""
    rest, left = divmod(width, math.prod(degree for _, degree in roles))
    assert not left, (roles, width)
    own = (ModelAxis(rest),) if rest > 1 else ()
    return (*(ModelAxis(degree, name) for name, degree in roles), *own)


def leaves(role: str, graph: Graph, op: Op, found: Sequence[Strategy]) -> tuple[Strategy, ...]:
    """Of an op's strategies on an axis those that the axis's role leaves; never none of those that have "-"."""
    if not role:
        return tuple(found)
    if ROLES[role].concerns(graph, op):
        doing = tuple(strategy for strategy in found if ROLES[role].does(graph, op, strategy))
        if doing:
            return doing
    cuts = ROLES[role].cuts(graph)
    return tuple(strategy for strategy in found if not _cuts(graph, op, strategy, cuts))


def core_ops(role: str, graph: Graph, ops: Iterable[Op]) -> list[Op]:
    """Those that the axis must split."""
    return [op for op in ops if ROLES[role].is_core(graph, op)]


def can_have(role: str, graph: Graph, ops: Sequence[Op], degree: int, shards: int) -> bool:
    """Whether an axis of `degree` ranks beside `shards` parts of the batch can have the role in a graph of these ops."""
    one = ROLES[role]
    if core := core_ops(role, graph, ops):
        return all(any(one.splits(graph, op, s) for s in strategies(graph, op, degree, shards)) for op in core)
    concerned = (op for op in ops if one.concerns(graph, op))
    return any(any(one.does(graph, op, s) for s in strategies(graph, op, degree, shards)) for op in concerned)


def can_follow(role: str, graph: Graph, op: Op, outer: Strategy, outer_degree: int, degree: int, shards: int) -> bool:
    """Whether an inner axis can have the role in `op` where the outer axis runs it as `outer`: true of ops other than core."""
    one, around = ROLES[role], ((outer, outer_degree),)
    return not one.is_core(graph, op) or any(
        one.does(graph, op, s) for s in strategies(graph, op, degree, shards, around)
    )


def can_be_axes(axes: Sequence[ModelAxis], graph: Graph, ops: Sequence[Op], shards: int) -> bool:
    """Whether all axes can have their roles at once. Axes without one can lie beside any."""
    if not all(can_have(axis.role, graph, ops, axis.degree, shards) for axis in axes if axis.role):
        return False
    if len(axes) < 2 or not axes[1].role:
        return True
    outer, inner = axes
    return all(
        any(
            can_follow(inner.role, graph, op, s, outer.degree, inner.degree, shards)
            for s in leaves(outer.role, graph, op, strategies(graph, op, outer.degree, shards))
        )
        for op in ops
    )


def refusal(roles: Sequence[tuple[str, int]], graph: Graph, plan: Plan) -> str:
    """Which role a finished plan of this graph does not keep, "" if it keeps all."""
    for s, stage in enumerate(plan.stages):
        units, seen = stage_units(plan, stage), set()
        kept = {(axis, name) for axis, degree in enumerate(stage.axes) for name, wants in roles if degree == wants}
        for block, layouts in zip(graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
            if (block.kind, layouts) in seen:
                continue
            seen.add((block.kind, layouts))
            for op, *keys in zip(graph.block_ops(block), *(one.strategies for one in layouts), strict=True):
                chosen = find_strategies(graph, op, keys, stage.axes, units)
                for axis, name in tuple(kept):
                    outer: Outer = tuple(zip(chosen[:axis], stage.axes, strict=False))
                    legal = strategies(graph, op, stage.axes[axis], units, outer)
                    if chosen[axis] not in leaves(name, graph, op, legal):
                        kept.discard((axis, name))
        for name, degree in roles:
            if not any(role == name for _, role in kept):
                return f"no axis of stage {s} is the one of {degree} ranks that {name}= asks for"
    return ""
