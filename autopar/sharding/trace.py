"""What is known of an index tensor's values: whether it merely counts the rows of a dim."""

from __future__ import annotations

from ..graph import Graph
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
