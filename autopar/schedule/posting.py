"""When a receive is posted where sender and receiver must both be there for a message to travel, as on NCCL.

There a message occupies both devices from the moment that one side is there, and the host may at any time wait for the
device (to load a kernel, to get memory). A receive that is posted too early then stops the very rank whose send its
message waits for; one posted too late leaves the sender waiting, and the message in the open. So it is posted where its
send stands, in one order of all instructions of all groups: then even if every send and every posted receive were to wait
for its other side at once, the next message in that order could always travel.
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .build import build_stream
from .instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Program,
    Prologue,
    RestoreWeights,
    StashWeights,
    Update,
)
from .steps import RECEIVES, dependencies

Postings = Callable[[Instruction], Sequence[Instruction]]
"""The receives to post in front of an instruction, in order of their sends."""

# Of a forward's time; what is not here takes none.
_DURATIONS = {Forward: 1, Backward: 2, BackwardInput: 1, BackwardWeight: 1}


def postings(program: Program, group: int) -> Mapping[Instruction, tuple[Instruction, ...]]:
    """The receives of the group's row by the instruction in front of which they are posted, in order of their sends."""
    order = _order(program)
    needs, provides = dependencies(program)
    sent = {key: order[g][i] for g, row in enumerate(provides) for i, key in enumerate(row) if key is not None}
    row = program.actions[group]
    coming: dict[int, list[tuple[int, Instruction]]] = defaultdict(list)
    for instruction, key in zip(row, needs[group], strict=True):
        if isinstance(instruction, RECEIVES):
            coming[bisect.bisect(order[group], sent[key])].append((sent[key], instruction))
    return {row[place]: tuple(receive for _, receive in sorted(pairs)) for place, pairs in coming.items()}


def stream_postings(num_stages: int, microbatches: int, schedule: str, stage: int) -> Postings:
    """The same for a stream without end, whose batches are all alike once the pipeline is full.

    What its end leaves out is not posted before its turn; nothing travels the other way by then.
    """
    first_alike = num_stages + 1
    span = -(-num_stages // microbatches) + 1
    found = postings(build_stream(num_stages, microbatches, schedule, first_alike + 2 * span), stage)

    def in_front_of(instruction: Instruction) -> Sequence[Instruction]:
        later = max(0, _batch(instruction, microbatches) - first_alike)
        known = found.get(_moved(instruction, -later, microbatches), ())
        return [_moved(receive, later, microbatches) for receive in known]

    return in_front_of


def _batch(instruction: Instruction, microbatches: int) -> int:
    return instruction.batch if isinstance(instruction, Prologue | Update) else instruction.microbatch // microbatches


def _moved(instruction: Instruction, batches: int, microbatches: int) -> Instruction:
    """The instruction that stands in the same place of the batch so many batches later."""
    if isinstance(instruction, Prologue | Update):
        return replace(instruction, batch=instruction.batch + batches)
    moved = replace(instruction, microbatch=instruction.microbatch + batches * microbatches)
    if isinstance(instruction, StashWeights | RestoreWeights):
        moved = replace(moved, version=instruction.version + batches)
    return moved


def _order(program: Program) -> list[list[int]]:
    """The number of each instruction, by group and position, in one order of all: that in which they start where a whole
    backward takes two forwards' time."""
    needs, provides = dependencies(program)
    numbers: list[list[int]] = [[] for _ in program.actions]
    available: set[object] = set()
    waiting: dict[object, tuple[int, int]] = {}
    ready = [(0, group) for group in range(len(program.actions))]
    count = 0
    while ready:
        clock, group = heapq.heappop(ready)
        index = len(numbers[group])
        if index == len(program.actions[group]):
            continue
        need = needs[group][index]
        if need is not None and need not in available:
            waiting[need] = clock, group
            continue
        numbers[group].append(count)
        count += 1
        provide = provides[group][index]
        if provide is not None:
            available.add(provide)
            if provide in waiting:
                since, receiver = waiting.pop(provide)
                heapq.heappush(ready, (max(since, clock), receiver))
        heapq.heappush(ready, (clock + _DURATIONS.get(type(program.actions[group][index]), 0), group))
    return numbers
