"""ZeRO 1 to 3: each data rank keeps a slice of every parameter, and of its gradient and optimizer state.

torch's `fully_shard` gathers and reduces, block by block. The levels of Rajbhandari et al. 2020 (ZeRO, section 5) differ
in what is whole while a step runs, and so in how often they communicate (M microbatches):

    level  parameters                     gradients                          gathers    reductions per step
    1      whole from first use to last   whole from first to last backward  1          1
    2      whole from first use to last   a slice                            1          M
    3      whole while a block runs       a slice                            2 M        M

Between steps all levels hold slices alone. Where backwards are split, an input half gathers as a backward does, and a
weight half, which needs no parameters, reduces what it and the input halves before it have brought. Hybrid: slices lie
over groups of consecutive data ranks, which each hold a copy of the whole; a gradient is scattered inside its group, and
summed over the groups once per step.

`fully_shard` sees the tensor-local parameters as plain tensors and knows nothing of the tensor axis: so the computation
gets plain tensors, and the parameters at rest are our own DTensors over both axes, on the memory of its shards. Its
gradients arrive in its own parameters, apart from the `.grad` of ours.

Losses are globally normalised already, hence plain sums: no division, and `set_force_sum_reduction_for_comms`, which
gloo needs as well. Parameters that it cannot cut (scalars) are kept as replicas. Parameters that several blocks use
belong to the stage, which keeps them gathered from its forward to its backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from .axis import Axis
from .buckets import BUCKET_BYTES
from .leaves import Leaves, to_host
from .storage import BlockFunction, ParameterSpec, StageAxes, at_rest, data_mesh
from .torch_private import all_gather_single, end_backward, forget_gathers, forget_step, local_tensor


class _Gathering(dist.Work):
    """A gather under way; waiting for it is noted."""

    def __init__(self, wait: Callable[[], None]):
        super().__init__()
        self._wait = wait

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._wait()
        return True


class _GatherAhead:
    """fully_shard's all-gather on hosts, where the one it has would wait for the end: this one runs while blocks compute,
    and fully_shard waits for it before it copies out what has come."""

    def __init__(self, axis: Axis):
        self._axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        work = all_gather_single(output_tensor, input_tensor, group, async_op=True)
        assert work is not None
        return _Gathering(self._axis.under_way("all_gather", output_tensor, work))


class _Context:
    """The first argument of a block's call. In a class of its own because fully_shard searches arguments for tensors
    that need gradients, in every dataclass, list and dict, and builds those anew."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value


class _Unit(nn.Module):
    """What `fully_shard` gathers together: parameters of one dtype, and the call that needs them."""

    def __init__(self, parameters: Mapping[str, Tensor], requires_grad: Mapping[str, bool]):
        super().__init__()
        # Dots are not allowed in parameter names, and nobody but this file sees these.
        self.keys = {fqn: f"p{number}" for number, fqn in enumerate(parameters)}
        for fqn, tensor in parameters.items():
            self.register_parameter(self.keys[fqn], nn.Parameter(tensor, requires_grad=requires_grad[fqn]))
        self.call: Callable[..., Any] | None = None

    def forward(self, *arguments: Any) -> Any:
        assert self.call is not None, "a block was called before `bind`"
        return self.call(*arguments)


class _Stage(_Unit):
    """The root: its forward is one microbatch's forward of the whole stage."""

    def forward(self, function: Callable[..., Any], *activations: Any) -> Any:
        return function(*activations)


