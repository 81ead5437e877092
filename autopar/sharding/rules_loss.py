"""Rules of losses. A loss that sums over rows is a summand on every rank that has some of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..graph import Shape, Tensor
from .call import Call
from .placement import REPLICATED
from .rule import Rule, Special
from .rules_pointwise import RuleFunction, aligned, full

MEAN, SUM = 1, 2  # torch's Reduction enumeration; 0 is "none"


def cross_entropy_sum(call: Call) -> Rule:
    """logits [n, v, rest..] (or [v]), target of class numbers [n, rest..] or of probabilities like logits -> [].

    Split on the classes v, each rank holds a part of every row's logits; three numbers per row are all-reduced (four
    with label smoothing), and nothing in the backward. That needs class numbers as targets and no class weights.
    """
    logits, target = call.shape("logits"), call.shape("target")
    rank = len(logits)
    dims = (("v",),) if rank == 1 else tuple(("v",) if i == 1 else (f"d{i}",) for i in range(rank))
    numbers = not call.tensor("target").dtype.is_floating_point
    rows = tuple(d for d in dims if d != ("v",))
    weighted = call.has("weight")
    blocked = {} if numbers and not weighted else {"v": "class weights or probabilities need all classes of a row"}
    count = math.prod(target) if numbers else math.prod(target) // logits[0 if rank == 1 else 1]
    values = 4 if call["label_smoothing"] else 3
    special = Special("vocab_cross_entropy", output=REPLICATED, collective_bytes=4 * values * count)
    return call.rule(
        {"logits": dims, "target": rows if numbers else dims, "weight": (("v",),)},
        [()],
        sums={name for dim in dims for name in dim},
        blocked=blocked,
        specials={"v": special},
        flops=5 * math.prod(logits),
    )


def target_count(call: Call) -> Rule:
    """The number of targets that count: adds up over the rows."""
    shape = call.shape("target")
    dims = full(shape)
    if call.tensor("target").dtype.is_floating_point:
        dims = tuple(("v",) if i == min(1, len(shape) - 1) else d for i, d in enumerate(dims))
    return call.rule(
        {"target": dims, "weight": (("v",),)},
        [()],
        sums={d[0] for d in dims} - {"v"},
        blocked={"v": "a target chooses among all classes"},
    )


def nll_loss(call: Call) -> Rule | None:
    """input [n, v, rest..], target [n, rest..]; "mean" divides by a count that depends on the targets: no rule."""
    first = next(iter(call.positions()))
    shape = call.shape(first)
    if call.get("reduction", SUM) == MEAN or len(call.outputs) > 1:
        return None
    dims = (("v",),) if len(shape) == 1 else tuple(("v",) if i == 1 else (f"d{i}",) for i in range(len(shape)))
    rows = tuple(d for d in dims if d != ("v",))
    total = call.get("reduction", SUM) == SUM
    return call.rule(
        {first: dims, "target": rows, "weight": (("v",),)},
        [() if total else rows],
        blocked={"v": "the target picks among all classes"},
        sums={d[0] for d in rows} if total else (),
        linear=[[first]],
        flops=math.prod(call.shape("target")),
    )


def cross_entropy(call: Call) -> Rule | None:
    """aten.cross_entropy_loss with reduction "none" or "sum"."""
    shape = call.shape("self")
    if call["reduction"] == MEAN:
        return None
    dims = (("v",),) if len(shape) == 1 else tuple(("v",) if i == 1 else (f"d{i}",) for i in range(len(shape)))
    rows = tuple(d for d in dims if d != ("v",))
    numbers = not call.tensor("target").dtype.is_floating_point
    total = call["reduction"] == SUM
    return call.rule(
        {"self": dims, "target": rows if numbers else dims, "weight": (("v",),)},
        [() if total else rows],
        blocked={"v": "the softmax runs over all classes"},
        sums={d[0] for d in rows} if total else (),
        flops=5 * math.prod(shape),
    )


def elementwise_loss(call: Call) -> Rule:
    """mse, l1, huber, binary cross entropy, ...: elementwise, then nothing, a sum, or a mean over all elements."""
    tensors = call.inputs
    wide = tuple(max(sizes) for sizes in zip(*(_padded(t.shape, tensors) for t in tensors), strict=True))
    dims = full(wide)
    reduced = call["reduction"] in (MEAN, SUM)
    inputs = {name: aligned(call.shape(name), wide) for name in call.positions()}
    return call.rule(
        inputs,
        [() if reduced else dims],
        sums={d[0] for d in dims} if reduced else (),
        flops=4 * math.prod(wide),
    )


def _padded(shape: Shape, tensors: Sequence[Tensor]) -> Shape:
    """With 1s in front, as long as the widest."""
    rank = max(len(t.shape) for t in tensors)
    return (1,) * (rank - len(shape)) + tuple(shape)


_ELEMENTWISE = (
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "soft_margin_loss poisson_nll_loss margin_ranking_loss hinge_embedding_loss"
)

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "autopar.cross_entropy_sum": cross_entropy_sum,
        "autopar.nll_loss_sum": nll_loss,
        "autopar.target_count": target_count,
        "aten.cross_entropy_loss": cross_entropy,
        "aten.nll_loss": nll_loss,
        "aten.nll_loss_nd": nll_loss,
        "aten.nll_loss2d": nll_loss,
        **{f"aten.{name}": elementwise_loss for name in _ELEMENTWISE.split()},
    }
)
