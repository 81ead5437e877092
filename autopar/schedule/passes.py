"""Passes: Program -> Program. Each adds one kind of instruction, and its result is checked before it is handed on.

Sends are asynchronous: a group fires one as soon as the value exists and goes on computing. Receives block, and stand
directly before the compute that needs them, after the sends of what was computed before. So a group never waits with a
value in hand that its neighbour needs, and the order is free of deadlock also where a send completes only once its
receive is posted, provided that each direction between two stages is a channel of its own and keeps its order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .check import check
from .instructions import (
    Backward,
    BackwardInput,
    Forward,
    Instruction,
    OptimizerStep,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    SendActivation,
    SendGradient,
)


def add_transfers(program: Program) -> Program:
    """Sends and receives of activations (to the next stage) and gradients (to the one before).

    Two stages of one group hand over to each other without any.
    """
    return _checked(tuple(tuple(with_transfers(row, program.home)) for row in program.actions))


def with_transfers(row: Iterable[Instruction], home: Mapping[int, int]) -> Iterator[Instruction]:
    """One group's instructions with its transfers, one by one. home: the group of each stage."""

    def away(stage: int, peer: int) -> bool:
        return peer in home and home[peer] != home[stage]

    for instruction in row:
        match instruction:
            case Forward(stage, microbatch):
                if away(stage, stage - 1):
                    yield ReceiveActivation(stage, microbatch, stage - 1)
                yield instruction
                if away(stage, stage + 1):
                    yield SendActivation(stage, microbatch, stage + 1)
            case Backward(stage, microbatch) | BackwardInput(stage, microbatch):
                if away(stage, stage + 1):
                    yield ReceiveGradient(stage, microbatch, stage + 1)
                yield instruction
                if away(stage, stage - 1):
                    yield SendGradient(stage, microbatch, stage - 1)
            case _:
                yield instruction


def add_prologue(program: Program) -> Program:
    """The batch-wide values first: every microbatch's loss divides by them."""
    return _checked(
        tuple((*map(Prologue, program.stages_of(group)), *row) for group, row in enumerate(program.actions))
    )


def add_reduction(program: Program) -> Program:
    """Whole gradients, once per step, after everything that the neighbours wait for."""
    return _checked(tuple((*row, *map(ReduceGradients, _by_last_use(row))) for row in program.actions))


def add_optimizer(program: Program) -> Program:
    """The user's optimizer, last, for all stages of a group at once."""
    return _checked(
        tuple((*row, OptimizerStep(program.stages_of(group)[0])) for group, row in enumerate(program.actions))
    )


def _by_last_use(row: tuple[Instruction, ...]) -> list[int]:
    """The stages of a row in the order in which they are done with: their gradients become whole in this order."""
    last = {instruction.stage: index for index, instruction in enumerate(row)}
    return sorted(last, key=last.__getitem__)


def _checked(actions: tuple[tuple[Instruction, ...], ...]) -> Program:
    program = Program(actions)
    check(program, complete=False)
    return program
