"""The loop closed: hold what was measured against what was predicted, correct the cost model, and plan again.

What is learnt, each as a factor on the cost model's own figure, so that it carries over to other plans:

- compute, by class of op and direction: measured over predicted seconds of one profiled step, less what the profiler
  slowed that step's forward and backward instructions by;
- links, by "intra"/"inter" and collective: the median of measured over predicted seconds. Collectives of the plan that
  ran hidden behind compute are timed again by themselves, at the size that the plan uses. A collective that the plan
  does not use is corrected by what the others on the same link have in common;
- memory: measured over predicted bytes above what lies at rest.

A factor learnt from less than 1% of the predicted time is noise and is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .cluster.ring import COLLECTIVES
from .cluster.spec import Cluster
from .cost.collectives import collective_s
from .cost.corrections import Corrections
from .cost.model import CostModel
from .cost.storage import base_name
from .graph import Graph
from .plan import Plan
from .planner.search import search
from .runtime.agree import from_rank_zero
from .runtime.measure import Measurement
from .runtime.recorder import CollectiveSample
from .runtime.timing import time_collectives
from .schedule.build import program_for
from .schedule.instructions import Backward, BackwardInput, BackwardWeight, Forward, parse_instruction
from .simulate import at_rest_bytes, program_peak_bytes, simulate
from .timeline import Event

if TYPE_CHECKING:
    from .parallelize import Model

_NOISE_SHARE = 0.01
_FACTOR_RANGE = (1e-3, 1e3)

OpSeconds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Observation:
    """What one rank measured.

    stages: its stages of the plan; op_seconds: of the profiled step; slowdown: how much longer forward and backward
    instructions took in it than in an undisturbed one; samples: timed collectives; peak_memory_bytes: of the profiled
    step, with what lay at rest.
    """

    stages: tuple[int, ...]
    op_seconds: OpSeconds
    slowdown: tuple[float, float]
    samples: tuple[CollectiveSample, ...]
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Refinement:
    """What a refinement found and did.

    learned: a line per correction. moved: whether the model runs another plan now. reason: why it moved or stayed.
    measured_step_s, predicted_step_s: of the plan that ran (as predicted before). corrected_step_s: the same with the
    corrections. new_step_s: the best plan found, under the corrections. move_s: what moving cost, or would have cost.
    """

    moved: bool
    reason: str
    learned: tuple[str, ...]
    old_plan: Plan
    new_plan: Plan
    measured_step_s: float
    predicted_step_s: float
    corrected_step_s: float
    new_step_s: float
    move_s: float

    def __str__(self) -> str:
        head = f"{'moved' if self.moved else 'stayed'}: {self.reason}"
        return "\n".join([head, *(f"  learned {line}" for line in self.learned)])


def observe(measurement: Measurement, samples: Sequence[CollectiveSample]) -> Observation:
    """This rank's observation of its latest steps, with `samples` of collectives timed besides."""
    rank = measurement.runtime.groups.rank
    assert measurement.timeline is not None
    usual = _compute_seconds(e for e in measurement.timeline.events if e.rank == rank)
    profiled = _compute_seconds(measurement.profiled_events)
    slowdown = tuple(max(p / u, 1.0) if u > 0 else 1.0 for p, u in zip(profiled, usual, strict=True))
    return Observation(
        stages=tuple(measurement.runtime.groups.meshes),
        op_seconds=dict(measurement.op_seconds),
        slowdown=(slowdown[0], slowdown[1]),
        samples=(*measurement.samples, *samples),
        peak_memory_bytes=measurement.peak_memory_bytes,
    )


def _compute_seconds(events: Iterable[Event]) -> tuple[float, float]:
    """Seconds of all forward and of all backward instructions."""
    seconds = [0.0, 0.0]
    for event in events:
        instruction = parse_instruction(event.token)
        if isinstance(instruction, Forward | Backward | BackwardInput | BackwardWeight):
            seconds[not isinstance(instruction, Forward)] += event.duration_s
    return seconds[0], seconds[1]


