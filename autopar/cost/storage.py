"""Which tensors share storage, and which layout-preserving ops have to copy, from the bases that capture observed."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph

VIEWS = frozenset(
    (
        *("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "flatten", "unflatten", "ravel", "squeeze"),
        *("unsqueeze", "t", "numpy_T", "mT", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
        *("expand", "expand_as", "slice", "select", "narrow", "diagonal", "unfold", "alias", "detach"),
        *("split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "chunk", "unbind"),
        *("real", "imag", "view_as_real", "view_as_complex"),
    )
)


def base_name(target: str) -> str:
    """ "aten.add.Tensor" -> "add", "autopar.cross_entropy_sum" -> "cross_entropy_sum"."""
    return target.split(".")[1]


@dataclass(frozen=True)
class Storages:
    """source: for a tensor that shares the storage of an input of its producer, that input. copies: names of view ops
    whose result is a storage of its own."""

    source: dict[str, str]
    copies: frozenset[str]

    def root(self, tensor: str) -> str:
        """The tensor that owns the storage of `tensor`."""
        while tensor in self.source:
            tensor = self.source[tensor]
        return tensor


def storages(graph: Graph) -> Storages:
    """`Tensor.base` holds for the whole of a model; here it is followed op by op."""
    source: dict[str, str] = {}
    copies: set[str] = set()
    for op in graph.ops:
        for name in op.outputs:
            base = graph.tensors[name].base
            aliased = [n for n in op.inputs if base and base in (n, graph.tensors[n].base)]
            if aliased:
                source[name] = aliased[0]
            elif base_name(op.target) in VIEWS:
                copies.add(op.name)
    return Storages(source, frozenset(copies))
