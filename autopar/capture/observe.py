"""Run every op once on fake tensors: shapes and strides of its outputs, views among them, and what autograd keeps.

Ops of equal signature are run once, so a deep model costs no more than one of its layers. On fake CPU tensors composite
operators choose their kernels as on real ones: scaled_dot_product_attention takes the flash kernel where it has no
dropout, and keeps query, key, value, output and the logsumexp (and a float mask where it was given one); with dropout
it takes the plain kernel, which keeps the attention weights. A GPU's flash kernel keeps less under dropout, so that
memory predicted for it errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..graph import DEVICE, Op, Ref, map_refs
from ..ops import OPAQUE, resolve
from ..torch_private import fake_mode, storage_key
from .draft import Draft


@dataclass(frozen=True, slots=True)
class Form:
    """What decides how an op treats a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """outputs: form of each, and the position of the input (among distinct inputs) whose storage it shares, or None.

    saved_inputs, saved_outputs: positions whose storage autograd keeps; saved_extra_bytes: what it keeps besides.
    """

    outputs: tuple[tuple[Form, int | None], ...]
    saved_inputs: tuple[int, ...] = ()
    saved_outputs: tuple[int, ...] = ()
    saved_extra_bytes: int = 0


@dataclass(frozen=True)
class Survey:
    """forms: of every tensor. base: for every tensor that is a view, the tensor whose storage it shows."""

    forms: Mapping[str, Form]
    base: Mapping[str, str]
    observations: Mapping[str, Observation]


class Observer:
    """Keeps what it has seen, by signature, so that surveys of the same graph after each pass cost little."""

    def __init__(self) -> None:
        self._mode = fake_mode()
        self._seen: dict[str, Observation] = {}

    def survey(self, draft: Draft, grad: bool = True) -> Survey:
        """Observe every op in order. grad=False treats every tensor as not requiring grad (and allows in-place ops)."""
        forms: dict[str, Form] = {}
        base: dict[str, str] = {}
        observations: dict[str, Observation] = {}
        for t in draft.tensors.values():
            if t.role != "activation":
                forms[t.name] = Form(t.shape, _contiguous(t.shape), t.dtype, grad and t.requires_grad)
        for op in draft.ops:
            seen = _opaque_observation(op, draft, forms) if op.target == OPAQUE else self.observe(op, forms)
            observations[op.name] = seen
            inputs = tuple(dict.fromkeys(op.inputs))
            assert len(seen.outputs) == len(op.outputs), (op, seen)
            for name, (form, position) in zip(op.outputs, seen.outputs, strict=True):
                forms[name] = form
                if position is not None:
                    base[name] = base.get(inputs[position], inputs[position])
        return Survey(forms, base, observations)

    def observe(self, op: Op, forms: Mapping[str, Form]) -> Observation:
        """`op` on tensors of these forms."""
        names = tuple(dict.fromkeys(op.inputs))
        local = {name: i for i, name in enumerate(names)}
        args, kwargs = (map_refs(value, lambda ref: Ref(f"#{local[ref.name]}")) for value in (op.args, op.kwargs))
        # repr tells 1, 1.0 and True apart, which compare equal.
        signature = repr((op.target, args, kwargs, op.no_grad, [forms[name] for name in names]))
        if signature not in self._seen:
            self._seen[signature] = self._run(op, [forms[name] for name in names], local)
        return self._seen[signature]

    def _run(self, op: Op, forms: list[Form], local: dict[str, int]) -> Observation:
        with self._mode:
            leaves = [torch.empty_strided(f.shape, f.stride, dtype=f.dtype, device="cpu") for f in forms]
            for leaf, form in zip(leaves, forms, strict=True):
                leaf.requires_grad_(form.requires_grad)

            def fill(value: Any) -> Any:
                if isinstance(value, Ref):
                    return leaves[local[value.name]]
                if value is DEVICE:
                    return torch.device("cpu")
                return tuple(fill(v) for v in value) if isinstance(value, tuple) else value

            saved: list[torch.Tensor] = []

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            with torch.set_grad_enabled(not op.no_grad), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                out = resolve(op.target)(*fill(op.args), **{name: fill(value) for name, value in op.kwargs})
        outputs = tuple(out) if isinstance(out, tuple | list) else (out,)
        input_at = {storage_key(t): i for i, t in reversed(list(enumerate(leaves)))}
        output_at = {storage_key(t): i for i, t in reversed(list(enumerate(outputs)))}
        extra = {
            storage_key(t): t.untyped_storage().nbytes()
            for t in saved
            if storage_key(t) not in input_at and storage_key(t) not in output_at
        }
        keys = {storage_key(t) for t in saved}
        return Observation(
            tuple((_form(t), input_at.get(storage_key(t))) for t in outputs),
            tuple(sorted(i for key, i in input_at.items() if key in keys)),
            tuple(sorted(i for key, i in output_at.items() if key in keys and key not in input_at)),
            sum(extra.values()),
        )


def apply_survey(draft: Draft, survey: Survey) -> None:
    """Write what was observed into the draft's tensors and ops."""
    for name, tensor in draft.tensors.items():
        form = survey.forms.get(name)
        if tensor.role == "activation" and form is not None:
            assert form.shape == tensor.shape and form.dtype == tensor.dtype, (tensor, form)
            draft.tensors[name] = replace(tensor, requires_grad=form.requires_grad, base=survey.base.get(name, ""))

    def with_saves(op: Op) -> Op:
        if op.target == OPAQUE:
            return op
        seen, inputs = survey.observations[op.name], tuple(dict.fromkeys(op.inputs))
        saves = (*(inputs[i] for i in seen.saved_inputs), *(op.outputs[i] for i in seen.saved_outputs))
        return replace(op, saves=saves, saved_extra_bytes=seen.saved_extra_bytes)

    draft.ops = [with_saves(op) for op in draft.ops]


def _opaque_observation(op: Op, draft: Draft, forms: Mapping[str, Form]) -> Observation:
    grad = not op.no_grad and any(forms[name].requires_grad for name in op.inputs)
    tensors = [draft.tensors[name] for name in op.outputs]
    return Observation(
        tuple((Form(t.shape, _contiguous(t.shape), t.dtype, grad and t.dtype.is_floating_point), None) for t in tensors)
    )


def _form(tensor: torch.Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
