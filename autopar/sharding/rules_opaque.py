"""The rule of modules that capture kept whole: rows of the batch are taken to be independent, nothing else is known."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..graph import Shape
from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction
from .trace import derives_from_batch, repeats_rows


def opaque(call: Call) -> Rule:
    """Rows of arguments and results may be cut along the batch, by the batch axis only.

    The first dim of an argument that is made from the batch is rows where it is as long as the batch or a multiple of it
    (rows times places, as experts take them). So is that of any argument as long as the batch that is the same in every
    row, such as an expanded mask; where it is not the same, nobody can tell whether the module takes it for rows, and the
    batch cannot be cut. The first dim of a result is rows where it is as long as the rows, or the rows times the places,
    of an argument, and where nobody reads the result.
    """
    graph, batch_size = call.graph, call.graph.batch_size
    counts = {batch_size}
    sizes: dict[str, int] = {"b": batch_size}
    blocked: dict[str, str] = {}

    def rows(shape: Shape, name: str) -> Dims:
        """The dims of a tensor whose first one is rows."""
        rest = tuple((f"{name}_{i}",) for i in range(1, len(shape)))
        if shape[0] == batch_size:
            return (("b",), *rest)
        sizes[f"{name}_rows"] = shape[0] // batch_size
        return (("b", f"{name}_rows"), *rest)

    def argument(n: int) -> Dims:
        tensor = call.inputs[n]
        shape, name = tensor.shape, f"x{n}"
        own = tuple((f"{name}_{i}",) for i in range(len(shape)))
        if not shape or shape[0] == 0 or shape[0] % batch_size:
            return own
        if derives_from_batch(graph, tensor.name):
            counts.update((shape[0], shape[0] * shape[1] if len(shape) > 2 else shape[0]))
            return rows(shape, name)
        if shape[0] == batch_size and repeats_rows(graph, tensor.name):
            return rows(shape, name)
        if shape[0] == batch_size:
            blocked["b"] = f"its argument {tensor.name} is as long as the batch, but may have other rows than those"
        return own

    def result(n: int) -> Dims:
        tensor = call.outputs[n]
        is_read = graph.consumers[tensor.name] or tensor.name in (graph.loss, *(name for _, name in graph.outputs))
        if tensor.shape and (tensor.shape[0] in counts or not is_read and tensor.shape[0] % batch_size == 0):
            return rows(tensor.shape, f"y{n}")
        return tuple((f"y{n}_{i}",) for i in range(len(tensor.shape)))

    inputs: dict[str, list[Dims]] = {}
    for name, numbers in call.positions().items():
        state = [tuple((f"w{n}_{i}",) for i in range(len(call.inputs[n].shape))) for n in numbers]
        inputs[name] = state if name == "state" else [argument(n) for n in numbers]
    outputs = [result(n) for n in range(len(call.outputs))]
    names = {name for one in (*sum(inputs.values(), []), *outputs) for dim in one for name in dim} - {"b"}
    blocked |= dict.fromkeys(names, "nothing is known of what an opaque module does")
    return call.rule(inputs, outputs, blocked=blocked, sizes=sizes, batch_only={"b"})


RULES: Mapping[str, RuleFunction] = MappingProxyType({"autopar.opaque": opaque})
