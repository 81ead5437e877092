"""The private interfaces of torch.distributed that the runtime needs. Tested with torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard


def all_gather_single(
    output: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Join equal parts of all ranks in `output`; torch 2.13 renamed the function."""
    call = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return call(output, part, group=group, async_op=async_op)


def reduce_scatter_single(
    output: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Sum `whole` over the ranks and keep this rank's part; torch 2.13 renamed the function."""
    call = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return call(output, whole, group=group, async_op=async_op)


def _parameter_groups(states: Iterable[Any]) -> list[Any]:
    """The groups of parameters of `fully_shard`ed modules; torch 2.12 gave a module several."""
    found = []
    for member in states:
        if hasattr(member, "_fsdp_param_groups"):
            found += member._fsdp_param_groups
        elif member._fsdp_param_group is not None:
            found.append(member._fsdp_param_group)
    return found


def forget_gathers(root: FSDPModule) -> None:
    """Let go of what a `fully_shard`ed module has gathered ahead and nothing has used: it would be taken for fresh."""
    for group in _parameter_groups(root._get_fsdp_state()._state_ctx.all_states):
        pending, group._all_gather_result = group._all_gather_result, None
        if pending is not None and pending.all_gather_work is not None:
            pending.all_gather_work.wait()


def forget_step(root: FSDPModule) -> None:
    """Bring a `fully_shard`ed module back to between two steps after an error in the midst of one; its gradients go."""
    state = root._get_fsdp_state()
    states = state._state_ctx.all_states
    groups = _parameter_groups(states)
    for group in groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
    if hasattr(root, "reset_iter_state"):  # torch 2.13
        root.reset_iter_state()
        return
    communication = state._comm_ctx
    communication.all_gather_state = None
    communication.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    idle = type(state._training_state).IDLE
    for member in states:
        member._training_state = idle
    for group in groups:
        group.finalize_backward()
        group._partial_reduce_output = None
        group._training_state = idle
        group._to_sharded()


def end_backward(root: FSDPModule, brought: dict[int, set[object]] | None = None) -> None:
    """What a `fully_shard`ed module does at the end of a backward, for gradients that have come outside of one.

    brought: by group, the parameters whose gradients its first call found, kept by the caller for a step: later calls
    reduce the same ones, with zeros where nothing new has come, as sums over several reductions want.
    """
    state = root._get_fsdp_state()
    groups = _parameter_groups(state._state_ctx.all_states)
    for number, group in enumerate(groups if brought is not None else ()):
        here = {p for p in group.fsdp_params if hasattr(p, "_unsharded_param")}
        here = {p for p in here if p.unsharded_accumulated_grad is not None or p._unsharded_param.grad is not None}
        for parameter in brought.setdefault(number, here) - here:
            parameter._unsharded_param.grad = torch.zeros_like(parameter._unsharded_param)
    state._root_post_backward_final_callback()


def default_store() -> dist.Store | None:
    """The key-value store behind the default process group, None without one."""
    if not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def own_connection() -> dist.Store | None:
    """The default store over a connection of its own, for another thread: one client serves one call at a time.

    None without a store, and for one that cannot be shared.
    """
    store = default_store()
    try:
        return None if store is None else store.clone()
    except RuntimeError:
        return None


def abort_process_groups() -> None:
    """Close this rank's connections of every group, so that ranks that wait for it fail instead of waiting on."""
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


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


def replace_local(parameter: torch.nn.Parameter, local: torch.Tensor) -> None:
    """Let the parameter's own shard lie in the memory of `local`, which is like it; the parameter stays the same object."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = local
    else:
        parameter.data = local


def stored_at(file: str, start_byte: int, num_bytes: int) -> _StorageInfo:
    """Where torch.distributed.checkpoint's file reader finds one piece of a tensor."""
    return _StorageInfo(file, start_byte, num_bytes)


def place_of(stored: _StorageInfo) -> tuple[str, int, int]:
    """The file, first byte and number of bytes of a piece that torch.distributed.checkpoint has written."""
    return stored.relative_path, stored.offset, stored.length


@contextmanager
def pretended_world(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world whose other ranks do not exist: collectives return at once and exchange nothing.

    What this rank computes and holds is as in the real world, its values are not. Python objects that it would be sent
    are its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gather(objects: list[object], own: object, group: dist.ProcessGroup | None = None) -> None:
        objects[:] = [own] * len(objects)

    exchanging = dist.broadcast_object_list, dist.all_gather_object
    dist.broadcast_object_list = lambda objects, src=0, group=None: None
    dist.all_gather_object = gather
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        yield
    finally:
        dist.broadcast_object_list, dist.all_gather_object = exchanging
        if dist.is_initialized():
            dist.destroy_process_group()
