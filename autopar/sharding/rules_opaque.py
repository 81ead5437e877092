"""The rule of modules that capture kept whole: rows of the batch are taken to be independent, nothing else is known."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..graph import Shape
from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction


def opaque(call: Call) -> Rule:
    """Dim 0 of arguments and results that is as long as the batch is the batch; only the batch axis may cut it."""
    batch_size = call.graph.batch_size

    def dims(shape: Shape, name: str) -> Dims:
        return tuple(("b",) if i == 0 and size == batch_size else (f"{name}_{i}",) for i, size in enumerate(shape))

    inputs: dict[str, list[Dims]] = {}
    for argument, numbers in call.positions().items():
        state = argument == "state"
        inputs[argument] = [
            tuple((f"w{n}_{i}",) for i in range(len(call.inputs[n].shape)))
            if state
            else dims(call.inputs[n].shape, f"x{n}")
            for n in numbers
        ]
    outputs = [dims(t.shape, f"y{n}") for n, t in enumerate(call.outputs)]
    names = {name for one in (*sum(inputs.values(), []), *outputs) for dim in one for name in dim} - {"b"}
    blocked = dict.fromkeys(names, "nothing is known of what an opaque module does")
    return call.rule(inputs, outputs, blocked=blocked, batch_only={"b"})


RULES: Mapping[str, RuleFunction] = MappingProxyType({"autopar.opaque": opaque})
