"""The last stage of `auto` on equal devices: stages that differ in devices and meshes, where such a pipeline is faster.

planner/mixes.py proposes pipelines for some numbers of microbatches around the best plan's; planner/judge.py has what they
cost exactly; the best of them are changed further by the moves of planner/alleviate.py. On up to 4 devices, in models of few
blocks, all pipelines of one stage per group are looked at first (planner/wide_mixes.py), so that there the answer is the
optimum of those too, or better. What is found must beat the plan given, which otherwise stays.

Pipelines are proposed for 1F1B or GPipe; where another schedule is pinned, they are put under that.

Not looked at: on more than MANY_DEVICES devices, if something fits, other tensor degrees than the best plan's, and pipelines
where that is none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

from ..plan import Plan
from ..schedule.orders import schedule_named
from .alleviate import BACK_OFF, Alleviation, Found, chosen_over
from .meshes import MeshLayouts, may_differ
from .mixes import Mixes
from .problem import Problem
from .rewriting import on_graph
from .sketch import Sketch
from .wide import search_sketches
from .wide_mixes import is_tiny, mixed_sketches

# Process seconds that it takes at most: on few devices and on many, or this share of those spent before.
LIMIT_S, LIMIT_LARGE_S, LIMIT_SHARE = 1.5, 0.1, 0.06
# Of these the part in which pipelines are proposed; in the rest they are changed by moves.
PROPOSING = 0.6
# Up to so many devices all meshes are looked at, on more those of the best plan's tensor degrees, if it is a pipeline.
MANY_DEVICES = 16
# Numbers of microbatches that are looked at, on few devices and on many; and pipelines judged for each.
MAX_COUNTS, MAX_COUNTS_MANY = 5, 1
MAX_JUDGED = 10


def with_unequal_stages(problem: Problem, plan: Plan, spent_s: float) -> Plan:
    """`plan`, or a faster one with `plan` among its candidates.

    plan: the best of equal stages, with its prediction; where that does not fit in memory, any that does is better.
    spent_s: process seconds that it took.
    """
    budget = problem.budget
    fits = plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
    many = fits and problem.cluster.world_size > MANY_DEVICES
    if not may_differ(problem) or budget.expired() or (many and plan.pipeline == 1):
        return plan
    best, rewrites = None, plan.rewrites
    try:
        for own, made in _graphs(problem, plan):
            limit_s = min(max(LIMIT_LARGE_S if many else LIMIT_S, LIMIT_SHARE * spent_s), budget.left_s)
            limit_s = math.inf if is_tiny(own) else limit_s
            search, until_s = Alleviation(own, limit_s), time.process_time() + PROPOSING * limit_s
            search.best_s = best.time_s if best else plan.prediction.step_time_s if fits else math.inf
            try:
                if is_tiny(own):
                    every = mixed_sketches(own)
                    for sketch, judged in search_sketches(own, every, search.judge, search.best_s, budget.expired):
                        search.accept(Found(sketch, judged))
                search.run_from(_pipelines(search, plan, many, until_s), search.best_s)
            finally:
                if search.best is not None:
                    best, rewrites = search.best, made
    except KeyboardInterrupt:
        budget.interrupted()
    if best is None:
        return plan
    short = f"; the search was cut short {budget.cut_short}" if budget.cut_short else ""
    return replace(chosen_over(plan, best, short), rewrites=rewrites)


def _graphs(problem: Problem, plan: Plan) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """The problem of the graph as the plan has it, and where all is looked at also as it was captured; with the rewrites."""
    if plan.rewrites:
        yield on_graph(problem, plan.graph_of(problem.graph)), plan.rewrites
    if not plan.rewrites or is_tiny(problem):
        yield problem, ()


def _pipelines(search: Alleviation, plan: Plan, many: bool, until_s: float) -> Iterator[Sketch]:
    """Those that are expected to beat the best, for each number of microbatches; what was found already first.

    many: look only at what is near the plan.
    """

    def is_over() -> bool:
        return search.is_over or time.process_time() >= until_s

    problem = search.problem
    schedule, is_proposed = problem.constraints.schedule or "1f1b", not problem.constraints.is_scheduled
    if search.best is not None:
        yield search.best.sketch
    layouts = MeshLayouts(problem)
    layouts.keep(plan)
    pinned = problem.constraints.zero
    used = max(stage.zero for stage in plan.stages)
    zeros = (pinned,) if pinned is not None else (used,) if many else tuple(dict.fromkeys((0, used)))
    zeros = zeros if schedule_named(schedule).may_shard else (0,)
    tensors = {stage.tensor for stage in plan.stages} if many else None
    for count in _counts(problem, plan.microbatches)[: MAX_COUNTS_MANY if many else MAX_COUNTS]:
        mixes = Mixes(problem, search.judge, layouts, count, tensors, is_over)
        proposed = mixes.sketches(zeros, schedule if is_proposed else "1f1b")
        for number, (expected_s, sketch) in enumerate(proposed):
            # What is expected is a time under the schedule that it is proposed for.
            if number == MAX_JUDGED or (is_proposed and expected_s > BACK_OFF * search.best_s):
                break
            if len({(team.data, team.axes) for team in sketch.teams}) > 1:  # the others were searched before
                yield sketch


def _counts(problem: Problem, near: int) -> list[int]:
    """Numbers of microbatches, the nearest first."""
    return sorted(problem.microbatch_counts(), key=lambda c: abs(math.log(c / near)))
