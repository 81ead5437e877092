"""Where receives are posted: no program stops, even if every message waits at once for both of its sides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import pytest
from test_parity import one_step
from test_stream import streamed

from autopar.runtime import build
from autopar.schedule.build import build_program, build_stream
from autopar.schedule.instructions import Instruction, Program
from autopar.schedule.orders import SCHEDULES
from autopar.schedule.posting import postings, stream_postings
from autopar.schedule.steps import RECEIVES, SENDS, dependencies

Message = tuple[int, int, int]
CASES = [
    (name, groups, microbatches)
    for name, schedule in SCHEDULES.items()
    if schedule.flushes
    for groups, microbatches in itertools.product((2, 3, 4, 6), (1, 2, 4, 6, 12))
]


def programs(name: str, groups: int, microbatches: int) -> list[Program]:
    try:
        return [build_program(groups, microbatches, name, training=training) for training in (True, False)]
    except ValueError:
        return []  # this schedule does not take so many microbatches


def meetings(program: Program, posted: Sequence[Mapping[Instruction, tuple[Instruction, ...]]]) -> list[list[Message]]:
    """Per group, the messages in the order in which it comes to them, as sender or by posting the receive."""
    needs, provides = dependencies(program)
    found: list[list[Message]] = []
    for row, need, provide, places in zip(program.actions, needs, provides, posted, strict=True):
        key = {i: k for i, k in zip(row, need, strict=True) if k is not None}
        line: list[Message] = []
        for instruction, sent in zip(row, provide, strict=True):
            line += [key[receive] for receive in places.get(instruction, ())]
            if isinstance(instruction, RECEIVES):
                assert key[instruction] in line, f"{instruction} is not posted when it is due"
            if isinstance(instruction, SENDS):
                line.append(sent)
        found.append(line)
    return found


def stuck(lines: list[list[Message]]) -> list[Message]:
    """What is left when every message waits for both of its sides: a message travels when it is the next of both."""
    lines = [list(reversed(line)) for line in lines]
    while True:
        fronts = [line[-1] for line in lines if line]
        ready = {message for message in fronts if fronts.count(message) == 2}
        if not ready:
            return fronts
        for line in lines:
            if line and line[-1] in ready:
                line.pop()


@pytest.mark.parametrize(("name", "groups", "microbatches"), CASES)
def test_every_message_meets(name: str, groups: int, microbatches: int) -> None:
    for program in programs(name, groups, microbatches):
        posted = [postings(program, group) for group in range(groups)]
        for row, places in zip(program.actions, posted, strict=True):
            receives = [i for i in row if isinstance(i, RECEIVES)]
            assert sorted(map(str, receives)) == sorted(str(r) for coming in places.values() for r in coming)
        lines = meetings(program, posted)
        assert not stuck(lines), (name, groups, microbatches)


def one_ahead(row: Sequence[Instruction]) -> dict[Instruction, tuple[Instruction, ...]]:
    """Receives posted as gloo's are: each when the one of its kind before it is done, the first ones at once."""
    found: dict[Instruction, tuple[Instruction, ...]] = {}
    for kind in RECEIVES:
        receives = [i for i in row if isinstance(i, kind)]
        for before, receive in zip([None, *receives], receives, strict=False):
            place = row[0] if before is None else row[row.index(before) + 1]
            found[place] = (*found.get(place, ()), receive)
    return found


def test_receives_posted_one_ahead_would_stop() -> None:
    """What 1F1B's first step would do: each stage waits for a message that the other has not come to."""
    (program, _) = programs("1f1b", 2, 4)
    assert stuck(meetings(program, [one_ahead(row) for row in program.actions]))


def test_receives_are_posted_before_their_turn() -> None:
    """Between stages that take equally long, the others come just in time, and cannot be waited for any earlier."""
    (program, _) = programs("1f1b", 4, 12)
    early = late = 0
    for group in range(4):
        for place, coming in postings(program, group).items():
            for receive in coming:
                early += place != receive
                late += place == receive
    assert early * 3 > early + late, (early, late)


class Cuda:
    type = "cuda"


def as_on_nccl() -> Any:
    """A context in which models are built with receives posted as on NCCL."""
    row = build._row
    return mock.patch.object(build, "_row", lambda plan, groups, _, training: row(plan, groups, Cuda, training))


def posted_step(plans: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    with as_on_nccl():
        return one_step("build_mlp", plans)


def posted_stream(options: dict[str, Any]) -> tuple[float, float, float, int]:
    """Six batches of a stream."""
    with as_on_nccl():
        return streamed("build_mlp", options, 6, None)


@pytest.mark.parametrize(("name", "microbatches"), [("pipedream", 1), ("2bw", 4)])
def test_results_of_streams_are_the_same(pool, name: str, microbatches: int) -> None:
    options = dict(data=1, tensor=1, pipeline=3, microbatches=microbatches, schedule=name, seed=1)
    for loss, weights, evaluated, steps in pool.run(posted_stream, options, world_size=3, timeout_s=120):
        assert loss < 1e-5 and weights < 1e-5 and evaluated < 1e-5 and steps == 6


@pytest.mark.parametrize(
    ("name", "groups", "microbatches", "batches"),
    [
        (name, groups, m, n)
        for groups in (2, 3, 5)
        for n in (1, 2, 6, 19)
        for name, m in (("pipedream", 1), ("2bw", groups), ("2bw", groups + 2))
    ],
)
def test_every_message_of_a_stream_meets(name: str, groups: int, microbatches: int, batches: int) -> None:
    program = build_stream(groups, microbatches, name, batches)
    posted = []
    for group, row in enumerate(program.actions):
        places = stream_postings(groups, microbatches, name, group)
        found: dict[Instruction, tuple[Instruction, ...]] = {}
        done: set[Instruction] = set()
        for instruction in row:
            coming = [r for r in places(instruction) if r.microbatch < batches * microbatches]
            if isinstance(instruction, RECEIVES) and instruction not in {*done, *coming}:
                coming.append(instruction)  # at its turn, as the transport does
            done |= set(coming)
            found[instruction] = tuple(coming)
        assert done == {i for i in row if isinstance(i, RECEIVES)}
        posted.append(found)
    assert not stuck(meetings(program, posted))


def test_results_are_the_same(pool) -> None:
    plans = [
        dict(data=1, tensor=1, pipeline=2, microbatches=4, schedule=schedule, seed=seed)
        for seed, schedule in enumerate(("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"))
    ]
    for found in pool.run(posted_step, plans, timeout_s=120):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6 and gradient < 1e-5, (plan, loss, gradient, evaluated)
