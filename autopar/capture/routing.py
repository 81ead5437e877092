"""Rows sorted by group, treated group by group and put back, as one op: `autopar.routed_rows`.

Mixtures of experts are written so, in many ways; what is recognised is what the ops do, whoever wrote them:

    values, order = sort(groups)                       groups [S] is the group of every row
    rows  = tokens[order // K]                         or operands[order]
    ends  = cumsum(histc(values, E))                   where each group's rows end
    y     = body(rows, operands, values, ends, weights)
    out   = y[inverse of order]

The body must treat rows alike, and its values must be used nowhere else. Where anything is different nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..graph import Op, Ref, Tensor, iterate_refs, map_refs
from ..ops import bind, is_aten, resolve
from ..routed import ENDS, GROUPS, ROWS, Body, operand, shared, weight
from .draft import Draft

GROUPED_PRODUCTS = ("_grouped_mm", "grouped_mm_fallback")
_SIZED = ("view", "reshape", "_unsafe_view", "expand")
# Ops on rows one by one, whose dim arguments (if any) are checked.
_BY_ROW = (
    "chunk", "split", "split_with_sizes", "narrow", "slice", "select", "unsqueeze", "squeeze", "softmax", "sum", "mean",
    "amax", "layer_norm", "rms_norm", "stack", "cat", "unbind", "flatten", "transpose",
)  # fmt: skip


class _Otherwise(Exception):
    """The ops are not what is recognised."""


def route_rows(draft: Draft) -> None:
    """Replace what is recognised; the ops that are left over are dead."""
    for op in list(draft.ops):
        if _kind(op) in ("sort", "argsort"):
            try:
                _Routing(draft, op).replace()
            except _Otherwise:
                continue


def _kind(op: Op) -> str:
    return op.target.split(".")[1]


def _require(condition: bool) -> None:
    if not condition:
        raise _Otherwise


@dataclass(frozen=True)
class _Pick:
    """source[order // repeat]"""

    op: Op
    source: str
    repeat: int


class _Routing:
    def __init__(self, draft: Draft, sort: Op) -> None:
        self.draft, self.sort = draft, sort
        self.producer = {name: op for op in draft.ops for name in op.outputs}
        self.consumers: dict[str, list[Op]] = {}
        for op in draft.ops:
            for name in dict.fromkeys(op.inputs):
                self.consumers.setdefault(name, []).append(op)
        self.groups = sort.inputs[0]
        self.order = sort.outputs[-1]
        self.values = sort.outputs[0] if len(sort.outputs) == 2 else ""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.draft.tensors[name].shape

    def uses(self, name: str) -> list[Op]:
        return self.consumers.get(name, [])

    def replace(self) -> None:
        draft, sort = self.draft, self.sort
        bound = bind(sort)
        _require(len(self.shape(self.groups)) == 1 and not bound.get("descending") and not sort.no_grad)
        self.count = self.shape(self.groups)[0]
        picks, inverse = self._follow_order()
        tokens = [p for p in picks if p.repeat > 1] or picks[:1]
        _require(len(tokens) == 1 and len(self.shape(tokens[0].source)) >= 2)
        token = tokens[0]
        operands = [p for p in picks if p is not token]
        (back,) = self.uses(inverse) if len(self.uses(inverse)) == 1 else (None,)
        _require(back is not None and _kind(back) == "index" and self._numbers(back) == inverse)
        result = back.inputs[0]
        known = {token.op.outputs[0]: ROWS}
        known |= {p.op.outputs[0]: operand(i) for i, p in enumerate(operands)}
        if self.values:
            known[self.values] = GROUPS
        ends, num_groups = self._ends()
        known |= {name: ENDS for name in ends}
        body_ops = self._body(result, known, back)
        weights, others = self._weights(body_ops, known, num_groups)
        known |= {name: weight(i) for i, name in enumerate(weights)}
        known |= {name: shared(i) for i, name in enumerate(others)}
        body = self._named(body_ops, known, result)
        refs = [tuple(map(Ref, names)) for names in ([p.source for p in operands], weights, others)]
        args = (Ref(token.source), Ref(self.groups), *refs, body, token.repeat, num_groups)
        routed = draft.new_op(
            back,
            "autopar.routed_rows",
            args,
            self.shape(back.outputs[0]),
            draft.tensors[back.outputs[0]].dtype,
            "routed",
        )
        draft.ops = [
            replace(routed, outputs=back.outputs, module=token.op.module) if op is back else op for op in draft.ops
        ]
        del draft.tensors[routed.outputs[0]]

    def _numbers(self, op: Op) -> str:
        """The one index tensor of `x[numbers]`, over dim 0."""
        indices = bind(op)["indices"]
        _require(len(indices) == 1 and isinstance(indices[0], Ref))
        return indices[0].name

    def _follow_order(self) -> tuple[list[_Pick], str]:
        """What is picked in the sorted order, and the inverse of the order."""
        picks: list[_Pick] = []
        inverses: list[str] = []
        for op in self.uses(self.order):
            kind = _kind(op)
            if kind == "index" and self._numbers(op) == self.order:
                _require(self.shape(op.inputs[0])[0] == self.count)
                picks.append(_Pick(op, op.inputs[0], 1))
            elif kind in ("floor_divide", "div") and isinstance(op.args[1], int) and op.args[1] > 0:
                _require(kind == "floor_divide" or dict(op.kwargs).get("rounding_mode") in ("floor", "trunc"))
                for use in self.uses(op.outputs[0]):
                    _require(_kind(use) == "index" and self._numbers(use) == op.outputs[0])
                    _require(self.shape(use.inputs[0])[0] * op.args[1] == self.count)
                    picks.append(_Pick(use, use.inputs[0], op.args[1]))
            elif kind == "argsort":
                inverses += op.outputs
            elif kind == "index_put":
                # empty[order] = 0, 1, 2, ..
                _require(self._numbers(op) == self.order and self._counts_up(op.inputs[-1]))
                inverses += op.outputs
            else:
                _require(kind in ("empty_like", "zeros_like"))
        _require(bool(picks) and len(inverses) == 1)
        return picks, inverses[0]

    def _counts_up(self, name: str) -> bool:
        op = self.producer.get(name)
        return op is not None and _kind(op) == "arange" and [a for a in op.args if a] == [self.count]

    def _ends(self) -> tuple[list[str], int]:
        """Where each group's rows end in the sorted order (and casts of that), and how many groups there are."""
        for name in (self.values, self.groups):
            for counting in self._through_casts(name):
                kind = _kind(counting)
                if kind == "histc":
                    bound = bind(counting)
                    bins = bound["bins"]
                    _require((bound["min"], bound["max"]) == (0, bins - 1))
                elif kind == "bincount":
                    bins = bind(counting)["minlength"]
                    _require(self.shape(counting.outputs[0]) == (bins,) and len(counting.inputs) == 1)
                else:
                    continue
                for summing in self._through_casts(counting.outputs[0]):
                    if _kind(summing) == "cumsum":
                        return list(self._casts(summing.outputs[0])), int(bins)
        raise _Otherwise

    def _casts(self, name: str) -> Iterator[str]:
        yield name
        for op in self.uses(name):
            if _kind(op) in ("to", "_to_copy"):
                yield from self._casts(op.outputs[0])

    def _through_casts(self, name: str) -> Iterator[Op]:
        for op in self.uses(name) if name else ():
            if _kind(op) in ("to", "_to_copy"):
                yield from self._through_casts(op.outputs[0])
            else:
                yield op

    def _body(self, result: str, known: dict[str, str], back: Op) -> list[Op]:
        """The ops between what is known and `result`, in order; nothing else uses their values."""
        downstream: set[str] = set(known)
        members: list[Op] = []
        for op in self.draft.ops:
            if op.outputs and downstream.intersection(op.inputs) and not known.keys() & set(op.outputs):
                members.append(op)
                downstream.update(op.outputs)
        needed, body = {result}, []
        for op in reversed(members):
            if needed.intersection(op.outputs):
                body.append(op)
                needed.update(op.inputs)
        body.reverse()
        _require(bool(body) and result in body[-1].outputs)
        inside = {id(op) for op in body}
        for op in body:
            for name in op.outputs:
                _require(all(id(use) in inside or (use is back and name == result) for use in self.uses(name)))
        made = {name for op in body for name in op.outputs}
        of_rows = made | {name for name, role in known.items() if role not in (ENDS,)}
        for op in body:
            _require(not op.random and is_aten(op) and self._is_by_row(op, of_rows, known))
        for name, role in known.items():
            if role == ROWS or role.startswith("operand"):
                _require(all(id(use) in inside for use in self.uses(name)))
        return body

    def _is_by_row(self, op: Op, of_rows: set[str], known: dict[str, str]) -> bool:
        """Whether each row of the op's result depends on that row (and its group) alone."""
        kind = _kind(op)
        if any(self.shape(name)[:1] != (self.count,) for name in op.outputs):
            return False
        if kind in GROUPED_PRODUCTS:
            rows, weights, ends = op.inputs[:3]
            return len(op.inputs) == 3 and rows in of_rows and weights not in of_rows and known.get(ends) == ENDS
        if any(known.get(name) == ENDS for name in op.inputs):
            return False
        if kind == "index":
            return op.inputs[0] not in of_rows and known.get(self._numbers(op)) == GROUPS
        rank = len(self.shape(op.outputs[0]))
        for name in op.inputs:
            shape = self.shape(name)
            if name in of_rows:
                if shape[:1] != (self.count,) or (len(shape) != rank and kind not in (*_SIZED, *_BY_ROW)):
                    return False  # broadcasting would align rows with another dim
            elif len(shape) >= rank and shape[:1] not in ((), (1,)):
                return False
        if kind in _SIZED:
            sizes = bind(op).get("size") or bind(op).get("shape")
            return bool(sizes) and sizes[0] in (self.count, -1)
        if kind in _BY_ROW:
            return self._keeps_rows(op, kind)
        return kind in ("to", "_to_copy", "clone", "contiguous", "alias", "detach") or (
            torch.Tag.pointwise in resolve(op.target).tags
        )

    def _keeps_rows(self, op: Op, kind: str) -> bool:
        bound = bind(op)
        rank = len(self.shape(op.inputs[0]))
        if kind in ("layer_norm", "rms_norm"):
            return len(bound["normalized_shape"]) < rank
        if kind == "flatten":
            return bound["start_dim"] % rank > 0
        dims: list[Any] = [bound[key] for key in ("dim", "dim0", "dim1") if key in bound]
        dims = [d for entry in dims for d in (entry if isinstance(entry, tuple) else (entry,))]
        rank += kind in ("unsqueeze", "stack")
        return bool(dims) and all(isinstance(d, int) and d % rank > 0 for d in dims)

    def _weights(self, body: list[Op], known: dict[str, str], num_groups: int) -> tuple[list[str], list[str]]:
        """What the body reads from outside: the tensors that have an entry per group, and the others."""
        made = {name for op in body for name in op.outputs}
        per_group: dict[str, None] = {}
        others: dict[str, None] = {}
        for op in body:
            for i, name in enumerate(op.inputs):
                if name in made or name in known:
                    continue
                by_group = (_kind(op) in GROUPED_PRODUCTS and i == 1) or (_kind(op) == "index" and i == 0)
                (per_group if by_group else others)[name] = None
        _require(bool(per_group) and not per_group.keys() & others.keys())
        _require(all(self.shape(name)[0] == num_groups for name in per_group))
        _require(
            all(len(self.shape(name)) == 3 for op in body if _kind(op) in GROUPED_PRODUCTS for name in op.inputs[1:2])
        )
        return list(per_group), list(others)

    def _named(self, ops: list[Op], known: dict[str, str], result: str) -> Body:
        """The body in names of its own, so that equal bodies are equal."""
        names = dict(known)
        for op in ops:
            for name in op.outputs:
                names[name] = f"t{len(names) - len(known)}"
        tensors = self.draft.tensors
        kept = {name for op in ops for name in (*op.inputs, *op.outputs)} | set(known)
        forms = tuple(
            Tensor(own, tensors[name].shape, tensors[name].dtype, "activation")
            for own, name in sorted({own: name for name, own in names.items()}.items())
            if name in kept
        )
        renamed = []
        for i, op in enumerate(ops):
            args, kwargs = map_refs((op.args, tuple(v for _, v in op.kwargs)), lambda ref: Ref(names[ref.name]))
            named = tuple(zip((key for key, _ in op.kwargs), kwargs, strict=True))
            step = Op(
                f"o{i}",
                op.target,
                args,
                named,
                tuple(names[n] for n in op.outputs),
                "",
                op.returns_sequence,
                False,
                op.no_grad,
            )
            renamed.append(free_rows(step))
        assert all(ref.name in names.values() for op in renamed for ref in iterate_refs(op.args))
        return Body(tuple(renamed), names[result], forms)


def free_rows(op: Op) -> Op:
    """The op without the number of rows in its arguments."""
    if _kind(op) not in _SIZED:
        return op
    args, kwargs = list(op.args), dict(op.kwargs)
    if len(args) > 1:
        args[1] = (-1, *args[1][1:])
    else:
        key = next(iter(kwargs))
        kwargs[key] = (-1, *kwargs[key][1:])
    return replace(op, args=tuple(args), kwargs=tuple(kwargs.items()))
