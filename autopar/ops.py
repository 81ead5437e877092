"""From an op's target to what runs it: ATen operators by name, and the operators of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from .graph import Op, Ref
from .routed import routed_rows
from .torch_private import schema

_HALF = (torch.float16, torch.bfloat16)


def cross_entropy_sum(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum over the targets of `torch.nn.functional.cross_entropy`; a float32 scalar for half-precision logits.

    logits [N, V, ...] or [V]; target [N, ...] class indices, or probabilities of the shape of logits.
    """
    if logits.dtype in _HALF:
        # A sum over a whole batch would overflow float16 and lose bits in bfloat16.
        losses = F.cross_entropy(logits, target, weight, None, ignore_index, None, "none", label_smoothing)
        return losses.sum(dtype=torch.float32)
    return F.cross_entropy(logits, target, weight, None, ignore_index, None, "sum", label_smoothing)


def nll_loss_sum(
    log_probabilities: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Sum over the targets of `torch.nn.functional.nll_loss`; a float32 scalar for half-precision input."""
    if log_probabilities.dtype in _HALF:
        losses = F.nll_loss(log_probabilities, target, weight, None, ignore_index, None, "none")
        return losses.sum(dtype=torch.float32)
    return F.nll_loss(log_probabilities, target, weight, None, ignore_index, None, "sum")


def target_count(target: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = -100) -> torch.Tensor:
    """What a mean-reduced cross entropy or nll loss divides its sum by: a float32 scalar.

    Class indices: the targets other than ignore_index, each counted as its class's weight. Probabilities (a floating
    target): the number of rows, whatever the weights, as torch does.
    """
    if target.is_floating_point():
        num_rows = target.numel() // max(target.shape[0 if target.dim() == 1 else 1], 1)
        return torch.full((), float(num_rows), dtype=torch.float32, device=target.device)
    kept = target != ignore_index
    if weight is None:
        return kept.sum(dtype=torch.float32)
    return torch.where(kept, weight[torch.where(kept, target, 0)], 0.0).sum(dtype=torch.float32)


OPAQUE = "autopar.opaque"


def run_opaque(
    modules: Mapping[str, torch.nn.Module],
    fqn: str,
    args: tuple[Any, ...],
    kwargs: tuple[tuple[str, Any], ...],
    state_names: tuple[str, ...],
    state: tuple[torch.Tensor, ...],
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Call the module that capture kept whole, with these parameters and buffers in place of its own.

    Returns its output tensor, or the tensors of its output tuple or dict in order.
    """
    # Generated code passes sequences as lists, and functional_call takes anything but a tuple for a single argument.
    named = dict(zip(state_names, state, strict=True))
    with _without_states(modules[fqn]):
        out = torch.func.functional_call(modules[fqn], named, tuple(args), dict(kwargs))
    return out if isinstance(out, torch.Tensor) else tuple(v for v in tree_leaves(out) if isinstance(v, torch.Tensor))


@contextmanager
def _without_states(module: torch.nn.Module) -> Iterator[None]:
    """Plain attributes are before and after as if the call were the first: no tensor that autograd has made stands in one
    before, and none stays where there was no tensor.

    What passes from step to step is a buffer. States of another kind are cleared by the code around the module, which
    runs at capture only.
    """
    kept = [(vars(part), dict(vars(part))) for part in module.modules()]
    for now, then in kept:
        now.update((name, None) for name, value in then.items() if _has_history(value))
    try:
        yield
    finally:
        for now, then in kept:
            for name in [n for n, v in now.items() if isinstance(v, torch.Tensor) and v is not then.get(n)]:
                if _has_history(now[name]) or not isinstance(then.get(name), torch.Tensor):
                    del now[name]
            now.update((name, then[name]) for name in then if name not in now or _has_history(then[name]))


def _has_history(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


OPS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "autopar.cross_entropy_sum": cross_entropy_sum,
        "autopar.nll_loss_sum": nll_loss_sum,
        "autopar.routed_rows": routed_rows,
        "autopar.target_count": target_count,
    }
)