class Shards:
    """The `Storage` of a stage with ZeRO `level` 1 to 3. Arguments as `Replicas`; `values` are slices, copied.

    The axes' `hybrid`, where there is one, says over which data ranks the slices lie.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        blocks: Mapping[int, Sequence[str]],
        values: Mapping[str, Tensor],
        axes: StageAxes,
        bucket_bytes: int = BUCKET_BYTES,
        reduction: torch.dtype = torch.float32,
        offload: bool = False,
        level: int = 3,
    ):
        assert axes.data.size > 1 and level in (1, 2, 3)
        self._level = level
        self._open = ""
        self._brought: dict[int, set[Any]] = {}
        self._specs = {spec.fqn: spec for spec in specs}
        self._axes = axes
        # A block may return a view; nothing in a captured graph writes into it, which is what torch warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)

        cut = {s.fqn for s in specs if s.ownership.holder(axes.rank).shards > 1 and s.ownership.shape}
        uses = [fqn for fqns in blocks.values() for fqn in dict.fromkeys(fqns)]
        common = [s.fqn for s in specs if s.fqn in cut and uses.count(s.fqn) != 1]
        self._stage = _Stage(*self._meta(common))
        self._layers: dict[int, list[_Unit]] = {
            index: [
                _Unit(*self._meta(names))
                for names in _alike([f for f in fqns if f in cut and f not in common], self._specs)
            ]
            for index, fqns in blocks.items()
        }
        units = [unit for layers in self._layers.values() for unit in layers]
        # As children of one root the blocks share its streams, and each prefetches the next one's parameters.
        self._stage.units = nn.ModuleList(units)
        mesh = data_mesh(axes)
        pin = axes.device.type != "cpu"
        options = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin) if offload else OffloadPolicy()}
        for unit in units:
            policy = self._policy(unit, reduction)
            fully_shard(unit, reshard_after_forward=level == 3, mp_policy=policy, **options)
        fully_shard(self._stage, mp_policy=self._policy(self._stage, reduction), **options)
        modules = [module for module in self._stage.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        if axes.device.type == "cpu":
            self._gather_ahead(modules)
        self._chain_prefetches()
        self._stage.to_empty(device="cpu" if offload else axes.device)

        self._units = units
        self._sharded = {fqn: (unit, key) for unit in (self._stage, *units) for fqn, key in unit.keys.items()}
        # These objects stay; the modules show them or their gathered counterparts in turn.
        self._slices = {fqn: unit.get_parameter(key) for fqn, (unit, key) in self._sharded.items()}
        # Our parameters at rest lie on fully_shard's memory, so that an optimizer's update is what it gathers next.
        locals_: dict[str, Tensor] = {}
        with torch.no_grad():
            for spec in specs:
                if spec.fqn in self._sharded:
                    locals_[spec.fqn] = local_tensor(self._slices[spec.fqn])
                    locals_[spec.fqn].copy_(values[spec.fqn])
                else:
                    locals_[spec.fqn] = to_host({"": values[spec.fqn]})[""] if offload else values[spec.fqn]
        self.parameters: dict[str, nn.Parameter] = at_rest(specs, locals_, axes)

        whole = [spec for spec in specs if spec.fqn not in self._sharded]
        self._leaves = Leaves(whole, self.parameters, axes, bucket_bytes, reduction, offload)
        self._blocks = {index: tuple(fqns) for index, fqns in blocks.items()}
        self._calls: dict[int, Callable[..., Any]] = {}

    def _gather_ahead(self, modules: Sequence[FSDPModule]) -> None:
        """Each unit of a forward gathers the next one ahead. On devices fully_shard does so by itself, by streams."""
        gather = _GatherAhead(self._axes.hybrid[1] if self._axes.hybrid else self._axes.data)
        for module in modules:
            module.set_custom_all_gather(gather)
        order = [self._stage, *(unit for layers in self._layers.values() for unit in layers)]
        for unit, following in zip(order, order[1:], strict=False):
            unit.set_modules_to_forward_prefetch([following])

    def _chain_prefetches(self) -> None:
        """Each unit of a backward gathers the next one ahead, and the last one none.

        By itself fully_shard goes by the order of all forwards, and at the end of a backward would gather what the
        microbatch before used last: once too often in a step.
        """
        order: list[Any] = [self._stage, *(unit for index in reversed(self._layers) for unit in self._layers[index])]
        for unit, following in zip(order, [*order[1:], order[-1]], strict=True):
            unit.set_modules_to_backward_prefetch([following])

    def _meta(self, fqns: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, bool]]:
        tensors = {
            fqn: torch.empty(
                self._specs[fqn].ownership.tensor_shape(self._axes.rank), dtype=self._specs[fqn].dtype, device="meta"
            )
            for fqn in fqns
        }
        return tensors, {fqn: self._specs[fqn].requires_grad for fqn in fqns}

    def _policy(self, unit: _Unit, reduction: torch.dtype) -> MixedPrecisionPolicy:
        """What fully_shard casts; a unit's parameters are alike in that."""
        spec = self._specs[next(iter(unit.keys))] if unit.keys else None
        if spec is None or not spec.is_cast:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(spec.compute_dtype, reduction, cast_forward_inputs=False)

    def bind(self, index: int, function: BlockFunction) -> None:
        # fully_shard swaps its modules' parameters for gathered ones, so they are looked up at each call.
        sources: list[tuple[Mapping[str, Tensor], str]] = []
        for fqn in self._blocks[index]:
            if fqn in self._sharded:
                unit, key = self._sharded[fqn]
                sources.append((unit._parameters, key))
            else:
                sources.append((self._leaves.tensors, fqn))

        def compute(context: _Context, *activations: Any) -> Any:
            return function(tuple([tensors[key] for tensors, key in sources]), context.value, *activations)

        # One unit per dtype, each around the next: fully_shard gathers only equal dtypes together.
        inner: Callable[..., Any] = compute
        for unit in reversed(self._layers[index]):
            unit.call = inner
            inner = unit.__call__
        gathered = inner

        def call(context: Any, *activations: Any) -> Any:
            return gathered(_Context(context), *activations)

        self._calls[index] = call

    def block(self, index: int) -> Callable[..., Any]:
        return self._calls[index]

    def forward(self, function: Callable[..., Any], *activations: Any) -> Any:
        return self._stage(function, *activations)

    def buffers(self) -> list[Tensor]:
        return self._leaves.buffers()

    def begin_step(self) -> None:
        self._begin("step")
        self._set_last(False)
        self._leaves.begin_step()
        self._brought.clear()
        for parameter in self._slices.values():
            parameter.grad = None

    def begin_last_backward(self) -> None:
        self._set_last(True)
        self._leaves.begin_last_backward()

    def begin_input_half(self, last: bool) -> None:
        self._set(last=False, reduces=False, frees=last or self._level == 3)

    @contextmanager
    def weight_half(self, last: bool) -> Iterator[None]:
        if last:
            self._leaves.begin_last_backward()
        yield
        # Without a reduction first: it brings gradients to the dtype that they are summed in.
        self._set(last=False, reduces=False, frees=False)
        end_backward(self._stage, self._brought if self._axes.hybrid else None)
        if last or self._level > 1:
            self._set(last, reduces=True, frees=False)
            end_backward(self._stage)

    def _set_last(self, last: bool) -> None:
        """Whether the backwards that follow are the last one."""
        self._set(last, reduces=last or self._level > 1, frees=last or self._level == 3)

    def _set(self, last: bool, reduces: bool, frees: bool) -> None:
        """What a backward ends: the step, summands of gradients, the need for whole parameters."""
        stage = self._stage
        stage.set_is_last_backward(last)
        stage.set_requires_gradient_sync(reduces)
        # Behind the line above, which sets this as well.
        stage.set_requires_all_reduce(last)
        stage.set_reshard_after_backward(frees)

    def begin_evaluation(self) -> None:
        self._begin("evaluation")
        self._leaves.refresh()

    def end_evaluation(self) -> None:
        # No backward frees what was gathered, and the next optimizer step would leave it out of date.
        for unit in (self._stage, *self._units):
            unit.reshard()
        self._open = ""

    def _begin(self, what: str) -> None:
        if self._open:
            # What was under way has failed: fully_shard still stands in the midst of it.
            forget_step(self._stage)
        # A block that did not run after all has left its parameters on their way, as they were then.
        forget_gathers(self._stage)
        self._open = what

    def finish(self) -> dict[str, Tensor]:
        self._open = ""
        gradients = self._leaves.finish()
        summands: dict[tuple[int, ...], list[Tensor]] = {}
        for fqn, parameter in self._slices.items():
            if parameter.grad is None:
                continue
            gradients[fqn] = local_tensor(parameter.grad)
            parameter.grad = None
            numbers = self._specs[fqn].ownership.holder(self._axes.rank).summed
            if numbers:
                summands.setdefault(numbers, []).append(gradients[fqn])
        for numbers, tensors in summands.items():
            _sum_in_place(tensors, self._axes.along(numbers, False), self._axes.device)
        return gradients


@torch.no_grad()
def _sum_in_place(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> None:
    """Sum each tensor over the axis, all of a dtype in one collective: what is left of a shared parameter is small."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).to(device)
        dist.all_reduce(flat, group=axis.group)
        runs = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [run.view(tensor.shape) for run, tensor in zip(runs, group, strict=True)])


def _alike(fqns: Sequence[str], specs: Mapping[str, ParameterSpec]) -> list[list[str]]:
    """In groups of equal dtypes, at rest and in use."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for fqn in dict.fromkeys(fqns):
        groups.setdefault((specs[fqn].dtype, specs[fqn].compute_dtype), []).append(fqn)
    return list(groups.values())
