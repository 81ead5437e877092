"""What a finished plan's prediction is made of, and what would make another plan the best.

The terms of the step time are those of planner/terms.py.

What would change the choice is asked of the cost model: the chosen plan and the best of those that lost are priced again
on clusters of which one figure is another, and against other memory limits. It ignores plans that were not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cluster.spec import Cluster
from ..cost.model import CostModel
from ..cost.types import StageCost
from ..plan import Plan, Prediction, StageMemory
from ..report.words import gib, plan_in_words, seconds
from ..schedule.build import program_for
from ..schedule.orders import schedule_named
from ..simulate import program_peak_bytes, stage_peak_bytes
from .judge import Judge
from .problem import Problem
from .terms import costs_of, step_terms

# Of the plans that lost, how many are priced again, and the factors that are tried, the smallest first.
MAX_REPRICED = 5
FACTORS = (1.5, 2.0, 4.0, 8.0)
# What is faster by less is as fast.
LEAST_GAIN = 5e-3


def with_terms(problem: Problem, plan: Plan) -> Plan:
    """The plan with the terms of its step time and the parts of its memory in its prediction."""
    costs = costs_of(problem, plan.graph_of(problem.graph))
    stages = [costs.stage(plan, s) for s in range(len(plan.stages))]
    assert plan.prediction is not None
    return replace(
        plan,
        prediction=replace(
            plan.prediction,
            terms=step_terms(plan, stages, costs, plan.prediction.step_time_s),
            memory=stage_memory(plan, stages),
        ),
    )


def stage_memory(plan: Plan, stages: Sequence[StageCost]) -> tuple[StageMemory, ...]:
    """Of each stage the parts of the peak of a rank that runs it, with the other stages that the rank runs."""
    schedule = schedule_named(plan.schedule)
    is_simple = schedule.virtual == 1 and schedule.flushes
    # a whole program is long, and only needed where ranks run several stages or none ever ends
    program = None if is_simple else program_for(plan)
    found = []
    for s, cost in enumerate(stages):
        group = plan.groups.index(plan.stages[s].ranks)
        mates = {i: stages[i] for i, other in enumerate(plan.stages) if other.ranks == plan.stages[s].ranks}
        if program is None:
            peak_bytes = stage_peak_bytes(cost, plan.schedule, s, len(stages), plan.microbatches)
        else:
            peak_bytes = program_peak_bytes(program.actions[group], mates)
        rest = [sum(getattr(one, name) for one in mates.values()) for name in _AT_REST]
        held = schedule.in_flight(group, plan.pipeline, plan.microbatches, len(mates))
        # where gradients come into being late the peak may be below all that is ever held
        rest[1] = max(0, min(rest[1], peak_bytes - rest[0] - rest[2]))
        activations = max(0, min(peak_bytes - sum(rest), held * cost.activation_bytes))
        found.append(StageMemory(*rest, activations, peak_bytes - sum(rest) - activations))
    return tuple(found)


_AT_REST = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")


# -- what would change the choice


def changes(problem: Problem, plan: Plan, others: Sequence[Plan]) -> tuple[str, ...]:
    """A sentence for each change of the cluster or of memory that would make one of `others` the best, or one that says what
    would not; () where nothing can be asked.

    others: plans that were priced and lost, some of which may not fit. Those with rewrites are left out.
    """
    rivals = [one for one in others if not one.rewrites and one.prediction is not None and one != plan]
    if plan.prediction is None or plan.rewrites or not rivals or problem.cluster.hosts:
        # of devices of several kinds there is no one figure to change
        return ()
    said, asked = [*_by_memory(problem, plan, rivals)], []
    fitting = [one for one in rivals if one.prediction.peak_memory_bytes <= problem.memory_limit_bytes]
    nearest = sorted(fitting, key=lambda one: one.prediction.step_time_s)[:MAX_REPRICED]
    for what, make in perturbed(problem.cluster):
        asked.append(what.format(f"{FACTORS[-1]:g}"))
        for factor in FACTORS:
            best = _best_on(problem, make(factor), [plan, *nearest])
            if best is not None:
                said.append(f"with {what.format(f'{factor:g}')}: {plan_in_words(best[0])}, {best[1]}")
                break
    return tuple(said) or (f"nothing that was tried: more memory, {', '.join(asked)}",)


def perturbed(cluster: Cluster):
    """(in words, function of a factor to a cluster) of the figures that may be others."""
    if cluster.num_hosts > 1:
        yield (
            "{} times the bandwidth between hosts",
            lambda f: replace(cluster, inter=_faster(cluster.inter, f)),
        )
        yield (
            "1/{} of the bandwidth between hosts",
            lambda f: replace(cluster, inter=_faster(cluster.inter, 1 / f)),
        )
    yield "{} times the bandwidth inside a host", lambda f: replace(cluster, intra=_faster(cluster.intra, f))
    yield "1/{} of the bandwidth inside a host", lambda f: replace(cluster, intra=_faster(cluster.intra, 1 / f))
    device = cluster.device
    yield (
        "{} times the arithmetic of a device",
        lambda f: replace(
            cluster, device=replace(device, flops_per_s={k: v * f for k, v in device.flops_per_s.items()})
        ),
    )


def _faster(link, factor: float):
    return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)


def _best_on(problem: Problem, cluster: Cluster, plans: Sequence[Plan]) -> tuple[Plan, str] | None:
    """The plan that beats the first one on another cluster, and the figures; None where the first stays the best."""
    model = CostModel(problem.graph, cluster, getattr(problem.costs, "corrections", None))
    judge = Judge(problem, model)
    times_s = [judge(one).time_s for one in plans]
    best = min(range(len(plans)), key=lambda i: (times_s[i], i))
    if times_s[best] > times_s[0] * (1 - LEAST_GAIN):
        return None
    return plans[best], f"{seconds(times_s[best])} instead of {seconds(times_s[0])}"


def _by_memory(problem: Problem, plan: Plan, rivals: Sequence[Plan]):
    """The least more memory with which a faster plan fits."""
    limit_bytes = problem.memory_limit_bytes
    faster = [
        one
        for one in rivals
        if one.prediction.peak_memory_bytes > limit_bytes and one.prediction.step_time_s < plan.prediction.step_time_s
    ]
    if faster:
        nearest = min(faster, key=lambda one: one.prediction.peak_memory_bytes)
        yield (
            f"with {gib(nearest.prediction.peak_memory_bytes - limit_bytes)} more memory per device: "
            f"{plan_in_words(nearest)}, {seconds(nearest.prediction.step_time_s)} instead of "
            f"{seconds(plan.prediction.step_time_s)}"
        )


def explained(problem: Problem, plan: Plan, what_if: bool) -> Plan:
    """The plan with what `with_terms` and, if asked for, `changes` find."""
    plan = with_terms(problem, plan) if plan.prediction is not None else plan
    if not what_if:
        return plan
    prediction: Prediction | None = plan.prediction
    assert prediction is not None
    return replace(plan, prediction=replace(prediction, changes=changes(problem, plan, problem.kept)))
