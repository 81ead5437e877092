"""From a schedule's name to a checked Program, and from a Plan to its Program."""

from __future__ import annotations

from autopar.plan import Plan

from .check import check
from .instructions import Program
from .orders import FORWARD_ONLY, schedule_named
from .passes import add_optimizer, add_prologue, add_reduction, add_transfers


def build_program(num_stages: int, microbatches: int, schedule: str, training: bool = True) -> Program:
    """What each stage executes in one step, checked.

    schedule: a name of `orders.SCHEDULES`. training=False gives the evaluation program, whatever the schedule.
    ValueError for degrees below 1 or an unknown schedule.
    """
    if num_stages < 1 or microbatches < 1:
        raise ValueError(f"pipeline={num_stages} and microbatches={microbatches} must both be at least 1")
    chosen = schedule_named(schedule)
    if not training:
        chosen = FORWARD_ONLY
    stages = range(num_stages)
    program = Program(tuple(tuple(chosen.order(s, num_stages, microbatches)) for s in stages))
    check(program, [chosen.in_flight(s, num_stages, microbatches) for s in stages], complete=False)
    passes = [add_transfers, add_prologue]
    if training:
        passes += [add_reduction, add_optimizer]
    for add in passes:
        program = add(program)
    check(program)
    return program


def program_for(plan: Plan, training: bool = True) -> Program:
    """The program of a plan: `actions[s]` belongs to every rank of `plan.stages[s]`."""
    return build_program(len(plan.stages), plan.microbatches, plan.schedule, training)
