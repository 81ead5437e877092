"""An op's arguments by the names of its schema, with defaults filled in: what rules and local execution read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..graph import Graph, Op, Ref, Shape, Tensor, iterate_refs
from ..ops import resolve
from .notation import Dims, bind, parse
from .rule import Rule, Special


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a schema. keyword_only: it cannot be given by position."""

    name: str
    keyword_only: bool
    default: Any


@cache
def schema(target: str) -> tuple[Parameter, ...]:
    """The arguments of an operator, from torch's schema or, for an op of ours, from the function's signature."""
    function = resolve(target, {})
    if hasattr(function, "_schema"):
        return tuple(Parameter(a.name, a.kwarg_only, a.default_value) for a in function._schema.arguments)
    return tuple(
        Parameter(p.name, p.kind is p.KEYWORD_ONLY, None if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    )


@dataclass(frozen=True)
class Call:
    """One op of a graph. `arguments` maps schema names to values (`Ref`s for tensors), defaults included."""

    graph: Graph
    op: Op
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, graph: Graph, op: Op) -> Call:
        parameters = schema(op.target)
        arguments = {p.name: p.default for p in parameters}
        if parameters and len(op.args) > len(parameters):  # *args of an op of ours
            arguments[parameters[-1].name] = tuple(op.args[len(parameters) - 1 :])
        arguments.update(zip((p.name for p in parameters), op.args[: len(parameters)], strict=False))
        arguments.update(op.kwargs)
        return cls(graph, op, arguments)

    @property
    def packet(self) -> str:
        """The target without its overload: "aten.add"."""
        return ".".join(self.op.target.split(".")[:2])

    @property
    def overload(self) -> str:
        return self.op.target.split(".")[-1]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def tensor(self, name: str) -> Tensor:
        return self.graph.tensors[self.arguments[name].name]

    def has(self, name: str) -> bool:
        """Whether a tensor was passed for this argument."""
        return isinstance(self.arguments.get(name), Ref)

    def shape(self, name: str) -> Shape:
        return self.tensor(name).shape

    def shapes(self, name: str) -> tuple[Shape, ...]:
        """Shapes of the tensors in a list argument."""
        return tuple(self.graph.tensors[ref.name].shape for ref in iterate_refs(self.arguments[name]))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.graph.tensors[name] for name in self.op.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(self.graph.tensors[name] for name in self.op.outputs)

    @property
    def out(self) -> Shape:
        """Shape of the first output."""
        return self.outputs[0].shape

    def dim(self, name: str, rank: int) -> int:
        """A dim argument, counted from the front."""
        return self.arguments[name] % max(rank, 1)

    def positions(self) -> dict[str, list[int]]:
        """The inputs (numbered as in `Op.inputs`) that each argument holds."""
        found: dict[str, list[int]] = {}
        count = 0
        names = [p.name for p in schema(self.op.target)]
        for i, value in [*enumerate(self.op.args), *self.op.kwargs]:
            name = names[min(i, len(names) - 1)] if isinstance(i, int) else i
            for _ in iterate_refs(value):
                found.setdefault(name, []).append(count)
                count += 1
        return found

    def rule(
        self,
        inputs: Mapping[str, Dims | Sequence[Dims]],
        outputs: Sequence[Dims],
        splits: Iterable[str] | None = None,
        sums: Iterable[str] = (),
        specials: Mapping[str, Special] | None = None,
        blocked: Mapping[str, str] | None = None,
        additive: Iterable[str] = (),
        linear: Iterable[Iterable[str]] = (),
        sizes: Mapping[str, int] | None = None,
        batch_only: Iterable[str] = (),
        counts: Mapping[str, Iterable[str]] | None = None,
        flops: int = 0,
    ) -> Rule:
        """A rule from dims by argument name.

        inputs: per tensor argument its dims (a list of dims for a list argument; one Dims serves all tensors of it).
        splits: by default every name that is not blocked. additive, linear, counts: argument names.
        """
        positions = self.positions()
        dims: list[Dims] = [()] * len(self.op.inputs)
        for name, numbers in positions.items():
            given = inputs[name]
            several = isinstance(self.arguments.get(name), tuple | list)
            many = list(given) if several and isinstance(given, list) else [given] * len(numbers)
            for number, one in zip(numbers, many, strict=True):
                dims[number] = one
        shapes = tuple(t.shape for t in self.inputs + self.outputs)
        everything = (*dims, *outputs)
        found: dict[str, int] = dict(sizes or {})
        windows = {name for name, special in (specials or {}).items() if special.window}
        for one, shape in zip(everything, shapes, strict=True):
            assert len(one) == len(shape), f"{self.op.target}: dims {one} for shape {shape}"
            spread: dict[str, int] = {}
            for dim, size in zip(one, shape, strict=True):
                if len(dim) == 1 and dim[0] not in windows:
                    spread[dim[0]] = spread.get(dim[0], 1) * size
            for name, size in spread.items():
                assert found.setdefault(name, size) == size, f"{self.op.target}: {name} is {found[name]} and {size}"
        blocked = dict(blocked or {})
        names = dict.fromkeys(name for one in everything for dim in one for name in dim)
        return Rule(
            inputs=tuple(dims),
            outputs=tuple(outputs),
            shapes=shapes,
            sizes=found,
            splits=tuple(n for n in (names if splits is None else splits) if n in names and n not in blocked),
            sums=frozenset(sums),
            specials=dict(specials or {}),
            batch_only=frozenset(batch_only),
            blocked=blocked,
            additive=frozenset(i for name in additive for i in positions.get(name, ())),
            counts={
                name: frozenset(i for argument in arguments for i in positions.get(argument, ()))
                for name, arguments in (counts or {}).items()
            },
            linear=tuple(
                group
                for group in (frozenset(i for n in names for i in positions.get(n, ())) for names in linear)
                if group
            ),
            flops=flops,
        )

    def pattern(self, text: str, given: Mapping[str, int] | None = None, **options: Any) -> Rule:
        """A rule from the notation; the tensors of the pattern are the op's tensor arguments in order."""
        bound = bind(parse(text), [t.shape for t in self.inputs], [t.shape for t in self.outputs], given)
        inputs: dict[str, list[Dims]] = {}
        for name, numbers in self.positions().items():
            for number in numbers:
                inputs.setdefault(name, []).append(bound.inputs[number])
        by_name: dict[str, Any] = {
            name: dims if isinstance(self.arguments.get(name), tuple | list) else dims[0]
            for name, dims in inputs.items()
        }
        return self.rule(by_name, list(bound.outputs), sizes=bound.sizes, **options)
