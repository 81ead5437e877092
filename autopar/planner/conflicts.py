"""Which constraints contradict each other, and what would be possible instead.

A smallest contradicting set is found by leaving out one at a time: what can go and leave the rest as impossible as
before goes for good. Each that is left is needed for the contradiction. Then each in turn is set free, with all other
constraints kept, and the values that the problem would then allow are held against the pinned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .constraints import Constraints
    from .problem import Problem, Shape

# Of these a pinned one may be what makes every shape impossible.
_PINS = ("data", "tensor", "context", "expert", "pipeline", "microbatches", "schedule", "zero", "layout", "stage")
_OF_SHAPE = ("data", "tensor", "pipeline", "microbatches", "schedule", "zero")
_ROLES = ("context", "expert")

Item = tuple[str, Any]
Shapes = Callable[["Constraints"], "list[Shape] | tuple[Shape, ...]"]


def contradiction(constraints: Constraints, possible: Callable[[Constraints], bool]) -> tuple[Item, ...]:
    """A smallest set of (name, value) that no plan meets together; () where the problem is impossible without any.

    possible: whether a plan meets such constraints. Of layout and stage every pattern is an item by itself.
    """
    kept = list(items(constraints))
    for item in list(kept):
        rest = [other for other in kept if other is not item]
        if not possible(only(constraints, rest)):
            kept = rest
    return tuple(kept)


def items(constraints: Constraints) -> list[Item]:
    """What is pinned, pattern by pattern."""
    found: list[Item] = []
    for name in (f.name for f in fields(constraints)):
        value = getattr(constraints, name)
        if name not in _PINS or value is None:
            continue
        found += [(name, (pair,)) for pair in value] if name in ("layout", "stage") else [(name, value)]
    return found


def only(constraints: Constraints, kept: list[Item]) -> Constraints:
    """The constraints with none pinned but these."""
    values: dict[str, Any] = dict.fromkeys(_PINS)
    for name, value in kept:
        values[name] = (*(values[name] or ()), *value) if name in ("layout", "stage") else value
    return replace(constraints, **values)


def in_words(item: Item) -> str:
    name, value = item
    if name in ("layout", "stage"):
        ((pattern, word),) = value
        return f"{name}[{pattern!r}]={word!r}"
    return f"{name}={value!r}"


def way_out(constraints: Constraints, item: Item, shapes: Shapes) -> str:
    """What the item would have to be for the others to hold, "" where more than this one stands in the way."""
    name, value = item
    rest = [other for other in items(constraints) if other != item]
    if name in _ROLES:
        values = {degree for degree in range(1, 2 * value + 1) if shapes(only(constraints, [*rest, (name, degree)]))}
        return _could_be(name, value, values) if values else ""
    found = shapes(only(constraints, rest))
    if not found:
        return ""
    if name not in _OF_SHAPE:
        return f"leave {in_words(item)} out"
    values = {getattr(shape, name) for shape in found}
    if name == "tensor":
        besides = math.prod(degree for _, degree in constraints.roles)
        values = {width // besides for width in values}
    return _could_be(name, value, values)


def _could_be(name: str, value: Any, values: set) -> str:
    if isinstance(value, int):
        near = sorted(values, key=lambda other: (abs(other - value), other))[:2]
        return f"{name} could be {' or '.join(map(str, sorted(near)))}"
    return f"{name} could be {' or '.join(map(repr, sorted(values)))}"


def why_none(problem: Problem) -> str:
    """Why no shape meets the problem's constraints, and what would be possible."""
    world, rows = problem.cluster.world_size, problem.graph.batch_size

    def shapes(constraints: Constraints) -> tuple[Shape, ...]:
        try:
            other = replace(problem, constraints=constraints)
        except ValueError:
            return ()
        # neither depends on constraints, and both take long
        other.__dict__.update(_splits=problem._splits, _cut_batch=problem._cut_batch)
        return tuple(other._shapes())

    if not shapes(only(problem.constraints, [])):
        if problem.batch_conflict:
            return (
                f"data must be 1, because the rows of the batch depend on each other ({problem.batch_conflict}), and no op "
                f"that uses a parameter can be split {world} ways; use fewer devices"
            )
        return (
            f"what the model cannot be split by would be data ranks, and no such degree divides the batch of {rows} rows; "
            f"use another batch or another number of devices than {world}"
        )
    clash = contradiction(problem.constraints, lambda constraints: bool(shapes(constraints)))
    words = " and ".join(map(in_words, clash))
    said = f"{words} contradict each other" if len(clash) > 1 else f"{words} is impossible"
    ways = [way for item in clash if (way := way_out(problem.constraints, item, shapes))]
    return f"{said} with a batch of {rows} rows; {', or '.join(ways) if ways else 'leave one of these out'}"
