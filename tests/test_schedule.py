"""Schedules, passes and the checker. The oracle is an executor that carries real values through rendezvous channels."""

from __future__ import annotations

import random
import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.plan import Plan, Stage
from autopar.schedule.build import build_program, program_for
from autopar.schedule.check import ScheduleError, check, grid
from autopar.schedule.instructions import (
    Backward,
    Forward,
    OptimizerStep,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    SendActivation,
    SendGradient,
)
from autopar.schedule.orders import FORWARD_ONLY, SCHEDULES
from autopar.schedule.passes import add_optimizer, add_prologue, add_reduction, add_transfers

SENDS = (SendActivation, SendGradient)
RECEIVES = (ReceiveActivation, ReceiveGradient)
programs = st.builds(
    build_program, st.integers(1, 6), st.integers(1, 9), st.sampled_from(sorted(SCHEDULES)), st.booleans()
)


class Refused(Exception):
    """The executor came to a halt or computed something else than training needs."""


def execute(program: Program, rng: random.Random) -> None:
    """Run every stage by itself, in a random interleaving, with values that remember how they were computed.

    A send waits in its channel and completes when the receiver, at its receive, takes it. Refused unless all stages
    end, all channels are empty, no value is left over, and the gradients are those of each microbatch exactly once.
    """
    num_stages = len(program.actions)
    count = 1 + max((i.microbatch for row in program.actions for i in row if isinstance(i, Forward)), default=-1)
    evaluation = (Prologue, ReceiveActivation, Forward, SendActivation)
    training = any(not isinstance(i, evaluation) for row in program.actions for i in row)
    channels: dict[tuple[int, int], list] = {}
    values: list[dict] = [{} for _ in program.actions]
    gradients: list[Counter] = [Counter() for _ in program.actions]
    computed: list[Counter] = [Counter() for _ in program.actions]
    once: list[list[str]] = [[] for _ in program.actions]
    position = [0] * num_stages

    def demand(condition: bool, what: object) -> None:
        if not condition:
            raise Refused(what)

    def take(stage: int, key: tuple) -> object:
        demand(key in values[stage], (stage, key))
        return values[stage].pop(key)

    def put(stage: int, key: tuple, value: object) -> None:
        demand(key not in values[stage], (stage, key))
        values[stage][key] = value

    def step(stage: int) -> bool:
        instruction = program.actions[stage][position[stage]]
        demand(instruction.stage == stage, instruction)
        m = getattr(instruction, "microbatch", None)
        if isinstance(instruction, (*SENDS, *RECEIVES)):
            forwards = isinstance(instruction, (SendActivation, ReceiveGradient))
            demand(instruction.peer == stage + (1 if forwards else -1), instruction)
            demand(0 <= instruction.peer < num_stages, instruction)
        if isinstance(instruction, RECEIVES):
            channel = channels.get((instruction.peer, stage), [])
            if not channel:
                return False
            kind, value, sent = channel.pop(0)
            wanted = "activation" if isinstance(instruction, ReceiveActivation) else "gradient"
            demand(kind == wanted and sent == m, (instruction, kind, sent))
            put(stage, ("in", kind, m), value)
        elif isinstance(instruction, SENDS):
            kind = "activation" if isinstance(instruction, SendActivation) else "gradient"
            channels.setdefault((stage, instruction.peer), []).append((kind, take(stage, ("out", kind, m)), m))
        elif isinstance(instruction, Forward):
            value = ("batch", m) if stage == 0 else take(stage, ("in", "activation", m))
            computed[stage]["F", m] += 1
            if training:
                put(stage, ("saved", m), value)
            if stage < num_stages - 1:
                put(stage, ("out", "activation", m), ("F", stage, value))
        elif isinstance(instruction, Backward):
            saved = take(stage, ("saved", m))
            value = ("loss", m) if stage == num_stages - 1 else take(stage, ("in", "gradient", m))
            computed[stage]["B", m] += 1
            gradients[stage][value, saved] += 1
            if stage > 0:
                put(stage, ("out", "gradient", m), ("B", stage, value))
        else:
            kind = str(instruction).lstrip("0123456789")
            backwards = sum(times for (what, _), times in computed[stage].items() if what == "B")
            demand(kind != "P" or not computed[stage], instruction)
            demand(kind != "D" or backwards >= count, instruction)
            demand(kind != "O" or "D" in once[stage], instruction)
            once[stage].append(kind)
        position[stage] += 1
        return True

    while True:
        open_stages = [s for s in range(num_stages) if position[s] < len(program.actions[s])]
        if not open_stages:
            break
        rng.shuffle(open_stages)
        demand(any([step(s) for s in open_stages]), "deadlock")

    demand(count > 0, "nothing is computed")
    demand(not any(channels.values()), "a send never completes")
    demand(not any(values), "a value is left over")
    expected = Counter({(kind, m): 1 for kind in ("FB" if training else "F") for m in range(count)})
    demand(all(c == expected for c in computed), "not every microbatch once")
    demand(all(sorted(kinds) == (["D", "O", "P"] if training else ["P"]) for kinds in once), "once")
    for stage in range(num_stages) if training else ():
        for m in range(count):
            saved: tuple = ("batch", m)
            for before in range(stage):
                saved = ("F", before, saved)
            value: tuple = ("loss", m)
            for after in range(num_stages - 1, stage, -1):
                value = ("B", after, value)
            demand(gradients[stage][value, saved] == 1, "wrong gradient")


