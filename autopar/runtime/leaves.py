"""Parameters that every data rank holds whole, as the computation sees them, and the sums of their gradients.

A leaf shares the memory of its parameter at rest. Where blocks compute in a narrower dtype, or the parameter lies in host
memory, it is a copy instead, renewed once per call of the model. Gradients of narrow copies are summed, over microbatches
and ranks, in the dtype of reductions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .axis import synchronize
from .buckets import BUCKET_BYTES, GradientReducer, Summand
from .storage import ParameterSpec, StageAxes, reduction_axis
from .torch_private import local_tensor


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory, pinned where that speeds up transfers; those that are there already as they are."""
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        moved[name] = tensor
        if tensor.device.type != "cpu":
            moved[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            moved[name].copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors.values()}:
        synchronize(device)
    return moved


class Leaves:
    """`tensors`: by name, plain tensor-local tensors that gather gradients.

    parameters: the ones at rest, by name. reduction: dtype in which gradients of narrow copies are summed. offload: the
    parameters lie in host memory, and so do the gradients that `finish` gives.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        parameters: Mapping[str, nn.Parameter],
        axes: StageAxes,
        bucket_bytes: int = BUCKET_BYTES,
        reduction: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._dtypes = {spec.fqn: spec.dtype for spec in specs}
        self._offload = offload
        self._alone: dict[str, Tensor] = {}
        summands: list[Summand] = []
        for spec in specs:
            # A detached tensor shares memory and version counter with the parameter, but has a `.grad` of its own.
            leaf = local_tensor(parameters[spec.fqn]).detach()
            if spec.is_cast or offload:
                self._sources.append(leaf)
                leaf = leaf.to(axes.device, spec.compute_dtype, copy=True)
                self._copies.append(leaf)
            self.tensors[spec.fqn] = leaf.requires_grad_(spec.requires_grad)
            axis = reduction_axis(spec, axes)
            if spec.requires_grad and (axis is not None or spec.is_cast):
                summands.append(Summand(spec.fqn, leaf, axis, reduction if spec.is_cast else spec.dtype))
            elif spec.requires_grad:
                self._alone[spec.fqn] = leaf
        self._reducer = GradientReducer(summands, bucket_bytes)

    def refresh(self) -> None:
        """Make narrow copies equal to what lies at rest."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._sources, non_blocking=True)

    def buffers(self) -> list[Tensor]:
        """What is held besides the parameters from step to step."""
        return [*self._copies, *self._reducer.buffers()]

    def begin_step(self) -> None:
        self.refresh()
        self._reducer.begin_step()
        for leaf in self._alone.values():
            leaf.grad = None

    def begin_last_backward(self) -> None:
        self._reducer.begin_last_backward()

    def finish(self) -> dict[str, Tensor]:
        """Wait for the sums; gradients in the dtypes at rest, by name, without those that never came."""
        gradients = {name: total.to(self._dtypes[name]) for name, total in self._reducer.finish().items()}
        for name, leaf in self._alone.items():
            if leaf.grad is not None:
                gradients[name] = leaf.grad
                leaf.grad = None
        return to_host(gradients) if self._offload else gradients
