"""What is known of a tensor from how it was made: whether it merely counts the rows of a dim, whether it has rows."""

from __future__ import annotations

import torch

from ..graph import Graph
from ..ops import resolve
from .call import Call

KEEPS_VALUES = (
    "unsqueeze",
    "view",
    "reshape",
    "expand",
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "long",
)


def counts_rows(graph: Graph, name: str, size: int) -> int | None:
    """The dim along which tensor `name` is 0, 1, .., size - 1 and constant along all others; None if not known.

    Follows views and casts up to `arange(size)`; the dim is the only one longer than 1.
    """
    tensor = graph.tensors[name]
    longer = [i for i, s in enumerate(tensor.shape) if s != 1]
    if len(longer) != 1 or tensor.shape[longer[0]] != size:
        return None
    while (op := graph.producer.get(name)) is not None:
        kind = op.target.split(".")[1]
        if kind == "arange":
            call = Call.of(graph, op)
            starts = (call.get("start", 0) or 0, call.get("step", 1) or 1, call.get("end"))
            return longer[0] if starts == (0, 1, size) else None
        keeps = kind in KEEPS_VALUES and graph.tensors[op.inputs[0]].numel == size
        adds_zero = kind in ("add", "sub") and len(op.args) == 2 and op.args[1] == 0 and not op.kwargs
        if not keeps and not adds_zero:
            return None
        name = op.inputs[0]
    return None


def derives_from_batch(graph: Graph, name: str) -> bool:
    """Whether any input of the graph that has the batch's rows takes part in making the tensor."""
    seen, todo = {name}, [name]
    while todo:
        tensor = graph.tensors[todo.pop()]
        if tensor.role == "input" and tensor.shape[:1] == (graph.batch_size,):
            return True
        op = graph.producer.get(tensor.name)
        for source in op.inputs if op else ():
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return False


_UNIFORM = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor")


def repeats_rows(graph: Graph, name: str) -> bool:
    """Whether the tensor is known to be the same in every place of its first dim (an expanded mask)."""
    shape = graph.tensors[name].shape
    if not shape or shape[0] == 1:
        return True
    op = graph.producer.get(name)
    if op is None or op.random or op.target.startswith("autopar."):
        return False
    kind = op.target.split(".")[1]
    if kind in _UNIFORM:
        return True
    if (
        kind not in ("expand", "__and__", "__or__", *KEEPS_VALUES)
        and torch.Tag.pointwise not in resolve(op.target).tags
    ):
        return False
    for source in op.inputs:
        given = graph.tensors[source].shape
        if kind != "unsqueeze" and len(given) < len(shape):
            continue  # broadcast along the first dim
        if given[:1] != shape[:1] and given[:1] != (1,) or not repeats_rows(graph, source):
            return False
    return True
