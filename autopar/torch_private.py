"""The private torch interfaces that autopar needs, in one place. Tested with torch 2.11 to 2.13."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
import torch._functorch.utils as _functorch_utils
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def fake_mode() -> FakeTensorMode:
    """A mode under which tensors have shapes and no storage; real constants may meet fake tensors in it."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also of a fake tensor's; valid while the tensor lives."""
    return tensor.untyped_storage()._cdata


def schema(op: torch._ops.OpOverload) -> torch._C.FunctionSchema:
    """The operator's schema, which says what it writes and what its arguments are called."""
    return op._schema


def all_gather_single(output: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Join equal parts of all ranks in `output`; torch 2.13 renamed the function."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(output, part, group=group)


def reduce_scatter_single(output: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum `whole` over the ranks and keep this rank's part; torch 2.13 renamed the function."""
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(output, whole, group=group)


def default_store() -> dist.Store | None:
    """The key-value store behind the default process group, None without one."""
    if not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def abort_process_groups() -> None:
    """Close this rank's connections of every group, so that ranks that wait for it fail instead of waiting on."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def allocation_deltas(profile: torch.profiler.profile) -> list[int]:
    """Bytes of every CPU allocation (positive) and release (negative) that a finished profile saw, in order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@contextmanager
def forbid_custom_autograd(refuse: Callable[[type], None]) -> Iterator[None]:
    """Call `refuse(function)` when a torch.autograd.Function other than torch's own is applied in the context.

    Tracing sees the ops of such a function's forward and would differentiate these, not call its backward. Users keep
    `apply` under names of their own, so that replacing the attribute would not do: what every `apply` calls is.
    """
    unwrap = _functorch_utils.unwrap_dead_wrappers

    def unwrap_checked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        function = sys._getframe(1).f_locals.get("cls")
        if isinstance(function, type) and not function.__module__.startswith("torch."):
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


def strided_shard(dim: int, split_factor: int) -> Placement:
    """DTensor's name for Split(dim, split_factor): the dim seen as (split_factor, ranks, rest) and split on `ranks`."""
    return _StridedShard(dim, split_factor=split_factor)


def dtensor_spec(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> DTensorSpec:
    """What a contiguous DTensor of this global shape needs besides its local tensor."""
    strides = torch.empty(shape, device="meta").stride()
    return DTensorSpec(mesh, placements, tensor_meta=TensorMeta(torch.Size(shape), strides, dtype))


def wrap_local(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """`DTensor.from_local` without its autograd function and checks: about 3 us where that takes 30."""
    return DTensor(local, spec, requires_grad=False)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own shard, sharing storage and version counter; a plain tensor is its own."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_use_count(tensor: torch.Tensor) -> int:
    """How many tensors (and handles) refer to the tensor's storage now."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