def correct(
    graph: Graph, plan: Plan, cluster: Cluster, old: Corrections, observations: Sequence[Observation]
) -> tuple[Corrections, tuple[str, ...]]:
    """The corrections after `observations` of `plan`, and a line on each that changed."""
    model = CostModel(graph, cluster, old)
    compute = _compute_factors(graph, plan, model, observations)
    links = _link_factors(cluster, old, [s for o in observations for s in o.samples])
    memory = _memory_factor(plan, model, observations)
    learned = [
        f"{name} takes {_times(f)} forward, {_times(b)} backward of what was predicted"
        for name, (f, b) in sorted(compute.items())
    ]
    learned += [
        f"{kind} on the {where}-host link takes {_times(f)} of what was predicted"
        for (where, kind), f in sorted(links.items())
    ]
    learned.append(f"activations take {_times(memory)} of what was predicted")
    new = Corrections(
        compute={
            name: tuple(_clamped(a * b) for a, b in zip(old.compute.get(name, (1.0, 1.0)), pair, strict=True))
            for name, pair in {**dict.fromkeys(old.compute, (1.0, 1.0)), **compute}.items()
        },
        links={
            key: (_clamped(old.link(*key)[0] * factor), _clamped(old.link(*key)[1] / factor))
            for key, factor in {**dict.fromkeys(old.links, 1.0), **links}.items()
        },
        memory=_clamped(old.memory * memory),
    )
    return new, tuple(learned)


def _compute_factors(
    graph: Graph, plan: Plan, model: CostModel, observations: Sequence[Observation]
) -> dict[str, tuple[float, float]]:
    """By compute class, measured over predicted seconds of all ranks together, (forward, backward)."""
    class_of: dict[str, str] = {}
    for op in graph.ops:
        class_of.setdefault(base_name(op.target), model.compute_class(op))
    measured: dict[str, list[float]] = {}
    predicted: dict[str, list[float]] = {}
    for observation in observations:
        for name, seconds in observation.op_seconds.items():
            if name in class_of:
                found = measured.setdefault(class_of[name], [0.0, 0.0])
                for i in (0, 1):
                    found[i] += seconds[i] / observation.slowdown[i]
        for stage in observation.stages:
            for name, pair in model.breakdown(plan, stage).compute.items():
                expected = predicted.setdefault(name, [0.0, 0.0])
                for i in (0, 1):
                    expected[i] += pair[i] * plan.microbatches
    whole = [sum(pair[i] for pair in predicted.values()) for i in (0, 1)]
    factors = {}
    for name, expected in predicted.items():
        found = measured.get(name, [0.0, 0.0])
        pair = [
            found[i] / expected[i] if found[i] > 0 and expected[i] > _NOISE_SHARE * whole[i] else 1.0 for i in (0, 1)
        ]
        if pair != [1.0, 1.0]:
            factors[name] = (_clamped(pair[0]), _clamped(pair[1]))
    return factors


def _link_factors(
    cluster: Cluster, old: Corrections, samples: Iterable[CollectiveSample]
) -> dict[tuple[str, str], float]:
    """By link and collective, measured over predicted seconds."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        expected_s = collective_s(cluster, sample.kind, sample.size_bytes, sample.ranks, old)
        if expected_s > 0:
            where = "inter" if cluster.crosses_hosts(sample.ranks) else "intra"
            ratios.setdefault((where, sample.kind), []).append(sample.seconds / expected_s)
    factors = {key: statistics.median(found) for key, found in ratios.items()}
    for where in {where for where, _ in factors}:
        common = statistics.geometric_mean([f for (w, _), f in factors.items() if w == where])
        for kind in COLLECTIVES:
            factors.setdefault((where, kind), common)
    return factors


def _memory_factor(plan: Plan, model: CostModel, observations: Sequence[Observation]) -> float:
    """Measured over predicted bytes above what lies at rest; the fullest rank's, so that what was learnt is safe."""
    factors = []
    program = program_for(plan)
    for observation in observations:
        costs = {stage: model.stage(plan, stage) for stage in observation.stages}
        rest = sum(map(at_rest_bytes, costs.values()))
        peak = program_peak_bytes(program.actions[program.home[observation.stages[0]]], costs)
        if observation.peak_memory_bytes is not None and peak > rest:
            factors.append((observation.peak_memory_bytes - rest) / (peak - rest))
    return _clamped(max(factors)) if factors and max(factors) > 0 else 1.0


