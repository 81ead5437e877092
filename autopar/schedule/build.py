"""From a schedule's name to a checked Program, and from a Plan to its Program."""

from __future__ import annotations

from functools import lru_cache

from autopar.plan import Plan

from .check import check
from .instructions import Program
from .orders import schedule_named
from .passes import add_optimizer, add_prologue, add_reduction, add_transfers
from .pipedream import stream_order


@lru_cache(maxsize=16)  # searches ask for one program again and again, with other costs
def build_program(
    num_groups: int, microbatches: int, schedule: str, training: bool = True, virtual: int | None = None
) -> Program:
    """What each group executes in one step, checked.

    schedule: a name of `orders.SCHEDULES`. training=False gives its evaluation program. virtual: stages per group, None
    for the least that the schedule runs. ValueError for degrees below 1, an unknown schedule, or stages that it cannot lay.
    """
    if num_groups < 1 or microbatches < 1:
        raise ValueError(f"pipeline={num_groups} and microbatches={microbatches} must both be at least 1")
    chosen = schedule_named(schedule)
    if not chosen.flushes and training:
        raise ValueError(f"schedule {schedule!r} has no step, its batches go on without a flush; see build_stream")
    virtual = max(1, chosen.virtual) if virtual is None else virtual
    chosen.check_stages(num_groups, num_groups * virtual)
    order = chosen.order if training else chosen.forward
    sizes = [(group, num_groups, microbatches, virtual) for group in range(num_groups)]
    program = Program(tuple(tuple(order(*size)) for size in sizes))
    check(
        program,
        [chosen.in_flight(*size) for size in sizes] if training else None,
        [chosen.deferred(*size) for size in sizes] if training else None,
        complete=False,
    )
    passes = [add_transfers, add_prologue]
    if training:
        passes += [add_reduction, add_optimizer]
    for add in passes:
        program = add(program)
    check(program)
    return program


@lru_cache(maxsize=4)
def build_stream(num_groups: int, microbatches: int, schedule: str, num_batches: int) -> Program:
    """What each group executes for so many batches of `microbatches` under a schedule without flushes, checked."""
    if num_groups < 1 or microbatches < 1 or num_batches < 1:
        raise ValueError(
            f"pipeline={num_groups}, microbatches={microbatches}, batches={num_batches}: expected at least 1"
        )
    chosen = schedule_named(schedule)
    assert not chosen.flushes, schedule
    chosen.check_microbatches(num_groups, microbatches)
    program = Program(
        tuple(
            tuple(stream_order(group, num_groups, microbatches, chosen.delay, lambda batch: batch < num_batches))
            for group in range(num_groups)
        )
    )
    total = num_batches * microbatches
    check(program, [chosen.in_flight(group, num_groups, total) for group in range(num_groups)], complete=False)
    program = add_transfers(program)
    check(program)
    return program


def stream_batches(num_groups: int, microbatches: int) -> int:
    """How many batches of a stream show its steady state: some to fill, as many to measure, and some to drain."""
    return 2 * (4 * num_groups + -(-num_groups // microbatches) + 1)


def program_for(plan: Plan, training: bool = True) -> Program:
    """The program of a plan: `actions[g]` belongs to every rank of `plan.groups[g]`.

    For a schedule without flushes, training means a stream of as many batches as show its steady state.
    """
    chosen = schedule_named(plan.schedule)
    chosen.check_stages(plan.pipeline, len(plan.stages))
    if training and not chosen.flushes:
        return build_stream(
            plan.pipeline, plan.microbatches, plan.schedule, stream_batches(plan.pipeline, plan.microbatches)
        )
    return build_program(plan.pipeline, plan.microbatches, plan.schedule, training, len(plan.stages) // plan.pipeline)
