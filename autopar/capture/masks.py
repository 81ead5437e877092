"""Attention masks that are known before any batch is: causal ones become `is_causal`, all-true ones disappear.

A mask that depends on constants only (arange, ones, comparisons) is evaluated for real. Masks are mostly repetition:
the same rows for every batch entry and head. So tensors are kept compressed, with size 1 along every dim in which all
entries are known to be equal, and only what differs is computed. A comparison of positions that gives the causal
triangle is recognised from the two vectors compared and kept as a `_Triangle`, whatever its size. What the evaluation
cannot do cheaply (more than `_LIMIT` elements, or an op it does not know and that is large) leaves the mask as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..graph import DEVICE, Op, Ref, map_refs
from ..ops import bind, draws_random, is_aten, mutated_inputs, resolve, with_arguments
from .draft import Draft

_LIMIT = 64 * 1024 * 1024
_LOOKED_AT = 1024 * 1024  # elements up to which a value is searched for equal entries
_COMPARISONS = {"aten.le.Tensor", "aten.ge.Tensor", "aten.lt.Tensor", "aten.gt.Tensor"}
_SDPA = "aten.scaled_dot_product_attention.default"
_UNIFORM = {"aten.ones.default", "aten.zeros.default", "aten.full.default", "aten.new_ones.default"}
_UNIFORM |= {"aten.new_zeros.default", "aten.new_full.default", "aten.scalar_tensor.default"}
_POINTWISE = {"aten.__and__.Tensor", "aten.__or__.Tensor", "aten.to.dtype", "aten.masked_fill.Scalar"}
_POINTWISE |= {"aten.where.self", "aten.where.Scalar", "aten.where.ScalarSelf", "aten.where.ScalarOther"}
_AND = {"aten.__and__.Tensor", "aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.mul.Tensor"}
_ALONG_DIM = {"aten.cumsum.default", "aten.diff.default", "aten.cat.default"}


def simplify_masks(draft: Draft) -> None:
    """Rewrite every attention op whose mask is constant, and equal to the causal one or to no mask at all."""
    known = _Constants(draft)
    verdicts: dict[tuple[str, bool], str] = {}

    def step(op: Op) -> list[Op] | None:
        if op.target != _SDPA:
            return None
        bound = bind(op)
        mask = bound["attn_mask"]
        if not isinstance(mask, Ref) or bound["is_causal"]:
            return None
        query, key = (draft.tensors[bound[name].name].shape[-2] for name in ("query", "key"))
        case = mask.name, query == key
        if case not in verdicts:
            verdicts[case] = _verdict(known, draft, mask.name, query == key)
        if verdicts[case] == "causal":
            return [with_arguments(op, attn_mask=None, is_causal=True)]
        if verdicts[case] == "all":
            return [with_arguments(op, attn_mask=None)]
        return None

    draft.rewrite(step)


def _verdict(known: _Constants, draft: Draft, name: str, square: bool) -> str:
    """ "causal", "all" (nothing is masked), or "" for anything else and for what is not known."""
    mask = known.value(name)
    if isinstance(mask, _Triangle):
        return "causal" if square else ""
    if mask is None or mask.dim() < 2:
        return ""
    if mask.is_floating_point():
        # An added float: 0 keeps a score, and the lowest finite value or -inf gives it exactly weight 0.
        kept, masked = mask == 0, mask <= torch.finfo(mask.dtype).min
        if not bool((kept | masked).all()):
            return ""
    elif mask.dtype is torch.bool:
        kept = mask
    else:
        return ""
    if bool(kept.all()):
        return "all"
    length = draft.tensors[name].shape[-1]
    if not square or kept.shape[-2:] != (length, length):
        return ""
    rows = torch.arange(length)
    # Compared in slices, so that no second array of the mask's size is needed.
    for start in range(0, length, 1024):
        part = rows[start : start + 1024]
        if not bool((kept[..., start : start + 1024, :] == (rows[None, :] <= part[:, None])).all()):
            return ""
    return "causal"


@dataclass(frozen=True)
class _Triangle:
    """The boolean [..., length, length] that is true where column <= row, equal along all other dims."""

    length: int
    num_dims: int


_Value = torch.Tensor | _Triangle


class _Constants:
    """Values of tensors that derive from constants only, compressed (see the module's docstring)."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.producer = {name: op for op in draft.ops for name in op.outputs}
        self.values: dict[str, _Value | None] = {}

    def value(self, name: str) -> _Value | None:
        """The value, compressed; None where it is not constant, or too large."""
        order, pending = [], [name]
        while pending:
            current = pending.pop()
            if current in self.values or current in order:
                continue
            order.append(current)
            if current in self.producer:
                pending.extend(self.producer[current].inputs)
        position = {op.name: i for i, op in enumerate(self.draft.ops)}
        order.sort(key=lambda n: position[self.producer[n].name] if n in self.producer else -1)
        for current in order:
            self.values[current] = self._compute(current)
        return self.values[name]

    def _compute(self, name: str) -> _Value | None:
        if name in self.draft.constants:
            value = self.draft.constants[name]
            return value if value.numel() <= _LIMIT else None
        op = self.producer.get(name)
        if op is None or not is_aten(op) or draws_random(op) or mutated_inputs(op) or len(op.outputs) != 1:
            return None
        inputs = {n: self.values[n] for n in op.inputs}
        if any(value is None for value in inputs.values()):
            return None
        with torch.no_grad():
            triangle = self._triangle(op, inputs)  # type: ignore[arg-type]
            if triangle is not None:
                return triangle
            dense = {n: v if isinstance(v, torch.Tensor) else _made(v) for n, v in inputs.items()}
            if any(value is None for value in dense.values()):
                return None
            return _squeezed(self._evaluate(op, dense))  # type: ignore[arg-type]

    def _triangle(self, op: Op, inputs: dict[str, _Value]) -> _Value | None:
        """The triangle, where the op makes it from two vectors of positions, or hands it on unchanged.

        A strict comparison that is true everywhere (a window longer than the sequence) gives a compressed True.
        """
        tensor = self.draft.tensors[op.outputs[0]]
        shape = tensor.shape
        given = [v for v in inputs.values() if isinstance(v, _Triangle)]
        others = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        if op.target in _COMPARISONS and len(inputs) == 2 and len(others) == 2 and len(shape) >= 2:
            left, right = (inputs[ref.name] for ref in op.args)
            low, high = (left, right) if op.target[5] == "l" else (right, left)
            if op.target[6] != "e":
                return torch.ones((1,) * len(shape), dtype=torch.bool) if bool(low.max() < high.min()) else None
            return _Triangle(shape[-1], len(shape)) if _is_lower(low, high, shape) else None
        if not given or tensor.dtype is not torch.bool or shape[-2:] != (given[0].length,) * 2:
            return None
        same = replace(given[0], num_dims=len(shape))
        if op.target in _AND:
            return same if all(v.numel() == 1 and bool(v) for v in others) else None
        if op.target in ("aten.expand.default", "aten.alias.default", "aten.to.dtype", "aten.clone.default"):
            return same
        if op.target == "aten.unsqueeze.default":
            return same if bind(op)["dim"] % len(shape) < len(shape) - 2 else None
        return None

    def _evaluate(self, op: Op, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        shape = self.draft.tensors[op.outputs[0]].shape
        target = op.target
        if target in _UNIFORM:
            return _call(_with_size(op, (1,) * len(shape)), inputs)
        if target in ("aten.unsqueeze.default", "aten.transpose.int", "aten.permute.default", "aten.alias.default"):
            return _call(op, inputs)
        if target == "aten.expand.default":
            value = inputs[op.args[0].name]
            return value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))
        if target in ("aten.slice.Tensor", "aten.select.int"):
            bound = bind(op)
            value = inputs[op.args[0].name]
            dim = bound["dim"] % value.dim()
            if value.shape[dim] == 1:
                return value.squeeze(dim) if target == "aten.select.int" else value
            return _call(op, inputs)
        if target in _ALONG_DIM and shape:
            # Inputs must agree in every other dim, so what one of them has at full size, all get.
            along = bind(op)["dim"] % len(shape)
            dims = tuple(d for d in range(len(shape)) if d == along or any(v.shape[d] > 1 for v in inputs.values()))
            return self._called(op, {n: self._dense(n, v, dims) for n, v in inputs.items()})
        if target == "aten.index.Tensor":
            return self._index(op, inputs)
        if target in _POINTWISE or torch.Tag.pointwise in resolve(target).tags:
            if math.prod(torch.broadcast_shapes(*(v.shape for v in inputs.values()))) > _LIMIT:
                return None
            return _call(op, inputs)
        if target in ("aten.tril.default", "aten.triu.default"):
            return self._called(op, {n: self._dense(n, v, (-2, -1)) for n, v in inputs.items()})
        return self._whole(op, inputs)

    def _whole(self, op: Op, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The op on whole inputs, if its output is not too large."""
        if self.draft.tensors[op.outputs[0]].numel > _LIMIT:
            return None
        return self._called(op, {n: self._dense(n, v, None) for n, v in inputs.items()})

    def _called(self, op: Op, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor | None:
        return None if any(value is None for value in inputs.values()) else _call(op, inputs)  # type: ignore[arg-type]

    def _dense(self, name: str, value: torch.Tensor, dims: tuple[int, ...] | None) -> torch.Tensor | None:
        """The value with its full size along `dims` (None: along all); None where that is too large."""
        shape = self.draft.tensors[name].shape
        sizes = list(shape) if dims is None else list(value.shape)
        for dim in dims or ():
            sizes[dim] = shape[dim]
        return value.expand(sizes) if math.prod(sizes) <= _LIMIT else None

    def _index(self, op: Op, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """source[i0, i1, ...] with an index tensor for every dim of the source."""
        source, indices = op.args
        shape = self.draft.tensors[source.name].shape
        value = inputs[source.name]
        if len(indices) != len(shape) or not all(isinstance(i, Ref) for i in indices):
            return self._whole(op, inputs)
        used = []
        for dim, ref in enumerate(indices):
            index = inputs[ref.name]
            if index.dtype is torch.bool or int(index.min()) < -shape[dim] or int(index.max()) >= shape[dim]:
                return None
            # Along a dim of equal entries it does not matter which one is taken.
            used.append(torch.zeros((1,) * index.dim(), dtype=torch.long) if value.shape[dim] == 1 else index)
        if math.prod(torch.broadcast_shapes(*(i.shape for i in used))) > _LIMIT:
            return None
        out = value[tuple(used)]
        rank = len(self.draft.tensors[op.outputs[0]].shape)
        return out.reshape((1,) * (rank - out.dim()) + tuple(out.shape))


def _is_lower(low: _Value, high: _Value, shape: tuple[int, ...]) -> bool:
    """Whether low <= high is the causal triangle, for low varying along columns only and high along rows only."""
    length = shape[-1]
    if shape[-2] != length or length == 1:
        return False
    if low.numel() != length or low.shape[-1] != length or high.numel() != length or high.dim() < 2:
        return False
    columns, rows = low.reshape(-1), high.reshape(-1)
    if high.shape[-2] != length or not bool((columns[1:] > columns[:-1]).all()):
        return False
    # In an increasing row of columns, those <= rows[i] must be the first i + 1.
    return torch.equal(torch.searchsorted(columns, rows, right=True), torch.arange(1, length + 1))


def _made(triangle: _Triangle) -> torch.Tensor | None:
    if triangle.length**2 > _LIMIT:
        return None
    ones = torch.ones(triangle.length, triangle.length, dtype=torch.bool).tril_()
    return ones.reshape((1,) * (triangle.num_dims - 2) + tuple(ones.shape))


def _squeezed(value: torch.Tensor | None) -> torch.Tensor | None:
    """Compressed along every dim in which all entries turn out to be equal."""
    if value is None or value.numel() > _LOOKED_AT:
        return value
    for dim in range(value.dim()):
        if value.shape[dim] > 1 and bool((value == value.narrow(dim, 0, 1)).all()):
            value = value.narrow(dim, 0, 1)
    return value


def _with_size(op: Op, size: tuple[int, ...]) -> Op:
    """A creation op that makes a tensor of this size instead."""
    return op if op.target == "aten.scalar_tensor.default" else with_arguments(op, size=size)


def _call(op: Op, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    def fill(value: Any) -> Any:
        if value is DEVICE:
            return torch.device("cpu")
        return tuple(fill(v) for v in value) if isinstance(value, tuple) else value

    args, kwargs = (map_refs(v, lambda ref: inputs[ref.name]) for v in (op.args, op.kwargs))
    return resolve(op.target)(*fill(args), **{name: fill(value) for name, value in kwargs})