def _times(factor: float) -> str:
    return f"{factor:.2f} times"


def _clamped(factor: float) -> float:
    return min(max(factor, _FACTOR_RANGE[0]), _FACTOR_RANGE[1])


def refine(model: Model, optimizer: torch.optim.Optimizer, remaining_steps: int | None) -> Refinement:
    """See `Model.refine`; all ranks of the world call it."""
    measurement = model.measurement
    if measurement.timeline is None or measurement.peak_memory_bytes is None:
        raise ValueError("refine: nothing is measured yet; call it after at least 5 training steps in a row")
    if remaining_steps is None:
        remaining_steps = measurement.num_steps
    observation = observe(measurement, time_collectives(model.runtime, model.device))
    observations: list[Observation] = [observation] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(observations, observation)
    graph, cluster, plan = model.graph, model.cluster, model.plan
    corrections, learned = correct(graph, plan, cluster, model.corrections, observations)
    costs = CostModel(graph, cluster, corrections)

    def decide() -> tuple[Plan, float, float, float, float]:
        # The running graph stays: its rewrites are done.
        found = search(graph, cluster, model=costs, progress=False, **{**model.constraints, "rewrites": False})
        best = replace(found, reduction=plan.reduction, offload=plan.offload, rewrites=plan.rewrites)
        old_s = simulate(graph, plan, cluster, costs).step_time_s
        new_s = simulate(graph, best, cluster, costs).step_time_s
        move_s = model.build_s + _state_transfer_s(model, corrections)
        return best, old_s, new_s, move_s, measurement.median_step_s()

    # Every figure that the decision rests on is rank 0's: ranks that measured for themselves could disagree and part.
    best, old_s, new_s, move_s, measured_s = from_rank_zero(decide)
    # What the model still gets wrong about this plan, it is taken to get wrong about others in proportion.
    saving_s = measured_s * (1 - new_s / old_s) * remaining_steps
    same = (best.stages, best.layouts, best.microbatches, best.schedule) == (
        plan.stages,
        plan.layouts,
        plan.microbatches,
        plan.schedule,
    )
    if same:
        reason = "the plan is still the best one"
    elif saving_s <= move_s:
        reason = (
            f"a better plan would save {saving_s:.1f} s over {remaining_steps} steps, and moving costs {move_s:.1f} s"
        )
    else:
        reason = (
            f"{measured_s * new_s / old_s:.3f} s instead of {measured_s:.3f} s a step saves {saving_s:.1f} s over "
            f"{remaining_steps} steps, and moving costs {move_s:.1f} s"
        )
    predicted_s = model.prediction.step_time_s
    model.corrections = corrections
    moved = not same and saving_s > move_s
    if moved:
        move_s = model.move(best, optimizer, costs)
    else:
        model.prediction = simulate(graph, plan, cluster, costs)
    return Refinement(moved, reason, learned, plan, best, measured_s, predicted_s, old_s, new_s, move_s)


def _state_transfer_s(model: Model, corrections: Corrections) -> float:
    """Seconds to send this rank's parameters and their two optimizer moments to other ranks, at the corrected rates."""
    world = tuple(range(dist.get_world_size()))
    rank = model.runtime.groups.rank
    part_bytes = sum(math.prod(s.ownership.local_shape(rank)) * s.dtype.itemsize for s in model.runtime.specs)
    return collective_s(model.cluster, "send", 3 * part_bytes, (world[0], world[-1]), corrections)
