"""The parallel module: the unchanged training loop on the outside, a Program on the inside."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..capture.output_form import Hole
from ..capture.output_form import build as build_form
from ..graph import Graph
from ..plan import Plan
from ..schedule.instructions import Instruction
from ..schedule.orders import schedule_named
from ..timeline import Timeline
from .build import Runtime, updated_buffers
from .delivery import Delivery, delivering
from .executor import loss_dtype
from .failure import publish, stop_everyone
from .loss_scale import LossScale
from .measure import Measurement
from .outputs import whole_outputs
from .stream import Feed, agree_on_end, run_stream
from .watchdog import TIMEOUT_S, Watchdog, ring


class Output(SimpleNamespace):
    """What the parallel module returns where the original returned an object or a dict: its `loss`."""

    loss: Tensor

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)


class ParallelModule(nn.Module):
    """One rank's part of a module under a plan; made by `autopar.parallelize`.

    Call it like the original with the global batch, or with just this rank's rows (see `loader`). A call with gradients
    enabled runs the plan's whole program, forwards and backwards of all microbatches; `loss.backward()` then adds the
    gradients, scaled by whatever the loss was multiplied with, to `.grad` of the parameters. Under `torch.no_grad()`
    a call runs forwards only. outputs: "loss", or "all": a call returns what the module returns, its other outputs whole on
    every rank and detached (see runtime/outputs.py).

    parameters(): this rank's part of the parameters of its stage, under their original names.
    plan: what runs. prediction: the simulator's Timeline for it. timeline: the latest measured one.
    """

    def __init__(
        self,
        graph: Graph,
        runtime: Runtime,
        prediction: Timeline,
        device: torch.device,
        timeout_s: float = TIMEOUT_S,
        outputs: str = "loss",
    ) -> None:
        super().__init__()
        self.graph = graph
        self.prediction = prediction
        self.device = device
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        loss = graph.tensors[graph.loss].dtype
        self._loss_scale = LossScale(loss, device) if graph.precision == "float16" else None
        self.outputs = outputs
        self.install(runtime)
        self.watchdog = Watchdog(_instruction_of(weakref.ref(self)), timeout_s, device)
        weakref.finalize(self, self.watchdog.close)

    def install(self, runtime: Runtime) -> None:
        """Run by `runtime` from now on."""
        self.runtime = runtime
        self.measurement = Measurement(runtime, self.device)

    @property
    def plan(self) -> Plan:
        return self.runtime.plan

    @property
    def timeline(self) -> Timeline | None:
        """A measured step of the whole world, renewed after 2, 4, 8, ... training steps; None before."""
        return self.measurement.timeline

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        if torch.is_grad_enabled() and not schedule_named(self.plan.schedule).flushes:
            raise ValueError(
                f"plan.schedule is {self.plan.schedule!r}, which updates the weights as gradients come: train with "
                "`for loss in model.stream(batches, optimizer)`; a call under torch.no_grad() evaluates"
            )
        try:
            batch = self._rows(args, kwargs)
        except ValueError as error:
            publish(error, "reading the batch")
            raise
        differentiable = torch.is_grad_enabled()
        row = runtime.training if differentiable else runtime.evaluation
        try:
            with self.watchdog.step(), self.measurement.step():
                scale = self._loss_scale.value if self._loss_scale and differentiable else None
                summand, gradients = runtime.executor.run(row.actions, batch, self.training, scale, row.postings)
                loss, found = self._whole_loss(summand, None if scale is None else self._loss_scale.unscale(gradients))
                others = self._whole_outputs()
        except Exception as error:
            runtime.abandon()
            raise _explained(error, runtime) from error
        if differentiable:
            after = None if scale is None else partial(self._loss_scale.after, found=found)
            loss = delivering(self._anchor, loss, Delivery(runtime.storage.parameters, gradients, after))
        if others is not None:
            return self._returned(loss, others)
        return Output(loss=loss) if self.graph.loss_path else loss

    def _whole_outputs(self) -> dict[tuple[Any, ...], Tensor] | None:
        if self.outputs != "all":
            return None
        executor = self.runtime.executor
        parts, executor.given = executor.given, {}
        return whole_outputs(self.runtime, self.graph, parts, self.device)

    def _returned(self, loss: Tensor, others: dict[tuple[Any, ...], Tensor]) -> Any:
        """What the module returns; where the loss is a function of that, both."""
        form, path = self.graph.output_form, self.graph.loss_path
        if path or (form == Hole(()) and () not in others):
            return build_form(form, {**others, path: loss})
        return Output(loss=loss, output=build_form(form, others))

    def stream(self, batches: Iterable[Any], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        """Train on batch after batch without waiting for the pipeline to empty (plan.schedule "pipedream" or "2bw").

        Yields the loss of each batch, whole and in order, some batches after the optimizer has used it: `optimizer` steps
        inside, on each stage as soon as a batch's gradients are there, so the loop calls neither backward nor step.
        batches: each like the example: a tensor, a tuple of positional or a dict of keyword arguments; the same on every
        rank, or each rank's rows. Leaving the loop ends the batches that have been begun. All ranks call it alike.
        ValueError for a schedule with steps, or a batch unlike the example.
        """
        if schedule_named(self.plan.schedule).flushes:
            raise ValueError(
                f"plan.schedule is {self.plan.schedule!r}, which has steps: call the model and loss.backward(); stream wants "
                "'pipedream' or '2bw'"
            )
        return self._losses(Feed(map(self._rows_of, batches)), optimizer)

    def _losses(self, feed: Feed, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        losses = run_stream(self.runtime, feed, optimizer, self.training, self._summand)
        try:
            while True:
                with self._streaming():
                    loss = next(losses, None)
                if loss is None:
                    return
                yield loss
        except GeneratorExit:
            with self._streaming():
                agree_on_end(feed, self.device)
                deque(losses, maxlen=0)

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        try:
            with self.watchdog.step():
                yield
        except Exception as error:
            self.runtime.abandon()
            raise _explained(error, self.runtime) from error

    def _rows_of(self, batch: Any) -> dict[str, Tensor]:
        """This data rank's rows of one batch of a stream."""
        if isinstance(batch, Mapping):
            return self._rows((), dict(batch))
        return self._rows(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.runtime.storage.parameters.items():
            yield (f"{prefix}.{name}" if prefix else name), parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.graph.tensors.values():
            if tensor.role == "buffer":
                yield (f"{prefix}.{tensor.fqn}" if prefix else tensor.fqn), self.runtime.executor.state[tensor.name]

    def share_buffers(self) -> None:
        """Bring every rank's buffers to what the ranks that run the ops that write them have. All ranks call it.

        A buffer is written on the ranks of one stage alone, which are the only ones that read it in a step.
        """
        for fqn, source in updated_buffers(self.graph, self.plan).items():
            dist.broadcast(dict(self.named_buffers())[fqn], src=source)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """This rank's parameters (DTensors where the plan shards) and buffers by original name."""
        found = dict(self.named_parameters(prefix)) | dict(self.named_buffers(prefix))
        return {name: t if keep_vars else t.detach() for name, t in found.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Copy whole tensors, or tensors laid out as this rank's, into the parameters and buffers of this rank.

        ValueError when `strict` and a name of this rank is missing; names of other stages are passed over.
        """
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        missing = sorted(set(own) - set(state_dict))
        if strict and missing:
            raise ValueError(f"load_state_dict: no value for {', '.join(missing[:5])} ({len(missing)} names in all)")
        specs = {spec.fqn: spec for spec in self.runtime.specs}
        with torch.no_grad():
            for name in set(own) & set(state_dict):
                target, value = own[name], state_dict[name]
                if name in specs and not hasattr(value, "_local_tensor"):
                    local = getattr(target, "_local_tensor", target)
                    local.copy_(specs[name].ownership.take(value, self.runtime.groups.rank))
                else:
                    target.copy_(value)

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """This data rank's rows of every batch input; ValueError where the batch is not like the example."""
        mine = self.runtime.first.rows
        every, start, count = mine.of_global(self.graph.batch_size)
        rows: dict[str, Tensor] = {}
        for name, key in zip(self.graph.inputs, self.graph.input_keys, strict=True):
            expected = self.graph.tensors[name]
            value = _find(key, args, kwargs)
            if not isinstance(value, Tensor):
                raise ValueError(f"batch entry {key!r}: expected a tensor of shape {expected.shape}, got {value!r}")
            splits = self.runtime.first.batch_splits[name]
            local = (count * mine.microbatches, *expected.shape[1:]) if splits else expected.shape
            if value.dtype != expected.dtype or tuple(value.shape) not in (expected.shape, local):
                raise ValueError(
                    f"batch entry {key!r}: got {tuple(value.shape)} {value.dtype}, but the example had {expected.shape} "
                    f"{expected.dtype}; pass the global batch of that shape, or this rank's rows of shape {local} "
                    "(model.loader yields them); for another shape call autopar.parallelize again with such an example"
                )
            if splits and count < every and tuple(value.shape) == expected.shape:
                # a microbatch is cut over the data ranks, so that each has a slice of every microbatch
                value = value.unflatten(0, (mine.microbatches, every))[:, start : start + count].flatten(0, 1)
            rows[name] = value.to(self.device, non_blocking=True)
        return rows

    def _summand(self, summand: Tensor | None) -> Tensor:
        """What this rank adds to the loss: each replica of the last stage holds a summand, its tensor ranks the same one."""
        groups = self.runtime.groups
        if summand is None or groups.tensor.rank != 0:
            dtype = loss_dtype(self.graph.tensors[self.graph.loss].dtype)
            summand = torch.zeros((), dtype=dtype, device=self.device)
        return summand

    def _whole_loss(self, summand: Tensor | None, found: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The loss on every rank. found: a flag to be added up over the ranks on the way, if any."""
        summand = self._summand(summand)
        if self.plan.world_size > 1:
            together = summand if found is None else torch.stack([summand, found.to(summand.dtype)])
            dist.all_reduce(together)
            if found is not None:
                summand, found = together.unbind()
        return summand, found


def _find(key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch entry that `key` names: an int, a str, or a tuple of such for nested structures; None if absent."""
    path = key if isinstance(key, tuple) else (key,)
    value: Any = args if isinstance(path[0], int) else kwargs
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _instruction_of(model: weakref.ref[ParallelModule]) -> Callable[[], tuple[Any, int] | None]:
    """What the model executes, for its watchdog; None once the model is gone."""

    def current() -> tuple[Any, int] | None:
        alive = model()
        if alive is None:
            return None
        runtime = alive.runtime
        action = getattr(runtime.executor, "current", None)
        return action, runtime.groups.stage if action is None else action.stage

    return current


def _explained(error: Exception, runtime: Runtime) -> BaseException:
    action: Instruction | None = runtime.executor.current
    return stop_everyone(error, f"in {action} of stage {action.stage}" if action else "between instructions", ring)
