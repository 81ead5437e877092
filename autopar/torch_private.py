"""The private torch interfaces that autopar needs; runtime/torch_private.py has those of torch.distributed.

Tested with torch 2.11 to 2.13.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch._functorch.utils as _functorch_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def fake_mode() -> FakeTensorMode:
    """A mode under which tensors have shapes and no storage; real constants may meet fake tensors in it."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def known_value(tensor: torch.Tensor) -> torch.Tensor:
    """The value that a fake tensor is known to have (one made from Python numbers is); any other tensor as it is."""
    return tensor.constant if isinstance(tensor, FakeTensor) and tensor.constant is not None else tensor


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also of a fake tensor's; valid while the tensor lives."""
    return tensor.untyped_storage()._cdata


def schema(op: torch._ops.OpOverload) -> torch._C.FunctionSchema:
    """The operator's schema, which says what it writes and what its arguments are called."""
    return op._schema


def allocation_deltas(profile: torch.profiler.profile) -> list[int]:
    """Bytes of every CPU allocation (positive) and release (negative) that a finished profile saw, in order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@contextmanager
def forbid_custom_autograd(refuse: Callable[[type], None]) -> Iterator[None]:
    """Call `refuse(function)` when a torch.autograd.Function other than torch's own is applied in the context, in this
    thread.

    Tracing sees the ops of such a function's forward and would differentiate these, not call its backward. Users keep
    `apply` under names of their own, so that replacing the attribute would not do: what every `apply` calls is.
    """
    unwrap = _functorch_utils.unwrap_dead_wrappers
    thread = threading.get_ident()

    def unwrap_checked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        function = sys._getframe(1).f_locals.get("cls")
        is_own = isinstance(function, type) and function.__module__.startswith("torch.")
        if isinstance(function, type) and not is_own and threading.get_ident() == thread:
            refuse(function)
        return unwrap(args)

    _functorch_utils.unwrap_dead_wrappers = unwrap_checked
    try:
        yield
    finally:
        _functorch_utils.unwrap_dead_wrappers = unwrap


@contextmanager
def quiet_export_failure() -> Iterator[None]:
    """Leave out the half-traced graph and the log lines that torch.export prints before it raises."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    printed = io.StringIO()
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether something sees the tensor's gradient on its way, and may change it."""
    return tensor.retains_grad or bool(tensor._backward_hooks)


def storage_use_count(tensor: torch.Tensor) -> int:
    """How many tensors (and handles) refer to the tensor's storage now."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def has_flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `flash_attention` takes these: [b, h, rows, d] on a CPU, all of one head size."""
    return query.device.type == "cpu" and query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [b, h, q, d], log-sum-exp [b, h, q] of each row's scores; 0 for a row that the additive mask hides)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_dense(t) for t in (query, key, value)), 0.0, causal, attn_mask=_four_dims(mask), scale=scale
    )


def flash_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; out and lse may be those over more keys than these."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_dense(t) for t in (gradient, query, key, value, out)),
        lse.transpose(1, 2).contiguous().transpose(1, 2),  # as the forward makes it
        0.0,
        causal,
        attn_mask=_four_dims(mask),
        scale=scale,
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _four_dims(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask[(None,) * (4 - mask.dim())]
