"""The rule of modules that capture kept whole: rows of the batch are taken to be independent, nothing else is known."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..graph import Shape
from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction
from .trace import derives_from_batch


def opaque(call: Call) -> Rule:
    """Rows of arguments and results may be cut along the batch, by the batch axis only.

    The first dim of an argument is rows where it is as long as the batch, or a multiple of it (rows times places, as
    experts take them) in a tensor made from the batch; of a result, where it is as long as some argument's rows.
    """
    batch_size = call.graph.batch_size
    counts = {batch_size}
    sizes: dict[str, int] = {}

    def dims(shape: Shape, name: str) -> Dims:
        rest = tuple((f"{name}_{i}",) for i in range(len(shape)))
        if not shape or shape[0] not in counts or shape[0] == 0:
            return rest
        if shape[0] == batch_size:
            return (("b",), *rest[1:])
        sizes[f"{name}_rows"] = shape[0] // batch_size
        return (("b", f"{name}_rows"), *rest[1:])

    numbers = call.positions()
    given = [n for argument, listed in numbers.items() if argument != "state" for n in listed]
    for n in given:
        tensor = call.inputs[n]
        rows = tensor.shape[0] if tensor.shape else 1
        if rows > batch_size and rows % batch_size == 0 and derives_from_batch(call.graph, tensor.name):
            counts.add(rows)
    inputs: dict[str, list[Dims]] = {}
    for argument, listed in numbers.items():
        state = argument == "state"
        inputs[argument] = [
            tuple((f"w{n}_{i}",) for i in range(len(call.inputs[n].shape)))
            if state
            or not (derives_from_batch(call.graph, call.inputs[n].name) or call.inputs[n].shape[:1] == (batch_size,))
            else dims(call.inputs[n].shape, f"x{n}")
            for n in listed
        ]
    outputs = [dims(t.shape, f"y{n}") for n, t in enumerate(call.outputs)]
    names = {name for one in (*sum(inputs.values(), []), *outputs) for dim in one for name in dim} - {"b"}
    blocked = dict.fromkeys(names, "nothing is known of what an opaque module does")
    sizes["b"] = batch_size
    return call.rule(inputs, outputs, blocked=blocked, sizes=sizes, batch_only={"b"})


RULES: Mapping[str, RuleFunction] = MappingProxyType({"autopar.opaque": opaque})
