"""`capture`: from a module and one global batch to the Graph, without device memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ..graph import Graph, Precision, torch_dtype
from ..ops import mutated_inputs
from .blocks import arrange, find_blocks
from .draft import Draft
from .example import Call, Loss, describe_call
from .inplace import functionalise
from .lower import lower
from .masks import simplify_masks
from .normalise import normalise_losses
from .observe import Observer, apply_survey
from .routing import route_rows
from .simplify import simplify
from .trace import Trace, trace
from .whole import keeping_whole


def capture(
    module: torch.nn.Module, example: Any, loss: Loss | None = None, *, precision: Precision = "float32"
) -> Graph:
    """The computation of `module` in training mode with its loss, on batches like `example`.

    example: one global batch, rows first: a tensor, a tuple of positional or a dict of keyword arguments, with tensors
        (real, or on the meta device) possibly nested in tuples, lists and dicts; anything else in it is a constant.
    loss: None if the module returns the scalar loss or an object or dict with a `loss`; else called as
        loss(output, *targets), the targets being the example entries that `module.forward` does not take.
    precision: what the module's float32 parameters, and the float32 tensors that its forward is given, are cast to; what it
        casts itself stays as it says, buffers stay as they are, and "float32" casts nothing.
    Neither the module nor the example is changed, and no tensor of their size is made. ValueError for a module that
    cannot be traced (names the line), an example that does not fit it, and a loss that is missing or not a scalar.
    """
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"capture() takes an nn.Module; it was given a {type(module).__name__}")
    call = describe_call(module, example, loss)
    # Fake parameters and known masks lie on the CPU, and so must what the module's forward makes.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        dtype = torch_dtype(precision)
        traced, draft = keeping_whole(module, lambda whole: _traced(module, call, loss, whole, dtype))
    _check_trainable(draft, module)
    updated = draft.updated_buffers()
    side_ops = _side_ops(draft, updated)
    draft.ops = arrange(draft.ops, side_ops, draft.tensors, updated)
    return Graph(
        name=type(module).__name__,
        tensors=draft.tensors,
        ops=tuple(draft.ops),
        inputs=tuple(draft.inputs),
        input_keys=call.keys,
        loss=draft.loss,
        loss_path=traced.loss_path,
        outputs=tuple(draft.outputs),
        side_ops=side_ops,
        blocks=find_blocks(draft.ops, side_ops, draft.tensors, draft.loss),
        batch_size=next(t.shape[0] for t in call.tensors if t.dim()),
        constants=draft.constants,
        opaque_modules=traced.opaque.modules,
        precision=precision,
        output_form=traced.output_form,
    )


def _traced(
    module: torch.nn.Module, call: Call, loss: Loss | None, whole: frozenset[str], dtype: torch.dtype
) -> tuple[Trace, Draft]:
    traced = trace(module, call, loss, whole, dtype)
    return traced, _draft(traced, call)


def _draft(traced: Trace, call: Call) -> Draft:
    """The trace as functional ops without no-ops and known masks, losses as sums, with what autograd keeps."""
    draft = lower(traced, call)
    observer = Observer()
    functionalise(draft, observer)
    simplify(draft, observer.survey(draft, grad=False))
    simplify_masks(draft)
    draft.drop_dead()
    normalise_losses(draft, observer, observer.survey(draft, grad=False))
    route_rows(draft)
    draft.drop_dead()
    apply_survey(draft, observer.survey(draft))
    return draft


def _side_ops(draft: Draft, updated: set[str]) -> frozenset[str]:
    """Ops that depend on no parameter, no random draw and no buffer that the step updates."""
    main = {t.name for t in draft.tensors.values() if t.role == "parameter"} | updated
    side = []
    for op in draft.ops:
        if op.random or mutated_inputs(op) or main.intersection((*op.inputs, *op.outputs)):
            main.update(op.outputs)
        else:
            side.append(op.name)
    return frozenset(side)


def _check_trainable(draft: Draft, module: torch.nn.Module) -> None:
    if not draft.tensors[draft.loss].requires_grad:
        raise ValueError(
            f"the loss of {type(module).__name__} depends on no trainable parameter; expected at least one parameter "
            "with requires_grad=True on a path to the loss that is not under no_grad or detach"
        )