def accepts(program: Program) -> bool:
    try:
        check(program)
    except ScheduleError:
        return False
    return True


def runs(program: Program, seed: int) -> bool:
    try:
        execute(program, random.Random(seed))
    except Refused:
        return False
    return True


def rows_of(program: Program) -> list[list]:
    return [list(row) for row in program.actions]


def program_of(rows: list[list]) -> Program:
    return Program(tuple(tuple(row) for row in rows))


# ------------------------------------------------------------------------------------------------- what is generated


@given(programs)
@settings(max_examples=150, deadline=None)
def test_every_program_is_accepted_runs_and_round_trips(program: Program) -> None:
    check(program)
    for seed in range(3):
        execute(program, random.Random(seed))
    assert Program.parse(str(program)) == program


@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=100, deadline=None)
def test_in_flight_is_what_the_schedule_promises(num_stages: int, microbatches: int, name: str) -> None:
    program = build_program(num_stages, microbatches, name)
    bounds = []
    for stage, row in enumerate(program.actions):
        held = peak = 0
        for instruction in row:
            held += isinstance(instruction, Forward) - isinstance(instruction, Backward)
            peak = max(peak, held)
        assert held == 0
        assert peak == (min(num_stages - stage, microbatches) if name == "1f1b" else microbatches)
        assert peak == SCHEDULES[name].in_flight(stage, num_stages, microbatches)
        bounds.append(peak)
    check(program, bounds)
    check(program, max(bounds))
    for stage in range(num_stages):
        tighter = [b - (s == stage) for s, b in enumerate(bounds)]
        with pytest.raises(ScheduleError, match=f"stage {stage}.*in flight; the bound is {tighter[stage]}"):
            check(program, tighter)


def test_passes_add_one_kind_each_and_keep_the_rest() -> None:
    orders = Program(tuple(tuple(SCHEDULES["1f1b"].order(s, 3, 5)) for s in range(3)))
    lowered = add_transfers(orders)
    added = [[i for i in row if not isinstance(i, (Forward, Backward))] for row in lowered.actions]
    assert [[i for i in row if isinstance(i, (Forward, Backward))] for row in lowered.actions] == rows_of(orders)
    assert [len(row) for row in added] == [10, 20, 10]
    full = add_optimizer(add_reduction(add_prologue(lowered)))
    for stage, (row, before) in enumerate(zip(full.actions, lowered.actions, strict=True)):
        assert row == (Prologue(stage), *before, ReduceGradients(stage), OptimizerStep(stage))
    assert full == build_program(3, 5, "1f1b")


