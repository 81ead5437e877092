"""Parameters of one stage on one rank: how they lie at rest, and the interface that the executor drives.

At rest a parameter is a `DTensor` (global shape, original name, this rank's shard) where the stage shards anything, and
a plain tensor where it does not; one stage never mixes the two. The mesh of these DTensors has the tensor axis *before*
the data axis, because the tensor axis cuts first: (placement, Shard(0)) read left to right is exactly what lies here.

The computation never sees them. It runs on plain local tensors that share their memory (or are copies of them in the
dtype that blocks compute in), and gradients of a step are collected apart from the `.grad` of the parameters at rest
until `deliver` adds them there. Two implementations: `Replicas` (ZeRO 0) and `Shards` (ZeRO 1 to 3, on `fully_shard`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..sharding.placement import Split
from .axis import Axis
from .ownership import Ownership
from .torch_private import dtensor_spec, local_tensor, strided_shard, wrap_local

BlockFunction = Callable[..., Any]
"""(parameters, context, *activations) -> outputs; parameters are plain tensor-local tensors in the block's order;
context is whatever the caller of the block gave, and must hold no tensors that need gradients."""


@dataclass(frozen=True)
class StageAxes:
    """The axes of a stage's (data, tensor) mesh as this rank sees them, and the axis of all its ranks together.

    `stage` is needed only where both data and tensor have more than one rank and some parameter is SHARED.
    lines: where the tensor axis consists of several model axes, `Groups.lines`.
    hybrid: where ZeRO shards over fewer than all data ranks, the data axis as two: (copies, shards), of which the second
    varies faster; None elsewhere.
    """

    data: Axis
    tensor: Axis
    stage: Axis
    rank: int
    device: torch.device
    lines: Mapping[tuple[int, ...], Axis] = field(default_factory=dict)
    hybrid: tuple[Axis, Axis] | None = None

    @property
    def data_axes(self) -> tuple[Axis, ...]:
        """The data axis as the DTensors at rest see it, outermost first; () where it has one rank."""
        return self.hybrid or ((self.data,) if self.data.size > 1 else ())

    @property
    def model(self) -> tuple[Axis, ...]:
        """The model axes, outermost first."""
        single = sorted(dims for dims in self.lines if len(dims) == 1 and dims != (0,))
        return tuple(self.lines[dims] for dims in single) or ((self.tensor,) if self.tensor.size > 1 else ())

    def along(self, numbers: tuple[int, ...], data: bool) -> Axis:
        """The axis along these model axes and, with `data`, the data axis."""
        if not self.lines:
            return (self.stage if numbers else self.data) if data else self.tensor
        return self.lines[((0,) if data else ()) + tuple(i + 1 for i in numbers)]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of the stage: original name, dtype, and where it lies on every rank of every stage.

    dtype: at rest. compute: what blocks see it in, where that is another.
    """

    fqn: str
    dtype: torch.dtype
    ownership: Ownership
    requires_grad: bool = True
    compute: torch.dtype | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute or self.dtype

    @property
    def is_cast(self) -> bool:
        return self.compute_dtype != self.dtype


class Storage(Protocol):
    """What both implementations offer.

    A step is: `begin_step`; forwards and backwards of all microbatches, each forward inside `forward`, blocks called
    through `block(index)`; `begin_last_backward` in front of the last microbatch's backward; `finish`. Where backwards are
    split, `begin_input_half` stands in front of every input half, and every weight half runs inside `weight_half`.
    Without gradients it is `begin_evaluation`, the forwards, `end_evaluation`. Either may be broken off by an error; the
    next begin starts afresh.
    """

    parameters: dict[str, nn.Parameter]

    def bind(self, index: int, function: BlockFunction) -> None:
        """Say what block `index` computes."""

    def block(self, index: int) -> Callable[..., Any]:
        """`call(context, *activations)`: the block on this rank's parameters."""

    def forward(self, function: Callable[..., Any], *activations: Any) -> Any:
        """`function(*activations)`, which calls blocks, as the forward of one microbatch of the whole stage.

        Activations that need gradients must pass through these arguments, and outputs through the return value.
        """

    def begin_step(self) -> None: ...

    def begin_evaluation(self) -> None: ...

    def end_evaluation(self) -> None:
        """Let go of what the forwards have gathered."""

    def begin_last_backward(self) -> None:
        """Gradients of the backward that follows are final: reduce each as soon as it is there."""

    def begin_input_half(self, last: bool) -> None:
        """Gradients that the input half brings wait for a weight half. last: no forward or input half comes after it."""

    def weight_half(self, last: bool) -> AbstractContextManager[None]:
        """Around the weight half of a backward. last: when it ends, every gradient of the step is there."""

    def buffers(self) -> list[Tensor]:
        """What is held besides the parameters from step to step."""

    def finish(self) -> dict[str, Tensor]:
        """Wait for the reductions; local gradients at rest by name. Parameters that got none are left out."""


