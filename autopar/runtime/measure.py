"""Measured steps: events of every call and of the optimizer; now and then memory and collectives in detail."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..schedule.instructions import OptimizerStep
from ..timeline import Event, Timeline, joined
from .build import Runtime
from .detail import detailed
from .profile import OpSeconds
from .recorder import CollectiveSample
from .torch_private import local_tensor

_DETAILED_STEP = 2  # the first steps pay for lazy initialisation, the optimizer's too
_KEPT_STEPS = 64


class Measurement:
    """What training steps measured on this rank, and the latest joined Timeline of the world.

    A step runs from one training call to the next: the call, the optimizer and whatever else the loop does. Peak memory is
    what lies at rest (parameters, gradients, the optimizer's state) plus the peak of what the call allocates.
    """

    def __init__(self, runtime: Runtime, device: torch.device) -> None:
        self.runtime = runtime
        self.device = device
        self.timeline: Timeline | None = None
        self._laps: deque[Callable[[], float]] = deque(maxlen=_KEPT_STEPS)
        self.samples: tuple[CollectiveSample, ...] = ()
        self.peak_memory_bytes: int | None = None
        self.at_rest_bytes = 0
        self.op_seconds: OpSeconds = {}
        self.profiled_events: tuple[Event, ...] = ()
        self._steps = 0
        self._clean = False  # whether a step is under way that nothing but training has disturbed
        self._optimizer_ended: Callable[[int], None] = lambda size_bytes: None
        self._handles = _watch_optimizers(self)

    @property
    def num_steps(self) -> int:
        """Training calls so far."""
        return self._steps

    def median_step_s(self) -> float:
        """Median of the latest undisturbed steps of this rank; on CUDA waits for the device."""
        return statistics.median(lap() for lap in self._laps)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one call of the module; all ranks call alike."""
        recorder = self.runtime.recorder
        training = torch.is_grad_enabled()
        if training and self._clean:
            self._laps.append(recorder.lap())
            # Only then is the device waited for: between other steps the host may run ahead of it.
            if _is_power_of_two(self._steps):
                self._join(recorder.finished_events())
        detailed = training and self._steps == _DETAILED_STEP
        recorder.begin()
        if detailed:
            with self._in_detail():
                yield
        else:
            yield
        self._clean = training and not detailed
        self._steps += training

    @contextmanager
    def _in_detail(self) -> Iterator[None]:
        recorder = self.runtime.recorder
        axes = [a for mesh in self.runtime.groups.meshes.values() for a in mesh.lines.values() if a.size > 1]
        for axis in axes:
            axis.on_collective = recorder.collective
        self.at_rest_bytes = self._bytes_at_rest()
        try:
            with detailed(self.device) as detail:
                yield
        finally:
            for axis in axes:
                axis.on_collective = None
        self.samples = tuple(recorder.samples)
        # CUDA's peak counts what lies at rest already.
        self.peak_memory_bytes = detail.peak_bytes + (0 if self.device.type == "cuda" else self.at_rest_bytes)
        self.profiled_events = recorder.finished_events()
        self.op_seconds = detail.op_seconds

    def _bytes_at_rest(self) -> int:
        storage = self.runtime.storage
        tensors = storage.buffers()
        for parameter in storage.parameters.values():
            tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
        optimizer = self._optimizer()
        if optimizer is not None:
            tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        memory = [local_tensor(t).untyped_storage() for t in tensors]
        # Gradients may be views of one bucket, which then counts once.
        return sum({s.data_ptr(): s.nbytes() for s in memory}.values())

    def _join(self, events: tuple[Event, ...]) -> None:
        recorder, peak_bytes = self.runtime.recorder, self.peak_memory_bytes
        peaks = {} if peak_bytes is None else {recorder.rank: peak_bytes}
        mine = Timeline(events, self._laps[-1](), peaks, tuple(recorder.transfers), tuple(recorder.waits))
        everyone: list[Any] = [mine]
        if dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        self.timeline = joined(everyone)

    _optimizer: Any = staticmethod(lambda: None)

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self._optimizer_ended = self.runtime.recorder.started(str(OptimizerStep(self.runtime.groups.stage)))

    def optimizer_ends(self) -> None:
        self._optimizer_ended(0)


def _watch_optimizers(measurement: Measurement) -> list[Any]:
    """Hear of steps of optimizers that hold this model's parameters; the hooks do not keep the model alive."""
    watcher = ref(measurement)

    def mine(optimizer: Optimizer) -> Measurement | None:
        found = watcher()
        if found is None:
            return None
        own = {id(p) for p in found.runtime.storage.parameters.values()}
        return found if any(id(p) in own for group in optimizer.param_groups for p in group["params"]) else None

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if found := mine(optimizer):
            found.optimizer_begins(optimizer)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if found := mine(optimizer):
            found.optimizer_ends()

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


def _is_power_of_two(number: int) -> bool:
    return number >= 2 and number & (number - 1) == 0
