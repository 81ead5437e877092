"""The interpreter that walks a Program with tensors: a table from instruction type to handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..schedule.instructions import (
    Backward,
    Forward,
    Instruction,
    OptimizerStep,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    SendActivation,
    SendGradient,
)
from .groups import Groups
from .ownership import Ownership
from .recompute import call_block
from .recorder import Recorder
from .rewrite import Chunk
from .stage import CompiledBlock, CompiledStage
from .storage import Storage
from .ties import sum_tied
from .transport import Transport


@dataclass(eq=False)
class _Step:
    """Tensors alive in one run of a program."""

    batch: Mapping[str, Tensor]
    training: bool
    whole: tuple[Tensor, ...] = ()
    arrived: dict[int, list[Tensor]] = field(default_factory=dict)
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    returned: dict[int, list[Tensor]] = field(default_factory=dict)
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)
    backwards_left: int = 0
    loss: Tensor | None = None
    scale: Tensor | None = None
    parameter_gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Executor:
    """Runs programs of one stage on one rank.

    state: buffers and constants of the graph, on the device, by tensor name.
    random(key): a context in which random ops draw from the stream of that key.
    tied: parameters of the plan that several stages use, if this stage uses one; gradients are summed over the stages.
    """

    graph: Graph
    compiled: CompiledStage
    microbatches: int
    groups: Groups
    transport: Transport
    storage: Storage
    recorder: Recorder
    state: Mapping[str, Tensor]
    random: Callable[[str], AbstractContextManager[Any]]
    tied: Mapping[str, Ownership]
    tied_dtypes: Mapping[str, torch.dtype]

    def __post_init__(self) -> None:
        self._handlers: dict[type, Callable[[_Step, Any], int]] = {
            Prologue: self._prologue,
            Forward: self._forward,
            Backward: self._backward,
            SendActivation: self._send_activation,
            ReceiveActivation: self._receive_activation,
            SendGradient: self._send_gradient,
            ReceiveGradient: self._receive_gradient,
            ReduceGradients: self._reduce,
        }

    def run(
        self, actions: Sequence[Instruction], batch: Mapping[str, Tensor], training: bool, scale: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Execute `actions`; returns this rank's summand of the loss on the last stage (None elsewhere), and the
        gradients of the parameters at rest by original name.

        batch: this data rank's rows of every batch input, by tensor name. training: the module's mode, which is
        independent of whether `actions` hold backwards. scale: what the loss is multiplied with for the backward.
        """
        actions = [a for a in actions if not isinstance(a, OptimizerStep)]
        step = _Step(batch, training, scale=scale, backwards_left=sum(isinstance(a, Backward) for a in actions))
        self.current: Instruction | None = None
        if step.backwards_left:
            self.storage.begin_step()
        else:
            self.storage.begin_evaluation()
        self.transport.begin(actions)
        for action in actions:
            self.current = action
            self.recorder.run(str(action), self._handlers[type(action)], step, action)
        self.transport.finish()
        if not any(isinstance(a, Backward) for a in actions):
            self.storage.end_evaluation()
        self.current = None
        return step.loss, step.parameter_gradients

    def _prologue(self, step: _Step, action: Prologue) -> int:
        compiled = self.compiled
        if compiled.prologue_function is None:
            return 0
        data = self.groups.data
        with torch.no_grad():
            parts = [
                compiled.prologue_function(self._chunk(m), self._read(step, compiled.prologue_batch, m), ())
                for m in range(self.microbatches)
            ]
            for values, pending in zip(zip(*parts, strict=True), compiled.pending, strict=True):
                value = values[0]
                if pending:
                    value = torch.stack(values).sum(0)
                    value = data.all_reduce(value) if data.size > 1 else value
                step.whole += (value,)
        return sum(value.numel() * value.element_size() for value in step.whole)

    def _forward(self, step: _Step, action: Forward) -> int:
        compiled, m = self.compiled, action.microbatch
        chunk = self._chunk(m)
        with torch.no_grad():
            made = compiled.side_function(chunk, self._read(step, compiled.side_batch, m), step.whole)
        sides = dict(zip(compiled.sides, made, strict=True))
        arrived = step.arrived.pop(m, [])
        differentiable = torch.is_grad_enabled()
        for name, tensor in zip(compiled.receives, arrived, strict=True):
            tensor.requires_grad_(differentiable and self.graph.tensors[name].requires_grad)

        def run_blocks(*activations: Tensor) -> tuple[Tensor, ...]:
            for i, block in enumerate(compiled.blocks):
                call = self.storage.block(i)
                own = [sides[t] for t in block.sides]
                activations = call_block(call, block, step.training, chunk, own, activations)
            return activations

        outputs = self.storage.forward(run_blocks, *arrived)
        values = dict(zip(compiled.blocks[-1].outputs, outputs, strict=True))
        if self.graph.loss in values:
            loss = values[self.graph.loss]
            # A sum over microbatches and ranks needs more bits than one microbatch's share.
            share = loss.detach().to(loss_dtype(loss.dtype), copy=True)
            step.loss = share if step.loss is None else step.loss + share
            step.outputs[m] = [loss if step.scale is None else loss * step.scale]
        else:
            step.outputs[m] = [values[t] for t in compiled.sends]
        if differentiable:
            step.inputs[m] = [t for t in arrived if t.requires_grad]
        return 0

    def _backward(self, step: _Step, action: Backward) -> int:
        m = action.microbatch
        step.backwards_left -= 1
        if step.backwards_left == 0:
            self.storage.begin_last_backward()
        roots = [t for t in step.outputs.pop(m) if t.requires_grad]
        torch.autograd.backward(roots, step.returned.pop(m, None))
        inputs = step.inputs.pop(m)
        step.gradients[m] = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        return 0

    def _send_activation(self, step: _Step, action: SendActivation) -> int:
        outputs = step.outputs[action.microbatch]
        if not torch.is_grad_enabled():
            step.outputs.pop(action.microbatch)
        return self.transport.send(action, outputs)

    def _receive_activation(self, step: _Step, action: ReceiveActivation) -> int:
        step.arrived[action.microbatch] = self.transport.receive(action)
        return _size_bytes(step.arrived[action.microbatch])

    def _send_gradient(self, step: _Step, action: SendGradient) -> int:
        return self.transport.send(action, step.gradients.pop(action.microbatch))

    def _receive_gradient(self, step: _Step, action: ReceiveGradient) -> int:
        step.returned[action.microbatch] = self.transport.receive(action)
        return _size_bytes(step.returned[action.microbatch])

    def _reduce(self, step: _Step, action: ReduceGradients) -> int:
        step.parameter_gradients = self.storage.finish()
        if not self.tied:
            return 0
        return sum_tied(step.parameter_gradients, self.tied, self.tied_dtypes, self.groups.rank, self.recorder.device)

    def _chunk(self, microbatch: int) -> Chunk:
        """Which part of the batch this rank computes: the batch is cut in time first, then over data."""
        rows = self.compiled.rows
        return Chunk(rows.first(microbatch), rows.units, self.random, rows.length)

    def _read(self, step: _Step, names: Sequence[str], microbatch: int) -> list[Tensor]:
        """This rank's rows of one microbatch of the batch inputs, buffers and constants, by name."""
        found = []
        for name in names:
            if name in self.state:
                found.append(self.state[name])
                continue
            tensor = step.batch[name]
            if self.compiled.batch_splits[name]:
                rows = tensor.shape[0] // self.microbatches
                tensor = tensor.narrow(0, microbatch * rows, rows)
            found.append(tensor)
        return found


def loss_dtype(captured: torch.dtype) -> torch.dtype:
    """In what the loss is summed up and handed out."""
    return torch.float32 if captured in (torch.float16, torch.bfloat16) else captured


def _size_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def block_function(
    parameters: Sequence[Tensor],
    around: tuple[CompiledBlock, bool, Chunk, Sequence[Tensor]],
    *activations: Tensor,
) -> tuple[Tensor, ...]:
    """What a storage binds to every block: the block's generated function for the module's mode."""
    block, training, chunk, sides = around
    return (block.training if training else block.evaluation)(chunk, parameters, activations, sides)