@dataclass(frozen=True)
class AtRest:
    """Attached to every parameter at rest as `.autopar`: its name, and whether its elements count on this rank."""

    fqn: str
    ownership: Ownership
    counts: bool


def stage_mesh(axes: StageAxes) -> DeviceMesh:
    """The mesh of the stage's DTensors over process groups that exist: the model axes and "data" (under hybrid ZeRO
    "copies" and "shards"), those of size 1 left out."""
    if not axes.model:
        return data_mesh(axes)
    kept = (*axes.model, *axes.data_axes)
    ranks = torch.tensor(axes.stage.ranks if axes.data_axes else axes.tensor.ranks)
    mesh = ranks.view(axes.data.size, *(axis.size for axis in axes.model))
    return _mesh(kept, mesh.movedim(0, -1), axes.device)


def data_mesh(axes: StageAxes) -> DeviceMesh:
    """The mesh of the data axis alone: 1-D, or (copies, shards) under hybrid ZeRO."""
    if not axes.data_axes:
        raise ValueError("a stage of one rank has no mesh; its parameters are plain tensors")
    return _mesh(axes.data_axes, torch.tensor(axes.data.ranks), axes.device)


def _mesh(kept: Sequence[Axis], ranks: Tensor, device: torch.device) -> DeviceMesh:
    groups, names = [axis.group for axis in kept], tuple(axis.name for axis in kept)
    ranks = ranks.reshape([axis.size for axis in kept]).contiguous()
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)


def at_rest(specs: Iterable[ParameterSpec], values: Mapping[str, Tensor], axes: StageAxes) -> dict[str, nn.Parameter]:
    """The stage's parameters at rest over the local tensors `values` (not copied), by name, in the order of `specs`."""
    specs = tuple(specs)
    holders = {spec.fqn: spec.ownership.holder(axes.rank) for spec in specs}
    cut_over_data = any(holder.shards > 1 for holder in holders.values())
    sharded = cut_over_data or axes.tensor.size > 1
    mesh = stage_mesh(axes) if sharded else None
    parameters = {}
    for spec in specs:
        local = values[spec.fqn].detach()
        expected = spec.ownership.local_shape(axes.rank)
        assert tuple(local.shape) == expected and local.dtype == spec.dtype, (spec, local.shape, local.dtype)
        if mesh is not None:
            holder = holders[spec.fqn]
            placements = []
            splits = dict(holder.splits)
            placements += [_dtensor_split(splits[i]) if i in splits else Replicate() for i in range(len(axes.model))]
            if axes.data.size > 1:
                placements += [Replicate()] * (len(axes.data_axes) - 1)
                placements.append(Shard(0) if holder.shards > 1 and spec.ownership.shape else Replicate())
            local = wrap_local(local, dtensor_spec(mesh, tuple(placements), spec.ownership.shape, spec.dtype))
        parameter = nn.Parameter(local, requires_grad=spec.requires_grad)
        parameter.autopar = AtRest(spec.fqn, spec.ownership, spec.ownership.counts(axes.rank))
        parameters[spec.fqn] = parameter
    return parameters


def _dtensor_split(split: Split):
    return Shard(split.dim) if split.blocks == 1 else strided_shard(split.dim, split.blocks)


def reduction_axis(spec: ParameterSpec, axes: StageAxes) -> Axis | None:
    """The axis over which a whole (not data-sharded) gradient must be summed; None where it is whole already."""
    numbers = spec.ownership.holder(axes.rank).summed
    return axes.along(numbers, axes.data.size > 1) if numbers or axes.data.size > 1 else None


@torch.no_grad()
def deliver(
    parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], scale: Tensor | float = 1.0
) -> None:
    """Add `scale` times a step's local gradients to the `.grad` of the parameters at rest.

    Takes the gradients over: where `.grad` is None they become it without a copy. Call it once per step's gradients.
    A scale on an accelerator is never read back, so that the host does not wait for the device.
    """
    if isinstance(scale, Tensor) and scale.device.type == "cpu":
        scale = scale.item()
    if gradients and (isinstance(scale, Tensor) or scale != 1.0):
        for group in _by_dtype(gradients.values()):
            torch._foreach_mul_(group, scale.to(group[0]) if isinstance(scale, Tensor) else scale)
    have: list[Tensor] = []
    add: list[Tensor] = []
    for fqn, gradient in gradients.items():
        parameter = parameters[fqn]
        distributed = isinstance(parameter, DTensor)
        if parameter.grad is None:
            parameter.grad = wrap_local(gradient, parameter._spec) if distributed else gradient
        elif isinstance(parameter.grad, DTensor) == distributed and (
            not distributed or parameter.grad.placements == parameter.placements
        ):
            have.append(local_tensor(parameter.grad))
            add.append(gradient)
        else:
            parameter.grad.add_(wrap_local(gradient, parameter._spec) if distributed else gradient)
    if have:
        torch._foreach_add_(have, add)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