def resolve(target: str, opaque_modules: Mapping[str, torch.nn.Module] | None = None) -> Callable[..., Any]:
    """The callable behind an `Op.target`: "aten.linear.default", "autopar.target_count", "mylib.myop.default".

    opaque_modules: `Graph.opaque_modules`, needed for "autopar.opaque" only. ValueError for an unknown operator.
    """
    if target == OPAQUE:
        assert opaque_modules is not None, "an opaque op needs Graph.opaque_modules"
        return partial(run_opaque, opaque_modules)
    if target in OPS:
        return OPS[target]
    return _overload(target)


@cache
def _overload(target: str) -> torch._ops.OpOverload:
    parts = target.split(".")
    try:
        namespace, name, overload = parts
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"unknown operator {target!r}; expected <namespace>.<name>.<overload> of a registered operator, "
            f"or one of {', '.join(OPS)}"
        ) from error


def bind(op: Op) -> dict[str, Any]:
    """The op's arguments by schema name, defaults filled in. ATen and other registered operators only."""
    bound: dict[str, Any] = {}
    given = dict(op.kwargs)
    for position, argument in enumerate(schema(_overload(op.target)).arguments):
        if position < len(op.args):
            bound[argument.name] = op.args[position]
        elif argument.name in given:
            bound[argument.name] = given[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def with_arguments(op: Op, **changes: Any) -> Op:
    """The op with these schema arguments changed, wherever they stand."""
    args, kwargs = list(op.args), dict(op.kwargs)
    arguments = schema(_overload(op.target)).arguments
    position = {argument.name: i for i, argument in enumerate(arguments) if not argument.kwarg_only}
    for name, value in changes.items():
        if name in position and position[name] < len(args):
            args[position[name]] = value
        else:
            kwargs[name] = value
    return dataclasses.replace(op, args=tuple(args), kwargs=tuple(kwargs.items()))


def is_aten(op: Op) -> bool:
    """Whether the op is a registered operator (and so has a schema), not one of ours."""
    return not op.target.startswith("autopar.")


_BUFFER_UPDATES = {
    "aten.batch_norm.default": "training",
    "aten.native_batch_norm.default": "training",
    "aten.cudnn_batch_norm.default": "training",
    "aten.instance_norm.default": "use_input_stats",
}


def mutated_inputs(op: Op) -> tuple[str, ...]:
    """Names of the tensors that the op writes in place. Running statistics are written without the schema saying so."""
    if not is_aten(op):
        return ()
    bound = bind(op)
    written = [
        bound[argument.name]
        for argument in schema(_overload(op.target)).arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if op.target in _BUFFER_UPDATES and bound[_BUFFER_UPDATES[op.target]]:
        written += [bound["running_mean"], bound["running_var"]]
    return tuple(value.name for value in written if isinstance(value, Ref))


def draws_random(op: Op) -> bool:
    """Whether the op draws random numbers with the arguments that it has."""
    if not is_aten(op) or torch.Tag.nondeterministic_seeded not in _overload(op.target).tags:
        return False
    bound = bind(op)
    probability = bound.get("dropout_p", bound.get("p"))
    train = bound.get("train", bound.get("training"))
    # A probability that is a tensor, or none at all, cannot rule the draw out.
    return not ((isinstance(probability, float | int) and probability == 0 and _is_dropout(op)) or train is False)


def _is_dropout(op: Op) -> bool:
    return "dropout" in op.target or "scaled_dot_product" in op.target


def evaluation_form(op: Op) -> Op:
    """The op as the module runs it in `eval()`: no dropout, running statistics in batch norm.

    Only what the operator's own arguments say (train, training, use_input_stats, dropout_p) is known to a graph.
    """
    if not is_aten(op):
        return op
    bound = bind(op)
    changes: dict[str, Any] = {name: False for name in ("train", "training") if bound.get(name) is True}
    if op.target == "aten.instance_norm.default" and isinstance(bound["running_mean"], Ref):
        changes["use_input_stats"] = False
    if isinstance(bound.get("dropout_p"), float | int) and bound["dropout_p"]:
        changes["dropout_p"] = 0.0
    return with_arguments(op, **changes) if changes else op