def test_one_stage_needs_no_transfers_and_evaluation_no_backward() -> None:
    assert str(build_program(1, 2, "1f1b")) == "0P 0F0 0B0 0F1 0B1 0D 0O"
    assert str(build_program(1, 2, "gpipe")) == "0P 0F0 0F1 0B0 0B1 0D 0O"
    assert str(build_program(2, 1, "gpipe", training=False)) == "0P 0F0 0SA0>1\n1P 1RA0<0 1F0"
    assert FORWARD_ONLY.name not in SCHEDULES


def test_program_for_a_plan() -> None:
    stages = tuple(Stage(s, s + 1, (2 * s, 2 * s + 1), 2) for s in range(3))
    plan = Plan("m", "f", 6, 8, 4, "1f1b", stages)
    assert program_for(plan) == build_program(3, 4, "1f1b")
    assert program_for(plan, training=False) == build_program(3, 4, "gpipe", training=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1, "1f1b"), "pipeline=0"), ((2, 0, "1f1b"), "microbatches=0"), ((2, 2, "zigzag"), "one of 1f1b, gpipe")],
)
def test_bad_arguments_say_what_was_expected(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_program(*arguments)


def test_long_programs_are_checked_in_linear_time() -> None:
    # A wide margin, which only a quadratic check would miss.
    program = build_program(8, 640, "1f1b")
    start_s = time.process_time()
    check(program)
    assert sum(map(len, program.actions)) > 20_000
    assert time.process_time() - start_s < 2.0


# ------------------------------------------------------------------------------------------------- injected faults


def _drop(rows: list[list], rng: random.Random) -> None:
    row = rng.choice(rows)
    del row[rng.randrange(len(row))]


def _duplicate(rows: list[list], rng: random.Random) -> None:
    row = rng.choice(rows)
    row.insert(rng.randint(0, len(row)), rng.choice(row))


def _swap(rows: list[list], rng: random.Random) -> None:
    row = rng.choice(rows)
    a, b = rng.randrange(len(row)), rng.randrange(len(row))
    row[a], row[b] = row[b], row[a]


def _move(rows: list[list], rng: random.Random) -> None:
    row = rng.choice(rows)
    row.insert(rng.randrange(len(row)), row.pop(rng.randrange(len(row))))


def _neighbours(rows: list[list], rng: random.Random) -> None:
    """Exchange two instructions that follow each other: often harmless, so that the verdict must tell."""
    row = rng.choice(rows)
    a = rng.randrange(max(1, len(row) - 1))
    row[a : a + 2] = reversed(row[a : a + 2])


def _relabel(rows: list[list], rng: random.Random) -> None:
    row = rng.choice(rows)
    index = rng.randrange(len(row))
    fields = {name: getattr(row[index], name) for name in type(row[index]).__slots__}
    name = rng.choice(sorted(fields))
    fields[name] = max(0, fields[name] + rng.choice((-1, 1)))
    row[index] = type(row[index])(**fields)


def _exchange_rows(rows: list[list], rng: random.Random) -> None:
    a, b = rng.randrange(len(rows)), rng.randrange(len(rows))
    rows[a], rows[b] = rows[b], rows[a]


FAULTS = (_drop, _duplicate, _swap, _move, _neighbours, _relabel, _exchange_rows)


def test_verdict_agrees_with_the_executor_on_random_faults() -> None:
    rng = random.Random(1)
    accepted = Counter()
    for seed in range(4000):
        program = build_program(
            rng.randint(1, 4), rng.randint(1, 5), rng.choice(sorted(SCHEDULES)), training=rng.random() < 0.85
        )
        rows = rows_of(program)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(FAULTS)([row for row in rows if row] if rows else rows, rng)
        faulty = program_of(rows)
        verdict = accepts(faulty)
        assert verdict == runs(faulty, seed), f"check says {verdict}\n{faulty}"
        accepted[verdict] += 1
    # Both verdicts must occur often, or the comparison shows nothing.
    assert accepted[True] > 400 and accepted[False] > 1500, accepted


def _faulty(num_stages: int, microbatches: int, name: str, change) -> Program:
    rows = rows_of(build_program(num_stages, microbatches, name))
    change(rows)
    return program_of(rows)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    ("change", "reason", "marked"),
    [
        (lambda r: r[1].remove(ReceiveActivation(1, 2, 0)), r"1F2 uses what 1RA2<0 has not produced", r"\*1F2\*"),
        (lambda r: r[1].remove(Backward(1, 2)), r"1SG2>0 uses what 1B2 has not produced", r"\*1SG2>0\*"),
        (lambda r: r[0].remove(Backward(0, 2)), r"0D stands before the last backward", r"\*0D\*"),
        (lambda r: r[0].remove(SendActivation(0, 1, 1)), r"0SA1>1 is missing", r"\*missing\*"),
        (lambda r: r[1].insert(5, Forward(1, 0)), r"1F0 stands twice", r"\*1F0\*"),
        (lambda r: r[0].remove(OptimizerStep(0)), r"0O is missing", r"\*missing\*"),
        (lambda r: r[2].insert(3, Forward(1, 0)), r"1F0 stands in the row of stage 2", r"\*1F0\*"),
        (lambda r: r[0].append(ReceiveActivation(0, 0, 1)), r"0RA0<1 names a wrong peer", r"\*0RA0<1\*"),
        (lambda r: r[0].insert(0, r[0].pop(r[0].index(ReceiveGradient(0, 0, 1)))), "deadlock: .*0RG0<1", r"\*0RG0<1\*"),
    ],
)
def test_faults_are_named_and_marked_in_the_grid(name: str, change, reason: str, marked: str) -> None:
    with pytest.raises(ScheduleError, match=reason) as error:
        check(_faulty(3, 4, name, change))
    text = str(error.value)
    assert len(text.splitlines()) == 5 and text.splitlines()[1].startswith("step")
    assert re.search(marked, text)
    assert error.value.faults


