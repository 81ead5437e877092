"""Losses as sums over elements and global counts, so that gradients are plain sums over data ranks and microbatches.

A mean-reduced cross entropy or nll loss is `autopar.*_sum(...)` divided by `autopar.target_count(...)`: the count
depends on the batch alone, so it can be known for the whole batch before the first microbatch runs. Other losses become
their elementwise form followed by aten.mean or aten.sum. Values are those of the one-device loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..graph import Op, Ref
from ..ops import bind, with_arguments
from .draft import Draft
from .observe import Observer, Survey

_MEAN, _SUM = 1, 2  # torch.nn.functional's reduction codes; 0 is "none"
_CROSS_ENTROPY = {"aten.cross_entropy_loss.default"}
_NLL = {"aten.nll_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss2d.default"}
# Losses whose mean is over the elements of their unreduced form. ctc_loss is not: it weighs rows by target length.
_ELEMENTWISE = {
    f"aten.{name}.default"
    for name in (
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "soft_margin_loss",
        "kl_div",
        "poisson_nll_loss",
        "hinge_embedding_loss",
        "margin_ranking_loss",
        "cosine_embedding_loss",
        "triplet_margin_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
    )
}
_HALF = (torch.float16, torch.bfloat16)


def normalise_losses(draft: Draft, observer: Observer, survey: Survey) -> None:
    """Rewrite every reduced loss; the reduced value keeps its name, shape and dtype."""

    def step(op: Op) -> list[Op] | None:
        if op.target in _CROSS_ENTROPY | _NLL:
            return _as_sum(draft, op)
        if op.target in _ELEMENTWISE:
            return _as_elementwise(draft, op, observer, survey)
        return None

    draft.rewrite(step)


def _as_sum(draft: Draft, op: Op) -> list[Op] | None:
    bound = bind(op)
    if bound["reduction"] not in (_MEAN, _SUM):
        return None
    result = draft.tensors[op.outputs[0]]
    dtype = torch.float32 if result.dtype in _HALF else result.dtype
    scores, target, weight, ignore_index = (bound[k] for k in ("self", "target", "weight", "ignore_index"))
    args: tuple[Any, ...] = (scores, target, weight, ignore_index)
    if op.target in _CROSS_ENTROPY:
        ops = [_scalar(draft, op, "autopar.cross_entropy_sum", (*args, bound["label_smoothing"]), dtype)]
    else:
        ops = [_scalar(draft, op, "autopar.nll_loss_sum", args, dtype)]
    if bound["reduction"] == _MEAN:
        ops.append(_scalar(draft, op, "autopar.target_count", (target, weight, ignore_index), torch.float32))
        ops.append(_scalar(draft, op, "aten.div.Tensor", (Ref(ops[0].name), Ref(ops[1].name)), dtype))
    if dtype != result.dtype:
        ops.append(_scalar(draft, op, "aten.to.dtype", (Ref(ops[-1].name), result.dtype), result.dtype))
    return [*ops[:-1], replace(ops[-1], name=op.name, outputs=op.outputs)]


def _scalar(draft: Draft, like: Op, target: str, args: tuple[Any, ...], dtype: torch.dtype) -> Op:
    return draft.new_op(like, target, args, (), dtype, target.split(".")[1])


def _as_elementwise(draft: Draft, op: Op, observer: Observer, survey: Survey) -> list[Op] | None:
    reduction = bind(op)["reduction"]
    if reduction not in (_MEAN, _SUM):
        return None
    name = draft.fresh(op.name + "_elements")
    elements = replace(with_arguments(op, reduction=0), name=name, outputs=(name,))
    form, _ = observer.observe(elements, survey.forms).outputs[0]
    draft.add_tensor(name, form.shape, form.dtype)
    target = "aten.mean.default" if reduction == _MEAN else "aten.sum.default"
    return [elements, replace(op, target=target, args=(Ref(name),), kwargs=())]
