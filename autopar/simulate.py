"""The simulator: one of the two interpreters of a Program. It walks the program with costs and writes a Timeline.

Model. One clock per group of ranks (all ranks of a group do the same, so one stands for all). Forward, backward, prologue
and optimizer occupy the clock for what StageCost says. A send does not: it occupies its link, one per direction between
two groups, one message at a time, and the receiver waits until the message is whole; stages of one group hand over for
nothing. The reduction of a stage's gradients starts inside its last backward (the last weight half where backwards are
split), which hides at most `reduce_overlap_s` of it and at most as long as it lasts itself; after that it goes on while
other stages of the group compute, one stage's reduction at a time.

Where devices differ, a StageCost is that of a stage's slowest ranks, and every rank's memory is its own.

Ignored: a slowdown of compute while transfers run (a StageCost may include it), contention between different links,
how long the faster ranks of a group wait for the slower ones, and the wait of tied stages for each other's gradients
(reduce_model_s is charged on each where its own gradients are whole).

A stream without flushes: an update takes its reduction, which nothing hides, and the optimizer; `simulate` shows one
batch's time of the steady state.

schedule/step_time.py answers for the step time alone, without events and much faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.cost.types import StageCost
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.schedule.build import build_stream, program_for, stream_batches
from autopar.schedule.check import check
from autopar.schedule.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    OptimizerStep,
    Program,
    Prologue,
    ReduceGradients,
    RestoreWeights,
    StashWeights,
    Update,
)
from autopar.schedule.orders import schedule_named
from autopar.schedule.step_time import unhidden_reduce_s
from autopar.schedule.steps import RECEIVES, SENDS, dependencies
from autopar.timeline import Event, Timeline


class Costs(Protocol):
    """What the simulator asks of a cost model; cost/model.py has the real one."""

    def stage(self, plan: Plan, index: int) -> StageCost: ...


class RankCosts(Costs, Protocol):
    """What it asks besides where devices differ."""

    def of_rank(self, plan: Plan, index: int, rank: int) -> StageCost: ...


def simulate(
    graph: Graph,
    plan: Plan,
    cluster: Cluster,
    model: Costs | None = None,
    *,
    training: bool = True,
    all_ranks: bool = False,
) -> Timeline:
    """The predicted Timeline of one step of `plan`, or of one batch amid a stream where its schedule has no flush.

    model: the cost model to ask, by default `CostModel(graph, cluster)`; pass one to use what was learned.
    all_ranks: events for every rank. By default each group's first rank stands for all; `peak_memory_bytes` always
        has every rank.
    """
    model = model or CostModel(plan.graph_of(graph), cluster)
    costs = [model.stage(plan, index) for index in range(len(plan.stages))]
    program = program_for(plan, training)
    line = _walked(program, costs, plan.groups, all_ranks)
    if cluster is not None and cluster.hosts:
        line = replace(line, peak_memory_bytes=_peaks_by_rank(program, plan, model))
    if training and not schedule_named(plan.schedule).flushes:
        return _steady_batch(line, plan.pipeline)
    return line


def simulate_program(
    program: Program,
    stage_costs: Sequence[StageCost],
    group_ranks: Sequence[Sequence[int]] | None = None,
    *,
    all_ranks: bool = False,
) -> Timeline:
    """The Timeline of a checked program. group_ranks[g]: the ranks of group g, by default rank g alone.

    A send's event is its time on the link, a receive's the receiver's wait; both carry the bytes of the message, and
    other events carry 0.
    """
    check(program)
    return _walked(program, stage_costs, group_ranks or [(g,) for g in range(len(program.actions))], all_ranks)


def _walked(
    program: Program, stage_costs: Sequence[StageCost], ranks: Sequence[Sequence[int]], all_ranks: bool
) -> Timeline:
    assert len(stage_costs) == len(program.home), (len(stage_costs), len(program.home))
    spans = _spans(program, stage_costs)
    events = []
    for group, row in enumerate(program.actions):
        for rank in ranks[group] if all_ranks else ranks[group][:1]:
            for instruction, (start_s, end_s) in zip(row, spans[group], strict=True):
                transfer = isinstance(instruction, SENDS + RECEIVES)
                moved = stage_costs[_boundary(instruction)].boundary_bytes if transfer else 0
                events.append(Event(rank, str(instruction), start_s, end_s, moved))
    step_s = max(end_s for row in spans for _, end_s in row)
    peaks = {}
    for group, row in enumerate(program.actions):
        peak = program_peak_bytes(row, {stage: stage_costs[stage] for stage in program.stages_of(group)})
        peaks |= dict.fromkeys(ranks[group], peak)
    return Timeline(tuple(events), step_s, peaks)


def _peaks_by_rank(program: Program, plan: Plan, model: RankCosts) -> dict[int, int]:
    """Peak bytes of every rank, where those of one group differ in their rows."""
    found = {}
    for group, row in enumerate(program.actions):
        known: dict[tuple[StageCost, ...], int] = {}
        stages = program.stages_of(group)
        for rank in plan.groups[group]:
            costs = tuple(model.of_rank(plan, stage, rank) for stage in stages)
            if costs not in known:
                known[costs] = program_peak_bytes(row, dict(zip(stages, costs, strict=True)))
            found[rank] = known[costs]
    return found


def _spans(program: Program, stage_costs: Sequence[StageCost]) -> list[list[tuple[float, float]]]:
    """(start_s, end_s) per group and instruction; groups run until they wait for a message that was not yet sent."""
    needs, provides = dependencies(program)
    home = program.home
    spans: list[list[tuple[float, float]]] = [[] for _ in program.actions]
    clocks = [0.0] * len(program.actions)
    links: dict[tuple[int, int], float] = {}
    arrived: dict[object, float] = {}
    waiting: dict[object, int] = {}
    ready = list(range(len(program.actions)))
    durations = {(kind, stage): s for stage, cost in enumerate(stage_costs) for kind, s in _durations(cost).items()}
    for group in range(len(program.actions)):
        stages = program.stages_of(group)
        durations[OptimizerStep, stages[0]] = sum(stage_costs[stage].optimizer_s for stage in stages)
    backward_ends: dict[int, tuple[float, bool]] = {}
    reduced = [0.0] * len(program.actions)
    while ready:
        group = ready.pop()
        row, done = program.actions[group], spans[group]
        for index in range(len(done), len(row)):
            instruction = row[index]
            kind, stage = type(instruction), instruction.stage
            start_s = clocks[group]
            if kind in RECEIVES:
                need = needs[group][index]
                if need not in arrived:
                    waiting[need] = group
                    break
                clocks[group] = end_s = max(start_s, arrived[need])
            elif kind in SENDS:
                link = (group, home[instruction.peer])
                start_s = max(start_s, links.get(link, 0.0))
                links[link] = end_s = start_s + stage_costs[_boundary(instruction)].send_s
                provide = provides[group][index]
                arrived[provide] = end_s
                if provide in waiting:
                    ready.append(waiting.pop(provide))
            elif kind is ReduceGradients:
                ended_s, half = backward_ends[stage]
                reduced[group] = max(reduced[group], ended_s) + unhidden_reduce_s(stage_costs[stage], half)
                clocks[group] = end_s = max(start_s, reduced[group]) + stage_costs[stage].reduce_model_s
            else:
                clocks[group] = end_s = start_s + durations[kind, stage]
                if kind in (Backward, BackwardWeight):
                    backward_ends[stage] = (end_s, kind is BackwardWeight)
            done.append((start_s, end_s))
    return spans


def _boundary(instruction: Instruction) -> int:
    """The stage whose StageCost describes a transfer: the earlier of the two."""
    return min(instruction.stage, instruction.peer)


def _durations(cost: StageCost) -> dict[type, float]:
    return {
        Forward: cost.forward_s,
        Backward: cost.backward_s,
        BackwardInput: cost.backward_input_s,
        BackwardWeight: cost.backward_weight_s,
        Prologue: cost.prologue_s,
        StashWeights: 0.0,
        RestoreWeights: 0.0,
        Update: cost.reduce_s + cost.reduce_model_s + cost.optimizer_s,
    }


def stream_batch_s(num_groups: int, microbatches: int, schedule: str, stage_costs: Sequence[StageCost]) -> float:
    """What `simulate` calls the step time of a plan without flushes: seconds between two updates amid its stream."""
    program = build_stream(num_groups, microbatches, schedule, stream_batches(num_groups, microbatches))
    spans = _spans(program, stage_costs)
    updates = zip(program.actions[0], spans[0], strict=True)
    return _steady([end_s for instruction, (_, end_s) in updates if isinstance(instruction, Update)], num_groups)[1]


def _steady(update_ends_s: Sequence[float], num_groups: int) -> tuple[float, float]:
    """(start, seconds per batch) of the middle of a stream, by the updates of its first group."""
    middle, count = len(update_ends_s) // 2, 4 * num_groups
    start_s = update_ends_s[middle - count // 2]
    return start_s, (update_ends_s[middle + count // 2] - start_s) / count


def _steady_batch(line: Timeline, num_groups: int) -> Timeline:
    """Of a stream's Timeline, as long a piece from its middle as a batch takes there on average."""
    first_rank = min(event.rank for event in line.events)
    start_s, batch_s = _steady([e.end_s for e in line.by_rank()[first_rank] if e.kind == "U"], num_groups)
    events = []
    for event in line.events:
        begin, end = max(event.start_s - start_s, 0.0), min(event.end_s - start_s, batch_s)
        if begin < end:
            events.append(Event(event.rank, event.token, begin, end, event.bytes))
    return Timeline(tuple(events), batch_s, line.peak_memory_bytes)


