"""The interpreter that walks a Program with tensors: a table from instruction type to handler."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ..schedule.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    OptimizerStep,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    RestoreWeights,
    SendActivation,
    SendGradient,
    StashWeights,
    Update,
)
from ..schedule.posting import Postings
from .deferred import Owed
from .groups import Groups, Mesh
from .ownership import Ownership
from .rank_storage import RankStorage, add_gradients
from .recompute import call_block
from .recorder import Recorder
from .rewrite import Chunk
from .stage import CompiledBlock, CompiledStage
from .storage import Storage
from .ties import sum_tied
from .transport import Receive, Transport
from .versions import Versions

Place = tuple[int, int]
"""(stage, microbatch)"""


@dataclass(frozen=True, eq=False)
class StagePart:
    """One stage as this rank runs it."""

    compiled: CompiledStage
    mesh: Mesh
    storage: Storage


@dataclass(eq=False)
class _Step:
    """Tensors alive in one run of a program. rows, whole, loss: by batch; a step has batch 0, a stream has many."""

    rows: dict[int, Mapping[str, Tensor]]
    training: bool
    split: bool
    backwards_left: Counter[tuple[type, int]]
    random: Callable[[int, str], AbstractContextManager[Any]]
    optimizer: torch.optim.Optimizer | None = None
    whole: dict[Place, tuple[Tensor, ...]] = field(default_factory=dict)
    found: dict[str, list[Tensor]] = field(default_factory=dict)
    arrived: dict[Place, list[Tensor]] = field(default_factory=dict)
    inputs: dict[Place, list[Tensor]] = field(default_factory=dict)
    outputs: dict[Place, list[Tensor]] = field(default_factory=dict)
    returned: dict[Place, list[Tensor]] = field(default_factory=dict)
    gradients: dict[Place, list[Tensor]] = field(default_factory=dict)
    owed: dict[Place, Owed] = field(default_factory=dict)
    loss: dict[int, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    reduced: set[int] = field(default_factory=set)
    given: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    parameter_gradients: dict[str, Tensor] = field(default_factory=dict)

    @property
    def left_over(self) -> set[Place]:
        """Where something waits for an instruction; nowhere when a program has ended."""
        return {*self.arrived, *self.inputs, *self.outputs, *self.returned, *self.gradients, *self.owed}


@dataclass(eq=False)
class Executor:
    """Runs programs of one rank.

    parts: the stages that the rank runs, by index. Two of them that follow each other hand over without a message.
    state: buffers and constants of the graph, on the device, by tensor name.
    random(key): a context in which random ops draw from the stream of that key.
    given: this rank's parts of the outputs that the latest program was to give, by name and microbatch.
    tied: parameters of the plan that several sets of ranks hold, if this rank holds one; gradients are summed over them.
    """

    graph: Graph
    parts: Mapping[int, StagePart]
    microbatches: int
    groups: Groups
    transport: Transport
    storage: RankStorage
    recorder: Recorder
    state: Mapping[str, Tensor]
    random: Callable[[str], AbstractContextManager[Any]]
    tied: Mapping[str, Ownership]
    tied_dtypes: Mapping[str, torch.dtype]

    def __post_init__(self) -> None:
        self.current: Instruction | None = None
        self.given: dict[str, dict[int, Tensor]] = {}

    def run(
        self,
        actions: Sequence[Instruction],
        batch: Mapping[str, Tensor],
        training: bool,
        scale: Tensor | None = None,
        postings: Postings | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Execute `actions`; returns this rank's summand of the loss on the last stage (None elsewhere), and the
        gradients of the parameters at rest by original name.

        batch: this data rank's rows of every batch input, by tensor name. training: the module's mode, which is
        independent of whether `actions` hold backwards. scale: what the loss is multiplied with for the backward.
        postings: when receives are posted, where that is not left to the transport.
        """
        actions = [a for a in actions if not isinstance(a, OptimizerStep)]
        split = any(isinstance(a, BackwardInput) for a in actions)
        kinds = (Backward, BackwardInput, BackwardWeight)
        left = Counter((type(a), a.stage) for a in actions if isinstance(a, kinds))
        step = _Step({0: batch}, training, split, left, lambda _, key: self.random(key), scale=scale)
        self.storage.begin()
        differentiable = bool(step.backwards_left)
        if differentiable:
            for part in self.parts.values():
                part.storage.begin_step()
        else:
            for part in self.parts.values():
                part.storage.begin_evaluation()
        self.transport.begin(actions, postings)
        for action in actions:
            self.transport.about_to(action)
            self._execute(step, action)
        self.transport.finish()
        if differentiable:
            assert not step.left_over, f"values of {step.left_over} have not been used"
        else:
            for part in self.parts.values():
                part.storage.end_evaluation()
        self.current = None
        self.given = step.given
        return step.loss.get(0), step.parameter_gradients

    def stream(
        self,
        actions: Iterable[Instruction],
        batches: Callable[[int], Mapping[str, Tensor] | None],
        optimizer: torch.optim.Optimizer,
        training: bool,
        postings: Postings | None = None,
    ) -> Iterator[tuple[Instruction, Tensor | None]]:
        """Execute `actions` of a stream one by one; after each, the instruction, and after an update this rank's summand
        of its batch's loss.

        batches(n): the rows of batch n, None where there is none; asked for n in order, and again while it is in use.
        postings: as in `run`.
        """
        (stage,) = self.parts
        step = _Step({}, training, False, Counter(), lambda n, key: self.random(f"{key}/batch{n}"), optimizer)

        def microbatches_there() -> Iterator[int]:
            for m in itertools.count():
                if batches(m // self.microbatches) is None:
                    return
                yield m

        last = len(self.groups.plan.stages) - 1
        # The ends have nothing to receive from outside, and must not look for it through all batches.
        ahead: dict[type, Iterator[Receive]] = {}
        if stage > 0:
            ahead[ReceiveActivation] = (ReceiveActivation(stage, m, stage - 1) for m in microbatches_there())
        if stage < last:
            ahead[ReceiveGradient] = (ReceiveGradient(stage, m, stage + 1) for m in microbatches_there())

        def existing(instruction: Instruction) -> Sequence[Instruction]:
            return [r for r in postings(instruction) if batches(r.microbatch // self.microbatches) is not None]

        places = None if postings is None else existing
        self._versions(stage).begin()
        started = False
        for action in actions:
            if not started:
                if places is None:
                    self.transport.begin_with(ahead)
                else:
                    self.transport.begin((), places)
                started = True
            self.transport.about_to(action)
            if isinstance(action, Prologue):
                rows = batches(action.batch)
                assert rows is not None, action
                step.rows[action.batch] = rows
            with torch.enable_grad():
                self._execute(step, action)
            summand = None
            if isinstance(action, Update):
                del step.rows[action.batch]
                step.whole.pop((stage, action.batch), None)
                summand = step.loss.pop(action.batch, None)
            yield action, summand
        self._versions(stage).begin()
        self.transport.finish()
        self.current = None

    def _execute(self, step: _Step, action: Instruction) -> None:
        self.current = action
        self.recorder.run(str(action), _HANDLERS[type(action)], self, step, action)

    def _prologue(self, step: _Step, action: Prologue) -> int:
        part = self.parts[action.stage]
        compiled, data = part.compiled, part.mesh.data
        if compiled.prologue_function is None:
            return 0
        whole: list[Tensor] = []
        with torch.no_grad():
            parts = [
                compiled.prologue_function(
                    self._chunk(step, part, m), self._read(step, part, compiled.prologue_batch, m), ()
                )
                for m in range(action.batch * self.microbatches, (action.batch + 1) * self.microbatches)
            ]
            for values, pending in zip(zip(*parts, strict=True), compiled.pending, strict=True):
                value = values[0]
                if pending:
                    value = torch.stack(values).sum(0)
                    value = data.all_reduce(value) if data.size > 1 else value
                whole.append(value)
        step.whole[action.stage, action.batch] = tuple(whole)
        return _size_bytes(whole)

    def _forward(self, step: _Step, action: Forward) -> int:
        part, place = self.parts[action.stage], (action.stage, action.microbatch)
        assert place not in step.outputs, f"{action} has run already"
        compiled, chunk = part.compiled, self._chunk(step, part, action.microbatch)
        batch = action.microbatch // self.microbatches
        whole = step.whole.get((action.stage, batch), ())
        with torch.no_grad():
            made = compiled.side_function(chunk, self._read(step, part, compiled.side_batch, action.microbatch), whole)
        sides = dict(zip(compiled.sides, made, strict=True))
        arrived = step.arrived.pop(place, [])
        differentiable = torch.is_grad_enabled()
        if step.split:
            chunk.owed = step.owed[place] = Owed()
        for name, tensor in zip(compiled.receives, arrived, strict=True):
            tensor.requires_grad_(differentiable and self.graph.tensors[name].requires_grad)

        def run_blocks(*activations: Tensor) -> tuple[Tensor, ...]:
            for i, block in enumerate(compiled.blocks):
                call = part.storage.block(i)
                own = [sides[t] for t in block.sides]
                activations = call_block(call, block, step.training, chunk, own, activations)
            return activations

        outputs = part.storage.forward(run_blocks, *arrived)
        for name, value in chunk.given.items():
            step.given.setdefault(name, {})[action.microbatch] = value
        values = dict(zip(compiled.blocks[-1].outputs, outputs, strict=True))
        if self.graph.loss in values:
            loss = values[self.graph.loss]
            # A sum over microbatches and ranks needs more bits than one microbatch's share.
            share = loss.detach().to(loss_dtype(loss.dtype), copy=True)
            before = step.loss.get(batch)
            step.loss[batch] = share if before is None else before + share
            leaving = [loss if step.scale is None else loss * step.scale]
        else:
            leaving = [values[t] for t in compiled.sends]
            if action.stage + 1 in self.parts:
                step.arrived[action.stage + 1, action.microbatch] = [t.detach() for t in leaving]
        if differentiable:
            step.inputs[place] = [t for t in arrived if t.requires_grad]
        if differentiable or action.stage + 1 not in self.parts:
            step.outputs[place] = leaving
        return 0

    def _backward(self, step: _Step, action: Backward | BackwardInput) -> int:
        place = (action.stage, action.microbatch)
        last, storage = self._is_last(step, action), self.parts[action.stage].storage
        if isinstance(action, BackwardInput):
            storage.begin_input_half(last)
        elif last:
            storage.begin_last_backward()
        roots = [t for t in step.outputs.pop(place) if t.requires_grad]
        torch.autograd.backward(roots, step.returned.pop(place, None))
        inputs = step.inputs.pop(place)
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        if action.stage - 1 in self.parts:
            step.returned[action.stage - 1, action.microbatch] = gradients
        elif action.stage > 0:
            step.gradients[place] = gradients
        return 0

    def _backward_weight(self, step: _Step, action: BackwardWeight) -> int:
        with self.parts[action.stage].storage.weight_half(self._is_last(step, action)):
            step.owed.pop((action.stage, action.microbatch)).settle()
        return 0

    def _is_last(self, step: _Step, action: Backward | BackwardInput | BackwardWeight) -> bool:
        """Whether a stage runs no more of this kind in the step. Counts: ask once for each instruction."""
        key = type(action), action.stage
        step.backwards_left[key] -= 1
        return step.backwards_left[key] == 0

    def _send_activation(self, step: _Step, action: SendActivation) -> int:
        place = (action.stage, action.microbatch)
        outputs = step.outputs[place] if torch.is_grad_enabled() else step.outputs.pop(place)
        return self.transport.send(action, outputs)

    def _receive_activation(self, step: _Step, action: ReceiveActivation) -> int:
        arrived = step.arrived[action.stage, action.microbatch] = self.transport.receive(action)
        return _size_bytes(arrived)

    def _send_gradient(self, step: _Step, action: SendGradient) -> int:
        return self.transport.send(action, step.gradients.pop((action.stage, action.microbatch)))

    def _receive_gradient(self, step: _Step, action: ReceiveGradient) -> int:
        returned = step.returned[action.stage, action.microbatch] = self.transport.receive(action)
        return _size_bytes(returned)

    def _reduce(self, step: _Step, action: ReduceGradients) -> int:
        add_gradients(step.parameter_gradients, self.parts[action.stage].storage.finish())
        step.reduced.add(action.stage)
        if not self.tied or step.reduced != set(self.parts):
            return 0
        return sum_tied(step.parameter_gradients, self.tied, self.tied_dtypes, self.groups.rank, self.recorder.device)

    def _stash(self, step: _Step, action: StashWeights) -> int:
        self._versions(action.stage).stash(action.version)
        return 0

    def _restore(self, step: _Step, action: RestoreWeights) -> int:
        self._versions(action.stage).restore(action.version)
        return 0

    def _update(self, step: _Step, action: Update) -> int:
        assert step.optimizer is not None
        return self._versions(action.stage).update(step.optimizer)

    def _versions(self, stage: int) -> Versions:
        storage = self.parts[stage].storage
        assert isinstance(storage, Versions), storage
        return storage

    def _chunk(self, step: _Step, part: StagePart, microbatch: int) -> Chunk:
        """Which part of the batch this rank computes: the batch is cut in time first, then over data."""
        rows, (batch, place) = part.compiled.rows, divmod(microbatch, self.microbatches)
        return Chunk(
            rows.first(place), rows.units, partial(step.random, batch), rows.length, part.mesh.data, step.found
        )

    def _read(self, step: _Step, part: StagePart, names: Sequence[str], microbatch: int) -> list[Tensor]:
        """This rank's rows of one microbatch of the batch inputs, buffers and constants, by name."""
        found = []
        batch, place = divmod(microbatch, self.microbatches)
        for name in names:
            if name in self.state:
                found.append(self.state[name])
                continue
            tensor = step.rows[batch][name]
            if part.compiled.batch_splits[name]:
                rows = tensor.shape[0] // self.microbatches
                tensor = tensor.narrow(0, place * rows, rows)
            found.append(tensor)
        return found


# Unbound, so that an executor does not refer to itself: with its model go the tensors that it holds.
_HANDLERS: Mapping[type, Callable[[Executor, _Step, Any], int]] = MappingProxyType(
    {
        Prologue: Executor._prologue,
        Forward: Executor._forward,
        Backward: Executor._backward,
        BackwardInput: Executor._backward,
        BackwardWeight: Executor._backward_weight,
        SendActivation: Executor._send_activation,
        ReceiveActivation: Executor._receive_activation,
        SendGradient: Executor._send_gradient,
        ReceiveGradient: Executor._receive_gradient,
        ReduceGradients: Executor._reduce,
        StashWeights: Executor._stash,
        RestoreWeights: Executor._restore,
        Update: Executor._update,
    }
)


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
