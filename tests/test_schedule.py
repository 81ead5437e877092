"""Schedules, passes and the checker. The oracle is an executor that carries real values through rendezvous channels."""

from __future__ import annotations

import random
import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_interpreter import Refused, execute

from autopar.plan import Plan, Stage
from autopar.schedule.build import build_program, program_for
from autopar.schedule.check import ScheduleError, check
from autopar.schedule.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    SendActivation,
)
from autopar.schedule.orders import SCHEDULES
from autopar.schedule.passes import add_optimizer, add_prologue, add_reduction, add_transfers
from autopar.schedule.steps import grid

COMPUTE = (Forward, Backward, BackwardInput, BackwardWeight)
# Schedule and stages per group, with a schedule of any number taking several.
CASES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("zb-h1", 1),
    ("zb-h2", 1),
    ("zb-v", 2),
    *(("interleaved", v) for v in (1, 2, 3, 4)),
]
programs = st.builds(
    lambda groups, microbatches, case, training: build_program(groups, microbatches, case[0], training, case[1]),
    st.integers(1, 6),
    st.integers(1, 13),
    st.sampled_from(CASES),
    st.booleans(),
)


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


@given(st.integers(1, 8), st.integers(1, 20), st.sampled_from(CASES))
@settings(max_examples=150, deadline=None)
def test_in_flight_is_what_the_schedule_promises(num_groups: int, microbatches: int, case: tuple[str, int]) -> None:
    name, virtual = case
    program = build_program(num_groups, microbatches, name, virtual=virtual)
    schedule = SCHEDULES[name]
    bounds: list[list[int]] = [[], []]
    for group, row in enumerate(program.actions):
        held, deferred, peak, waiting = 0, 0, 0, 0
        for instruction in row:
            half = isinstance(instruction, BackwardInput)
            held += isinstance(instruction, Forward) - isinstance(instruction, Backward) - half
            deferred += half - isinstance(instruction, BackwardWeight)
            peak, waiting = max(peak, held), max(waiting, deferred)
        assert held == deferred == 0
        by_hand = {
            "gpipe": microbatches,
            "1f1b": min(num_groups - group, microbatches),
            "zb-h1": min(num_groups - group, microbatches),
        }
        if microbatches >= 2 * num_groups - 1:
            by_hand["zb-h2"] = 2 * (num_groups - group) - 1
        if microbatches >= 2 * num_groups - 1:
            by_hand["zb-v"] = 2 * num_groups
        if microbatches % num_groups == 0:
            warmup = (virtual - 1) * num_groups + 2 * (num_groups - 1 - group)
            by_hand["interleaved"] = min(warmup + 1, microbatches * virtual)
        assert peak == by_hand.get(name, peak)
        if name == "zb-h1":
            assert waiting == min(group + 1, microbatches)
        assert schedule.splits_backward == (waiting > 0)
        size = (group, num_groups, microbatches, virtual)
        assert (peak, waiting) == (schedule.in_flight(*size), schedule.deferred(*size))
        bounds[0].append(peak)
        bounds[1].append(waiting)
    check(program, *bounds)
    check(program, *map(max, bounds))
    for group in range(num_groups):
        tighter = [b - (g == group) for g, b in enumerate(bounds[0])]
        with pytest.raises(ScheduleError, match=f"group {group}.*in flight; the bound is {tighter[group]}"):
            check(program, tighter)
        if bounds[1][group]:
            tighter = [b - (g == group) for g, b in enumerate(bounds[1])]
            with pytest.raises(ScheduleError, match=f"group {group}.*halves of a backward; the bound is"):
                check(program, None, tighter)


@given(st.integers(1, 8), st.integers(1, 20), st.sampled_from(CASES))
@settings(max_examples=100, deadline=None)
def test_every_stage_sums_its_gradients_in_one_order(num_groups: int, microbatches: int, case: tuple[str, int]) -> None:
    program = build_program(num_groups, microbatches, case[0], virtual=case[1])
    for group, row in enumerate(program.actions):
        for stage in program.stages_of(group):
            assert SCHEDULES[case[0]].group_of(stage, num_groups) == group
            for kind in COMPUTE:
                order = [i.microbatch for i in row if type(i) is kind and i.stage == stage]
                assert order == sorted(order)


def test_stages_that_a_schedule_cannot_lay_are_refused() -> None:
    with pytest.raises(ValueError, match="'1f1b' runs 1 stage on each set of ranks, so 2 sets need 2 stages, not 4"):
        build_program(2, 4, "1f1b", virtual=2)
    with pytest.raises(ValueError, match="'zb-v' runs 2 stages"):
        build_program(2, 4, "zb-v", virtual=1)
    with pytest.raises(ValueError, match="3 sets cannot share 7 stages; the nearest counts are 6 and 9"):
        SCHEDULES["interleaved"].check_stages(3, 7)


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


