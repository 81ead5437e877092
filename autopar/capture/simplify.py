"""Leave out ops that provably do nothing, and bring equivalent spellings of an op to one."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Op, Ref
from ..ops import bind, is_aten, mutated_inputs
from .draft import Draft
from .observe import Survey

# aten.view only differs from reshape in that it refuses to copy. A rank's local tensor may need the copy where the
# global tensor did not.
_RESHAPES = {"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"}
_CASTS = {"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.to.prim_dtype"}


def simplify(draft: Draft, survey: Survey) -> None:
    """Drop no-op casts, views, copies and dropouts; spell every reshape `aten.reshape`, every cast `aten.to.dtype`."""
    touched = _depends_on_trainable(draft)
    renamed: dict[str, str] = {}

    def step(op: Op) -> list[Op] | None:
        if not is_aten(op):
            return None
        if op.target == "aten.broadcast_tensors.default" and not op.no_grad and (same := _unchanged(op, survey)):
            renamed.update(same)
            return []
        source = _identity_of(op, draft, survey)
        # detach, and any view under no_grad, also cut the gradient: no identity where one could flow.
        cuts = op.target == "aten.detach.default" or (op.no_grad and op.target not in _CASTS)
        if source and not (cuts and source in touched):
            renamed[op.outputs[0]] = source
            return []
        if op.target in _RESHAPES:
            shape = draft.tensors[op.outputs[0]].shape
            return [replace(op, target="aten.reshape.default", args=(op.args[0], shape), kwargs=())]
        if op.target in _CASTS and bind(op).get("memory_format") is None:
            dtype = draft.tensors[op.outputs[0]].dtype
            return [replace(op, target="aten.to.dtype", args=(op.args[0], dtype), kwargs=())]
        if op.target == "aten.cat.default":
            return _without_empty_parts(op, draft)
        return None

    draft.rewrite(step)
    draft.rename(renamed)


def _identity_of(op: Op, draft: Draft, survey: Survey) -> str:
    """The input that the op returns unchanged, "" if it does something."""
    inputs = tuple(dict.fromkeys(op.inputs))
    if op.target.startswith("aten.lift_fresh"):
        # A constant is never written after the in-place pass, so that it need not be copied.
        return inputs[0]
    if len(op.outputs) != 1 or op.returns_sequence or mutated_inputs(op):
        return ""
    if op.target == "aten.cat.default":
        parts = _parts(op, draft)
        return parts[0].name if len(parts) == 1 else ""
    form, position = survey.observations[op.name].outputs[0]
    if position is not None and form == survey.forms[inputs[position]]:
        return inputs[position]
    return ""


def _unchanged(op: Op, survey: Survey) -> dict[str, str]:
    """For an op of several outputs that are its inputs, unchanged: which is which; empty if any differs."""
    inputs = tuple(dict.fromkeys(op.inputs))
    found = {}
    for output, (form, position) in zip(op.outputs, survey.observations[op.name].outputs, strict=True):
        if position is None or form != survey.forms[inputs[position]]:
            return {}
        found[output] = inputs[position]
    return found


def _parts(op: Op, draft: Draft) -> list[Ref]:
    """What aten.cat joins: torch ignores parts of shape [0], which key-value caches start with."""
    return [ref for ref in op.args[0] if draft.tensors[ref.name].shape != (0,)] or list(op.args[0][:1])


def _without_empty_parts(op: Op, draft: Draft) -> list[Op] | None:
    parts = _parts(op, draft)
    return None if len(parts) == len(op.args[0]) else [replace(op, args=(tuple(parts), *op.args[1:]))]


def _depends_on_trainable(draft: Draft) -> set[str]:
    found = {t.name for t in draft.tensors.values() if t.requires_grad}
    for op in draft.ops:
        if found.intersection(op.inputs):
            found.update(op.outputs)
    return found