def test_messages_out_of_order_are_refused_although_counts_match() -> None:
    def swap(rows: list[list]) -> None:
        row = rows[1]
        a, b = (row.index(i) for i in (ReceiveActivation(1, 0, 0), ReceiveActivation(1, 1, 0)))
        row[a : b + 1] = [row[b], row[a], *row[a + 1 : b]]

    with pytest.raises(ScheduleError, match="1RA1<0 would receive microbatch 0"):
        check(_faulty(2, 3, "gpipe", swap))


def test_grid_shows_the_staircase() -> None:
    lines = grid(Program(tuple(tuple(SCHEDULES["gpipe"].order(s, 3, 2)) for s in range(3)))).splitlines()
    assert lines[1].split() == ["stage", "0", "0F0", "0F1", "0B0", "0B1"]
    assert [line.index(f"{s}F0") for s, line in enumerate(lines[1:])] == sorted(
        {line.index(f"{s}F0") for s, line in enumerate(lines[1:])}
    )
    long = _faulty(30, 200, "1f1b", lambda rows: rows[15].remove(ReceiveGradient(15, 150, 16)))
    with pytest.raises(ScheduleError) as error:
        check(long)
    assert len(str(error.value)) < 10_000


def test_incomplete_programs_pass_only_between_passes() -> None:
    orders = Program(tuple(tuple(SCHEDULES["1f1b"].order(s, 2, 2)) for s in range(2)))
    check(orders, complete=False)
    with pytest.raises(ScheduleError):
        check(orders)
    with pytest.raises(ScheduleError, match="0P is missing"):
        check(add_transfers(orders))
    with pytest.raises(ScheduleError, match="no forward"):
        check(Program(((), ())))