def test_program_for_a_plan() -> None:
    stages = tuple(Stage(s, s + 1, (2 * s, 2 * s + 1), 2) for s in range(3))
    plan = Plan("m", "f", 6, 8, 4, "1f1b", stages)
    assert program_for(plan) == build_program(3, 4, "1f1b")
    assert program_for(plan, training=False) == build_program(3, 4, "gpipe", training=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "1f1b"), "pipeline=0"),
        ((2, 0, "1f1b"), "microbatches=0"),
        ((2, 2, "zigzag"), "one of 1f1b, 2bw, gpipe, interleaved, pipedream, zb-h1, zb-h2, zb-v"),
    ],
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
    assert time.process_time() - start_s < 6.0


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
    for seed in range(2000):
        name, virtual = rng.choice(CASES)
        program = build_program(rng.randint(1, 4), rng.randint(1, 5), name, rng.random() < 0.85, virtual)
        rows = rows_of(program)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(FAULTS)([row for row in rows if row] if rows else rows, rng)
        faulty = program_of(rows)
        verdict = accepts(faulty)
        assert verdict == runs(faulty, seed), f"check says {verdict}\n{faulty}"
        accepted[verdict] += 1
    # Both verdicts must occur often, or the comparison shows nothing.
    assert accepted[True] > 200 and accepted[False] > 750, accepted


def _faulty(num_stages: int, microbatches: int, name: str, change) -> Program:
    rows = rows_of(build_program(num_stages, microbatches, name))
    change(rows)
    return program_of(rows)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("change", "reason", "marked"),
    [
        (lambda r: r[1].remove(ReceiveActivation(1, 2, 0)), r"1F2 uses what 1RA2<0 has not produced", r"\*1F2\*"),
        (lambda r: r[1].remove(Backward(1, 2)), r"1SG2>0 uses what 1B2 has not produced", r"\*1SG2>0\*"),
        (lambda r: r[0].remove(Backward(0, 2)), r"0D stands before the last backward", r"\*0D\*"),
        (lambda r: r[0].remove(SendActivation(0, 1, 1)), r"0SA1>1 is missing", r"\*missing\*"),
        (lambda r: r[1].insert(5, Forward(1, 0)), r"1F0 stands twice", r"\*1F0\*"),
        (lambda r: r[0].remove(OptimizerStep(0)), r"0O is missing", r"\*missing\*"),
        (
            lambda r: r[2].insert(3, Forward(1, 0)),
            r"1F0 stands in the row of group 2, but stage 1 belongs to 1",
            r"\*1F0\*",
        ),
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r[0].remove(BackwardWeight(3, 2)), r"3D stands before the last backward"),
        (lambda r: r[0].remove(BackwardInput(3, 2)), r"2RG2<3|0I2 uses what|3SG2>2 uses what 3B2"),
        (lambda r: r[1].insert(0, r[1].pop(r[1].index(BackwardWeight(2, 1)))), r"2W1 uses what 2I1 has not produced"),
        (lambda r: r[1].append(BackwardWeight(1, 0)), r"1W0 stands twice"),
        (lambda r: r[1].insert(r[1].index(BackwardInput(2, 0)) + 1, Backward(2, 0)), r"2B0 stands twice"),
        (lambda r: r[1].append(SendActivation(1, 0, 2)), r"1SA0>2 names a wrong peer"),
        (lambda r: r[1].insert(0, r[1].pop(r[1].index(Forward(2, 1)))), r"2F1 uses what 1F1 has not produced"),
        (lambda r: r[0].append(OptimizerStep(3)), r"3O stands for stage 0, the lowest of its group"),
        (lambda r: r.reverse(), r"ascending order"),
    ],
)
def test_faults_of_halves_and_of_stages_on_one_group(change, reason: str) -> None:
    rows = rows_of(build_program(2, 3, "zb-v"))
    change(rows)
    with pytest.raises(ScheduleError, match=reason):
        check(program_of(rows))


def test_messages_out_of_order_are_refused_although_counts_match() -> None:
    def swap(rows: list[list]) -> None:
        row = rows[1]
        a, b = (row.index(i) for i in (ReceiveActivation(1, 0, 0), ReceiveActivation(1, 1, 0)))
        row[a : b + 1] = [row[b], row[a], *row[a + 1 : b]]

    with pytest.raises(ScheduleError, match="1RA1<0 would receive microbatch 0"):
        check(_faulty(2, 3, "gpipe", swap))


def test_grid_shows_the_staircase() -> None:
    lines = grid(Program(tuple(tuple(SCHEDULES["gpipe"].order(s, 3, 2)) for s in range(3)))).splitlines()
    assert lines[1].split() == ["group", "0", "0F0", "0F1", "0B0", "0B1"]
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
    with pytest.raises(ScheduleError, match="is missing"):
        check(add_transfers(orders))
    with pytest.raises(ScheduleError, match="no forward"):
        check(Program(((), ())))
