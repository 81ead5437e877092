"""From a schedule's name to a checked Program, and from a Plan to its Program."""

from __future__ import annotations

from autopar.plan import Plan

from .check import check
from .instructions import Program
from .orders import schedule_named
from .passes import add_optimizer, add_prologue, add_reduction, add_transfers


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


def program_for(plan: Plan, training: bool = True) -> Program:
    """The program of a plan: `actions[g]` belongs to every rank of `plan.groups[g]`."""
    schedule_named(plan.schedule).check_stages(plan.pipeline, len(plan.stages))
    return build_program(plan.pipeline, plan.microbatches, plan.schedule, training, len(plan.stages) // plan.pipeline)
