"""The body of `autopar.routed_rows` on one rank's part of its weights: which inner split there is, and the local sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from torch import Tensor as Value

from ..capture.routing import free_rows
from ..graph import Graph, Op, Shape, Tensor
from ..ops import resolve
from ..routed import Body, Step, run_steps
from .analysis import Analysis, analysis
from .call import Call
from .placement import PARTIAL, REPLICATED, SHARED, Placement, Split
from .rule import partial_strategy, split_strategy, whole_strategies
from .strategy import Strategy


@dataclass(frozen=True)
class Inner:
    """A split of weights inside a body. weights: by name in the body. strategies: of each of its ops, None where the op
    runs whole."""

    weights: Mapping[str, Split]
    strategies: tuple[Strategy | None, ...]


def body_graph(body: Body) -> Graph:
    """The body as a graph of its own; its weights are parameters, so that everything has a gradient that can."""

    def of(tensor: Tensor) -> Tensor:
        trained = tensor.dtype.is_floating_point
        return replace(tensor, role="parameter" if _is_weight(tensor.name) else "activation", requires_grad=trained)

    tensors = {t.name: of(t) for t in body.tensors}
    return Graph("body", tensors, body.ops, (), (), body.output, (), (), frozenset(), (), 1)


@lru_cache(maxsize=256)
def inner_split(body: Body, degree: int) -> Inner | None:
    """The split of weights on `degree` ranks that leaves the body's result a sum, None where there is none."""
    graph = body_graph(body)
    found = analysis(graph)
    for i, op in enumerate(body.ops):
        if not any(name.startswith("weight") for name in op.inputs):
            continue
        for strategy in _splits(found, op, degree):
            if isinstance(strategy.outputs[0], Split) and strategy.outputs[0].dim > 0:
                inner = _Walk(found, body, degree).run(i, strategy)
                if inner is not None:
                    return inner
    return None


def _splits(found: Analysis, op: Op, degree: int) -> list[Strategy]:
    rule, gradient = found.rule(op), found.gradient(op)
    made = [split_strategy(rule, name, outer, degree, gradient) for name, outer in found.candidates.options[op.name]]
    pending = [partial_strategy(rule, group, gradient) for group in rule.linear]
    return [s for s in (*made, *pending) if s is not None and not s.special]


class _Walk:
    """What the ops of a body must do when one of them is split in some way."""

    def __init__(self, found: Analysis, body: Body, degree: int) -> None:
        self.found, self.body, self.degree = found, body, degree
        self.placed: dict[str, Placement] = {}  # splits and sums; what is not here is whole
        self.weights: dict[str, Placement] = {}
        self.strategies: list[Strategy | None] = [None] * len(body.ops)
        self.makes = {name: i for i, op in enumerate(body.ops) for name in op.outputs}

    def run(self, start: int, first: Strategy) -> Inner | None:
        """None where some op cannot go on, or where the result is no sum."""
        for i, op in enumerate(self.body.ops):
            if i == start:
                options = [first]
            elif i > start and any(name in self.placed for name in op.inputs):
                options = _splits(self.found, op, self.degree)
            else:
                continue
            if not any(self._take(i, strategy) for strategy in options):
                return None
        cut = {name: place for name, place in self.weights.items() if isinstance(place, Split)}
        for op, strategy in zip(self.body.ops, self.strategies, strict=True):
            if strategy is None and cut.keys() & set(op.inputs):
                return None  # it has run on the whole weight
        if self.placed.get(self.body.output) != PARTIAL:
            return None
        return Inner(MappingProxyType(cut), tuple(self.strategies))

    def _take(self, i: int, strategy: Strategy) -> bool:
        """Run op `i` so, if its operands are there or can be made so."""
        op = self.body.ops[i]
        pairs = list(zip(op.inputs, strategy.inputs, strict=True))
        if not all(self._is_there(name, want) or self._can_make(name, want, i) for name, want in pairs):
            return False
        for name, want in pairs:
            if not self._is_there(name, want):
                producer = self.makes[name]
                assert self._take(producer, self._made_so(producer, name, want)[0])
        self.strategies[i] = strategy
        self.weights.update((name, want) for name, want in pairs if _is_weight(name))
        self.placed.update(
            (name, place)
            for name, place in zip(op.outputs, strategy.outputs, strict=True)
            if place not in (REPLICATED, SHARED)
        )
        return True

    def _is_there(self, name: str, want: Placement) -> bool:
        whole = want in (REPLICATED, SHARED)
        if not _is_weight(name):
            return self.placed[name] == want if name in self.placed else whole
        there = self.weights.get(name, want)
        by_group = isinstance(want, Split) and want.dim == 0 and name.startswith("weight")
        return not by_group and (there == want or (whole and there in (REPLICATED, SHARED)))

    def _can_make(self, name: str, want: Placement, before: int) -> bool:
        """Whether an op that ran whole, on weights, can make this part of its result instead."""
        producer = self.makes.get(name, before)
        if name in self.placed or producer >= before or not isinstance(want, Split):
            return False
        users = [i for i, op in enumerate(self.body.ops[:before]) if name in op.inputs]
        return self.strategies[producer] is None and not users and bool(self._made_so(producer, name, want))

    def _made_so(self, producer: int, name: str, want: Placement) -> list[Strategy]:
        op = self.body.ops[producer]
        place = op.outputs.index(name)
        return [
            s
            for s in _splits(self.found, op, self.degree)
            if s.outputs[place] == want and all(map(self._is_there, op.inputs, s.inputs))
        ]


def _is_weight(name: str) -> bool:
    return name.startswith(("weight", "shared"))


@dataclass(frozen=True)
class LocalBody:
    """A body on one rank's part of its weights."""

    steps: tuple[Step, ...]
    output: str

    def run(self, values: dict[str, Value]) -> Value:
        return run_steps(self.steps, values, self.output)


def local_body(call: Call, weights: tuple[Shape, ...], others: tuple[Shape, ...]) -> Body | LocalBody:
    """The body for weights of these local shapes: the op's own, or with the sizes of the inner split."""
    body: Body = call["body"]
    degree = 1
    for whole, part in zip((*call.shapes("weights"), *call.shapes("shared_weights")), (*weights, *others), strict=True):
        for dim, (a, b) in enumerate(zip(whole, part, strict=True)):
            if a != b and (dim > 0 or whole not in call.shapes("weights")):
                degree = a // b
    if degree == 1:
        return body
    inner = inner_split(body, degree)
    assert inner is not None, f"{call.op.name} has no split of its weights on {degree} ranks"
    from .local import localize  # which imports this module

    graph = body_graph(body)
    found = analysis(graph)
    steps = []
    for op, strategy in zip(body.ops, inner.strategies, strict=True):
        whole = whole_strategies(found.rule(op), found.gradient(op))[0]
        local = localize(graph, op, whole, 1, [strategy] if strategy else [], [degree] if strategy else [])
        assert not local.axes, op
        free = free_rows(replace(op, args=local.args, kwargs=local.kwargs))
        function = local.function if strategy else resolve(op.target)
        steps.append(Step(function, free.args, free.kwargs, op.outputs, op.returns_sequence))
    return LocalBody(tuple(steps), body.output)