def at_rest_bytes(cost: StageCost) -> int:
    """Parameters, gradients and optimizer state of one rank."""
    return cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes


def program_peak_bytes(row: Sequence[Instruction], costs: StageCost | Mapping[int, StageCost]) -> int:
    """Peak bytes of one rank over its list: at rest, plus the most that any forward or backward adds.

    costs: of the stages in the list, by stage, or of the only one.
    A forward's activations count from its start to the end of its backward; in evaluation they are part of
    `forward_peak_bytes` alone. Of a split backward, `deferred_bytes` stay from the end of its input half to the end of its
    weight half. In a stream, further versions of the weights stay from the update that replaces them to the first one after
    their last use. Gradients come into being during a stage's first backward of the step, which lets go of activations in
    return; so it counts with the fuller of its two ends. Where they have buffers (`StageCost.gradients_stay`) these stay
    from step to step. Ignored: temporary tensors of the optimizer.
    """
    by_stage = {i.stage: costs for i in row} if isinstance(costs, StageCost) else costs
    training = any(isinstance(i, Backward | BackwardInput) for i in row)
    unborn = {s for s, cost in by_stage.items() if not (training and cost.has_gradient_buffers)}
    live = sum(at_rest_bytes(cost) - (cost.gradient_bytes if s in unborn else 0) for s, cost in by_stage.items())
    peak = live
    versions: dict[int, set[int]] = {}
    last_use = {(i.stage, i.version): index for index, i in enumerate(row) if isinstance(i, RestoreWeights)}
    for index, instruction in enumerate(row):
        stage = instruction.stage
        cost = by_stage[stage]
        if isinstance(instruction, Update):
            old = versions.get(stage, set())
            versions[stage] = {v for v in old | {instruction.batch} if last_use.get((stage, v), -1) > index}
            live += cost.parameter_bytes * (len(versions[stage]) - len(old))
            peak = max(peak, live)
        if isinstance(instruction, Forward):
            live += training * cost.activation_bytes
            peak = max(peak, live + cost.unsharded_bytes + cost.forward_peak_bytes)
        elif isinstance(instruction, Backward | BackwardInput | BackwardWeight):
            before = live
            if stage in unborn:
                unborn.discard(stage)
                live += cost.gradient_bytes
            if isinstance(instruction, BackwardWeight):
                live -= cost.deferred_bytes
            else:
                live -= cost.activation_bytes
                live += cost.deferred_bytes * isinstance(instruction, BackwardInput)
            peak = max(peak, max(before, live) + cost.unsharded_bytes + cost.backward_peak_bytes)
    return peak


def stage_peak_bytes(cost: StageCost, schedule: str, stage: int, num_stages: int, microbatches: int) -> int:
    """`program_peak_bytes` of a training step of a schedule with one stage per group and whole backwards, from the bound on
    microbatches in flight instead of a walk; of one with split backwards, by the walk."""
    chosen = schedule_named(schedule)
    assert chosen.virtual == 1, schedule
    if chosen.splits_backward:
        return program_peak_bytes(tuple(chosen.order(stage, num_stages, microbatches)), cost)
    held = chosen.in_flight(stage, num_stages, microbatches)
    transient_bytes = max(cost.forward_peak_bytes, cost.backward_peak_bytes)
    full = held * cost.activation_bytes + transient_bytes
    if cost.has_gradient_buffers or microbatches > held:
        return at_rest_bytes(cost) + cost.unsharded_bytes + full
    # All forwards precede the first backward, so that no gradients lie beside all activations.
    drained = cost.gradient_bytes + (held - 1) * cost.activation_bytes + cost.backward_peak_bytes
    return at_rest_bytes(cost) - cost.gradient_bytes + cost.unsharded_bytes + max(full, drained)
