"""Gradient clipping by the norm of the whole model's gradient, however its parameters lie."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .torch_private import local_tensor


@torch.no_grad()
def clip_grad_norm_(
    model_or_parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` on the unsharded model: scale gradients so that their norm is <= max_norm.

    Every element counts once, wherever it is held more than once (replicas, tied parameters). All ranks must call it,
    each with its own parameters. Returns the norm before clipping, the same scalar on every rank. `norm_type` may be
    inf.

    ValueError for a parameter that `autopar.parallelize` did not make, or a norm_type that is not positive.
    RuntimeError where `error_if_nonfinite` and the norm is not finite.
    """
    if isinstance(model_or_parameters, nn.Module):
        model_or_parameters = model_or_parameters.parameters()
    elif isinstance(model_or_parameters, Tensor):
        model_or_parameters = [model_or_parameters]
    parameters = list(model_or_parameters)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: norm_type={norm_type}; expected a positive number or inf")
    strangers = [tuple(p.shape) for p in parameters if not hasattr(p, "autopar")]
    if strangers:
        raise ValueError(
            f"clip_grad_norm_: {len(strangers)} parameters, the first of shape {strangers[0]}, are not parameters of a "
            "model that autopar.parallelize returned; use torch.nn.utils.clip_grad_norm_ for those"
        )
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    counted = [local_tensor(p.grad) for p in parameters if p.grad is not None and p.autopar.counts]
    counted = [g for g in counted if g.numel()]
    device = local_tensor(parameters[0]).device if parameters else _collective_device()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group in _by_dtype(counted):
        norms = torch.stack([n.double() for n in torch._foreach_norm(group, norm_type)])
        total = torch.maximum(total, norms.max()) if math.isinf(norm_type) else total + norms.pow(norm_type).sum()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM)
    if not math.isinf(norm_type):
        total = total.pow(1.0 / norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the gradient's norm of order {norm_type} is {total.item()}, so it cannot be clipped")
    # The same expression as torch's, 1e-6 included; clamped on the device, so that the host need not wait for it.
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for group in _by_dtype(gradients):
        torch._foreach_mul_(group, scale.to(group[0].dtype))
    return total.float()


def _collective_device() -> torch.device:
    """Where a rank without parameters holds its zero."""
    nccl = dist.is_initialized() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
