"""Why an op cannot run as a plan says, in words: which of its dims it is about, and what is possible instead."""

from __future__ import annotations

from ..graph import Graph, Op
from .analysis import analysis
from .rule import Rule
from .strategies import Outer, strategies

# Degrees on either side of the one asked for that are tried.
_TRIED = 16


def refusal(graph: Graph, op: Op, key: str, degree: int, shards: int = 1, outer: Outer = ()) -> str:
    """Half a sentence on why no strategy of `op` has this key on an axis of `degree` ranks; "" where the key names none of
    its dims. shards, outer: as in `strategies`."""
    rule = analysis(graph).rule(op)
    name = key.partition("@")[0]
    if name not in rule.sizes:
        return ""
    where = _place(graph, op, rule, name)
    if name in rule.blocked:
        return f"{where} stays whole: {rule.blocked[name]}"
    special = rule.specials.get(name)
    why = "does not split into so many parts" if rule.sizes[name] % degree else "cannot be split so"
    if special and special.window and rule.sizes[name] % degree == 0:
        why = "has windows that reach beyond the neighbours of so small a part"
    near = [
        d
        for n in range(1, _TRIED)
        for d in (degree - n, degree + n)
        if d > 1 and _has(graph, op, key, d, shards, outer)
    ]
    instead = (
        f"the nearest degrees for it are {', '.join(map(str, sorted(near[:2])))}" if near else "no degree near it works"
    )
    return f"{where} {why}; {instead}"


def _has(graph: Graph, op: Op, key: str, degree: int, shards: int, outer: Outer) -> bool:
    return any(strategy.key == key for strategy in strategies(graph, op, degree, shards, outer))


def _place(graph: Graph, op: Op, rule: Rule, name: str) -> str:
    """The first dim of a tensor that carries the name."""
    for tensor, (dims, shape) in zip((*op.inputs, *op.outputs), rule.tensors, strict=True):
        for i, dim in enumerate(dims):
            if name in dim:
                return f"{name} (dim {i} of {graph.tensors[tensor].fqn or tensor}, which is {shape[i]} long)"
    raise AssertionError(f"no tensor of {op.name} has a dim {name}")
