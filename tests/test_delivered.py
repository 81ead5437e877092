"""What a message tells of the sends before it: true whatever the order in which ranks run, and early enough to matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from autopar.schedule.build import build_program, build_stream
from autopar.schedule.delivered import delivered, delivered_in_stream
from autopar.schedule.instructions import Instruction, Program
from autopar.schedule.steps import RECEIVES, SENDS, dependencies


def check_walk(program: Program, told: list[Callable[[Instruction], Iterable[Instruction]]], seed: int) -> list[int]:
    """Run the groups in a random order; when a receive is done, what it tells of must have been taken by its peer. Returns
    the most sends per group that were neither told of nor their microbatch's last."""
    rng = random.Random(seed)
    needs, provides = dependencies(program)
    at = [0] * len(program.actions)
    sent: set[object] = set()
    taken: set[object] = set()
    unknown: list[dict[Instruction, object]] = [{} for _ in program.actions]
    most = [0] * len(program.actions)
    favoured = rng.randrange(len(at))
    while True:
        able = [
            g
            for g, row in enumerate(program.actions)
            if at[g] < len(row) and (needs[g][at[g]] is None or needs[g][at[g]] in sent)
        ]
        if not able:
            break
        # Now and then one group runs as far ahead as it can.
        favoured = rng.choice(able) if favoured not in able or rng.random() < 0.05 else favoured
        group, instruction = favoured, program.actions[favoured][at[favoured]]
        if type(instruction) in SENDS:
            key = provides[group][at[group]]
            sent.add(key)
            unknown[group][instruction] = key
            most[group] = max(most[group], len(unknown[group]))
        elif type(instruction) in RECEIVES:
            taken.add(needs[group][at[group]])
            for send in told[group](instruction):
                key = unknown[group].pop(send, None)
                assert key is None or key in taken, f"group {group}: {instruction} does not tell of {send}"
        at[group] += 1
    assert at == [len(row) for row in program.actions]
    return most


CASES = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2), ("interleaved", 3)]


@pytest.mark.parametrize(("schedule", "virtual"), CASES)
def test_a_message_tells_of_what_its_sender_took(schedule: str, virtual: int) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        groups = rng.randint(2, 5)
        microbatches = groups * rng.randint(1, 4) if schedule in ("zb-v", "interleaved") else rng.randint(1, 12)
        program = build_program(groups, microbatches, schedule, virtual=virtual)
        maps = [delivered(program, group) for group in range(groups)]
        told = [lambda receive, found=found: found.get(receive, ()) for found in maps]
        for walk in range(4):
            check_walk(program, told, 100 * seed + walk)
        named = [send for found in maps for sends in found.values() for send in sends]
        assert len(named) == len(set(named))


def test_under_1f1b_few_sends_wait_for_news() -> None:
    """As many as there are microbatches in flight, each with a gradient or two, however many microbatches there are."""
    groups, microbatches = 4, 64
    program = build_program(groups, microbatches, "1f1b")
    maps = [delivered(program, group) for group in range(groups)]
    told = [lambda receive, found=found: found.get(receive, ()) for found in maps]
    most = [max(found) for found in zip(*(check_walk(program, told, seed) for seed in range(5)), strict=True)]
    assert all(count <= groups - group + 3 for group, count in enumerate(most)), most
    nothing = [lambda receive: ()] * groups
    assert max(check_walk(program, nothing, 0)) >= microbatches


@pytest.mark.parametrize("schedule", ["pipedream", "2bw"])
def test_in_a_stream_too(schedule: str) -> None:
    for groups in (2, 3, 4):
        program = build_stream(groups, 1 if schedule == "pipedream" else 4, schedule, 12)
        told = [lambda receive, groups=groups: delivered_in_stream(receive, groups)] * groups
        for seed in range(5):
            most = check_walk(program, told, seed)
            assert max(most) <= 2 * groups + 2, most
