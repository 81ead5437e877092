"""The simulator: one of the two interpreters of a Program. It walks the program with costs and writes a Timeline.

Model. One clock per stage (all ranks of a stage do the same, so one stands for all). Forward, backward, prologue and
optimizer occupy the clock for what StageCost says. A send does not: it occupies its link, one per direction between two
stages, one message at a time, and the receiver waits until the message is whole. The gradient reduction starts inside
the last backward, which hides at most `reduce_overlap_s` of it and at most as long as it lasts itself.

Ignored: a slowdown of compute while transfers run (a StageCost may include it), contention between different links,
differences between the ranks of one stage, and the wait of tied stages for each other's gradients (reduce_model_s is
charged on each where its own gradients are whole).

schedule/step_time.py answers for the step time alone, without events and much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.cost.types import StageCost
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.schedule.build import program_for
from autopar.schedule.check import check, dependencies, is_receive, is_send
from autopar.schedule.instructions import (
    Backward,
    Forward,
    Instruction,
    OptimizerStep,
    Program,
    Prologue,
    ReduceGradients,
)
from autopar.schedule.orders import schedule_named
from autopar.schedule.step_time import exposed_reduce_s
from autopar.timeline import Event, Timeline


class Costs(Protocol):
    """What the simulator asks of a cost model; cost/model.py has the real one."""

    def stage(self, plan: Plan, index: int) -> StageCost: ...


def simulate(
    graph: Graph,
    plan: Plan,
    cluster: Cluster,
    model: Costs | None = None,
    *,
    training: bool = True,
    all_ranks: bool = False,
) -> Timeline:
    """The predicted Timeline of one step of `plan`.

    model: the cost model to ask, by default `CostModel(graph, cluster)`; pass one to use what was learned.
    all_ranks: events for every rank. By default each stage's first rank stands for all; `peak_memory_bytes` always
        has every rank.
    """
    model = model or CostModel(graph, cluster)
    costs = [model.stage(plan, index) for index in range(len(plan.stages))]
    ranks = [stage.ranks for stage in plan.stages]
    return simulate_program(program_for(plan, training), costs, ranks, all_ranks=all_ranks)


def simulate_program(
    program: Program,
    stage_costs: Sequence[StageCost],
    stage_ranks: Sequence[Sequence[int]] | None = None,
    *,
    all_ranks: bool = False,
) -> Timeline:
    """The Timeline of a checked program. stage_ranks[s]: the ranks of stage s, by default rank s alone.

    A send's event is its time on the link, a receive's the receiver's wait; both carry the bytes of the message, and
    other events carry 0.
    """
    check(program)
    assert len(stage_costs) == len(program.actions), (len(stage_costs), len(program.actions))
    ranks = stage_ranks or [(s,) for s in range(len(program.actions))]
    spans = _spans(program, stage_costs)
    events = []
    for stage, row in enumerate(program.actions):
        for rank in ranks[stage] if all_ranks else ranks[stage][:1]:
            for instruction, (start_s, end_s) in zip(row, spans[stage], strict=True):
                transfer = is_send(instruction) or is_receive(instruction)
                moved = stage_costs[_boundary(instruction)].boundary_bytes if transfer else 0
                events.append(Event(rank, str(instruction), start_s, end_s, moved))
    step_s = max(end_s for row in spans for _, end_s in row)
    peaks = {}
    for stage, cost in enumerate(stage_costs):
        peak = program_peak_bytes(program.actions[stage], cost)
        peaks |= dict.fromkeys(ranks[stage], peak)
    return Timeline(tuple(events), step_s, peaks)


def _spans(program: Program, stage_costs: Sequence[StageCost]) -> list[list[tuple[float, float]]]:
    """(start_s, end_s) per stage and instruction; stages run until they wait for a message that was not yet sent."""
    needs, provides = dependencies(program)
    spans: list[list[tuple[float, float]]] = [[] for _ in program.actions]
    clocks = [0.0] * len(program.actions)
    links: dict[tuple[int, int], float] = {}
    arrived: dict[object, float] = {}
    waiting: dict[object, int] = {}
    ready = list(range(len(program.actions)))
    durations = [_durations(cost) for cost in stage_costs]
    while ready:
        stage = ready.pop()
        row, done = program.actions[stage], spans[stage]
        for index in range(len(done), len(row)):
            instruction = row[index]
            start_s = clocks[stage]
            if is_receive(instruction):
                need = needs[stage][index]
                if need not in arrived:
                    waiting[need] = stage
                    break
                clocks[stage] = end_s = max(start_s, arrived[need])
            elif is_send(instruction):
                link = (stage, instruction.peer)
                start_s = max(start_s, links.get(link, 0.0))
                links[link] = end_s = start_s + stage_costs[_boundary(instruction)].send_s
                provide = provides[stage][index]
                arrived[provide] = end_s
                if provide in waiting:
                    ready.append(waiting.pop(provide))
            else:
                clocks[stage] = end_s = start_s + durations[stage][type(instruction)]
            done.append((start_s, end_s))
    return spans


def _boundary(instruction: Instruction) -> int:
    """The stage whose StageCost describes a transfer: the earlier of the two."""
    return min(instruction.stage, instruction.peer)


def _durations(cost: StageCost) -> dict[type, float]:
    return {
        Forward: cost.forward_s,
        Backward: cost.backward_s,
        Prologue: cost.prologue_s,
        ReduceGradients: exposed_reduce_s(cost),
        OptimizerStep: cost.optimizer_s,
    }


def at_rest_bytes(cost: StageCost) -> int:
    """Parameters, gradients and optimizer state of one rank."""
    return cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes


def program_peak_bytes(row: Sequence[Instruction], cost: StageCost) -> int:
    """Peak bytes of one rank over its list: at rest, plus the most that any forward or backward adds.

    A forward's activations count from its start to the end of its backward; in evaluation they are part of
    `forward_peak_bytes` alone. Gradients come into being during the step's first backward, which lets go of activations
    in return; so it counts with the fuller of its two ends. Where they are reduced over data they have buffers, which
    stay from step to step. Ignored: temporary tensors of the optimizer.
    """
    training = any(isinstance(i, Backward) for i in row)
    whole = at_rest_bytes(cost)
    rest = whole if training and cost.reduce_s > 0 else whole - cost.gradient_bytes
    peak, held = rest, 0
    for instruction in row:
        if isinstance(instruction, Forward):
            held += training
            running = held * cost.activation_bytes + cost.forward_peak_bytes
            peak = max(peak, rest + cost.unsharded_bytes + running)
        elif isinstance(instruction, Backward):
            before = rest + held * cost.activation_bytes
            rest, held = whole, held - 1
            after = rest + held * cost.activation_bytes
            peak = max(peak, max(before, after) + cost.unsharded_bytes + cost.backward_peak_bytes)
    return peak


def stage_peak_bytes(cost: StageCost, schedule: str, stage: int, num_stages: int, microbatches: int) -> int:
    """`program_peak_bytes` of a training step, from the bound on microbatches in flight instead of a walk."""
    held = schedule_named(schedule).in_flight(stage, num_stages, microbatches)
    transient_bytes = max(cost.forward_peak_bytes, cost.backward_peak_bytes)
    full = held * cost.activation_bytes + transient_bytes
    if cost.reduce_s > 0 or microbatches > held:
        return at_rest_bytes(cost) + cost.unsharded_bytes + full
    # All forwards precede the first backward, so that no gradients lie beside all activations.
    drained = cost.gradient_bytes + (held - 1) * cost.activation_bytes + cost.backward_peak_bytes
    return at_rest_bytes(cost) - cost.gradient_bytes + cost.unsharded_bytes + max(full, drained)
