"""Straight-line Python functions from a list of calls: what each rank runs in place of the captured ops.

A generated function costs what hand-written eager code costs: one bound call per op, constants bound once, and every
value dropped right after its last use so that memory follows liveness and not the function's scope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..graph import iterate_refs, map_refs


@dataclass(frozen=True, slots=True)
class Call:
    """`outputs = function(*args, **kwargs)`; args hold `Ref`s to values by name, anything else is a constant.

    keep: "op" or "conversion" where selective recomputation keeps the results, "begin" what starts such a conversion.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[str, ...]
    returns_sequence: bool = False
    keep: Literal["", "op", "conversion", "begin"] = ""

    @property
    def is_expensive(self) -> bool:
        """Whether it takes long enough to hide something behind it."""
        return self.keep == "op"


def compile_calls(
    name: str,
    calls: Sequence[Call],
    arguments: Sequence[tuple[str, Sequence[str]]],
    results: Sequence[str],
    keeper: str = "",
) -> Callable[..., tuple[Any, ...]]:
    """One function that runs `calls` and returns the values named in `results` as a tuple.

    arguments: per parameter of the function its name and the names of the values in the sequence passed for it.
    A list of one name prefixed "=" is a value passed by itself.
    keeper: the value passed by itself through whose `keep_op`, `keep_conversion` and `keep_begin` the calls to keep go; ""
    for none.
    """
    variables: dict[str, str] = {}
    lines: list[str] = []
    constants: dict[str, Any] = {}

    def bind(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def variable(value: str) -> str:
        return variables.setdefault(value, f"v{len(variables)}")

    def source(value: Any) -> str:
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, _Variable):
            return value.name
        if isinstance(value, tuple):
            if any(isinstance(item, _Variable) for item in _leaves(value)):
                return "(" + "".join(f"{source(item)}, " for item in value) + ")"
            return bind(value)
        return bind(value)

    last_use: dict[str, int] = {}
    for position, call in enumerate(calls):
        for ref in iterate_refs((call.args, tuple(v for _, v in call.kwargs))):
            last_use[ref.name] = position
    kept = {*results, keeper}
    for parameter, values in arguments:
        if len(values) == 1 and values[0].startswith("="):
            variables[values[0][1:]] = parameter
        elif values:
            lines.append("".join(f"{variable(v)}, " for v in values) + f"= {parameter}")
            lines.append(f"del {parameter}")
    for position, call in enumerate(calls):
        args, kwargs = map_refs((call.args, tuple(v for _, v in call.kwargs)), lambda r: _Variable(variable(r.name)))
        passed = [source(a) for a in args]
        passed += [f"{key}={source(v)}" for (key, _), v in zip(call.kwargs, kwargs, strict=True)]
        if keeper and call.keep:
            invocation = f"{keeper}.keep_{call.keep}({', '.join([bind(call.function), *passed])})"
        else:
            invocation = f"{bind(call.function)}({', '.join(passed)})"
        targets = ", ".join(variable(o) for o in call.outputs)
        if call.returns_sequence and len(call.outputs) == 1:
            targets += ","
        lines.append(f"{targets} = {invocation}" if targets else invocation)
        for value in call.outputs:
            last_use.setdefault(value, position)
        dead = [v for v, last in last_use.items() if last == position and v not in kept and v in variables]
        if dead:
            lines.append("del " + ", ".join(variables[v] for v in dead))
    lines.append("return (" + "".join(f"{variable(v)}, " for v in results) + ")")
    header = f"def {name}({', '.join(parameter for parameter, _ in arguments)}):"
    text = header + "\n    " + "\n    ".join(lines) + "\n"
    scope = dict(constants)
    exec(compile(text, f"<autopar {name}>", "exec"), scope)
    function = scope[name]
    function.source = text
    function.constants = constants
    return function


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str


def _leaves(value: Any):
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
