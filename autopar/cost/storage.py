"""Which tensors of a graph share storage, and which layout-preserving ops have to copy.

Views share their base's storage, `reshape` and `contiguous` only sometimes do, and which depends on strides that a `Graph`
does not hold. So the ops that may alias run once on meta tensors, which carry shapes and strides but no values. Layouts are
taken at the global shape; cutting the batch or a model axis changes sizes, not the order of strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..graph import DEVICE, Graph, Op, Ref

VIEWS = frozenset(
    "view reshape transpose permute expand squeeze unsqueeze t slice select split split_with_sizes chunk unbind narrow alias "
    "detach flatten unflatten movedim moveaxis swapaxes swapdims view_as expand_as reshape_as _unsafe_view numpy_T mT "
    "unfold diagonal real imag view_as_real view_as_complex".split()
)

# Ops that give back their argument unless they have something to do.
_MAYBE_VIEWS = frozenset("contiguous to type_as float half bfloat16 dropout _to_copy alias lift_fresh".split())


def base_name(target: str) -> str:
    """"aten.add.Tensor" -> "add", "autopar.cross_entropy_sum" -> "cross_entropy_sum"."""
    return target.split(".")[1]


@dataclass(frozen=True)
class Storages:
    """source: for a tensor that aliases an input of its producer, that input. copies: names of view ops that copy."""

    source: dict[str, str]
    copies: frozenset[str]

    def root(self, tensor: str) -> str:
        """The tensor that owns the storage of `tensor`."""
        while tensor in self.source:
            tensor = self.source[tensor]
        return tensor


def storages(graph: Graph) -> Storages:
    """Follow aliases and strides through all ops of `graph`."""
    values: dict[str, torch.Tensor] = {}

    def value(name: str) -> torch.Tensor:
        if name not in values:
            tensor = graph.tensors[name]
            values[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return values[name]

    source: dict[str, str] = {}
    copies: set[str] = set()
    for op in graph.ops:
        name = base_name(op.target)
        if name == "scaled_dot_product_attention":
            # Fused kernels lay their result out as [B, S, H, E] and return it transposed to [B, H, S, E].
            shape = graph.tensors[op.outputs[0]].shape
            if len(shape) == 4:
                dtype = graph.tensors[op.outputs[0]].dtype
                laid_out = torch.empty((shape[0], shape[2], shape[1], shape[3]), dtype=dtype, device="meta")
                values[op.outputs[0]] = laid_out.transpose(1, 2)
            continue
        may_alias = name in VIEWS or name in _MAYBE_VIEWS or name.endswith("_")
        strided = any(not value(n).is_contiguous() for n in op.inputs)
        if not (may_alias or strided):
            continue
        outputs = _run(op, value)
        if outputs is None:
            continue
        for out_name, out in zip(op.outputs, outputs, strict=False):
            if tuple(out.shape) != graph.tensors[out_name].shape:
                continue
            values[out_name] = out
            owner = out.untyped_storage()._cdata
            for in_name in op.inputs:
                if value(in_name).untyped_storage()._cdata == owner:
                    source[out_name] = in_name
                    break
            else:
                if name in VIEWS:
                    copies.add(op.name)
    return Storages(source, frozenset(copies))


def _run(op: Op, value: Any) -> list[torch.Tensor] | None:
    """The outputs of `op` on meta tensors; None where it cannot run there, and its outputs count as new and contiguous."""
    package, _, rest = op.target.partition(".")
    if package != "aten":
        return None
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None)
    call = getattr(packet, overload or "default", None)
    if call is None:
        return None

    def argument(item: Any) -> Any:
        if isinstance(item, Ref):
            return value(item.name)
        if item is DEVICE:
            return torch.device("meta")
        if isinstance(item, tuple | list):
            return [argument(x) for x in item]
        return item

    try:
        with torch.no_grad():
            result = call(*(argument(a) for a in op.args), **{k: argument(v) for k, v in op.kwargs})
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    if isinstance(result, torch.Tensor):
        return [result]
    return [item for item in result if isinstance(item, torch.Tensor)]
