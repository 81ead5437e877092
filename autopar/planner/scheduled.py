"""`auto` where a schedule is pinned that its searches do not price by themselves: several stages per group of ranks, or
backwards in two halves.

For every depth of pipeline that the constraints leave, the best plans under 1F1B are found as ever, and put under the
schedule; from there moves lead on (planner/alleviate.py). Small problems are searched whole. ValueError where nothing that
fits keeps the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..plan import Candidate, Plan, Prediction
from ..report.words import plan_in_words
from .alleviate import Alleviation
from .candidates import NothingFits
from .constraints import SEARCHED_SCHEDULES
from .problem import Problem
from .wide import is_small

# Process seconds that the moves take at most.
LIMIT_S = 2.0
# Plans under 1F1B that are put under the schedule, per depth of pipeline.
MAX_STARTS = 3

Core = Callable[[Problem], tuple[Plan, list[Plan]]]


def is_scheduled(problem: Problem) -> bool:
    """Whether the schedule that is pinned, if any, is one of those."""
    return problem.constraints.schedule not in (None, *SEARCHED_SCHEDULES)


def scheduled(problem: Problem, core: Core) -> Plan:
    """The best plan found. core: what finds the best plan of a problem under 1F1B and GPipe, and its next best."""
    starts = list(_starts(problem, core))
    search = Alleviation(problem, min(math.inf if is_small(problem) else LIMIT_S, problem.budget.left_s))
    try:
        search.run(starts)
    except KeyboardInterrupt:
        problem.budget.interrupted()
        if search.best is None:
            raise
    if search.best is None:
        raise ValueError(
            f"no plan of {problem.graph.name} on {problem.cluster.world_size} devices under {problem.constraints} was found "
            "that fits in memory; leave out schedule=, or pin less beside it"
        )
    judged = search.best.judged
    prediction = Prediction(judged.time_s, max(judged.peaks_bytes))
    short = f"; the search was cut short {problem.budget.cut_short}" if problem.budget.cut_short else ""
    words = plan_in_words(judged.plan)
    chosen = Candidate(words, prediction.step_time_s, prediction.peak_memory_bytes, f"chosen{short}")
    return replace(judged.plan, prediction=prediction, candidates=(chosen,))


def _starts(problem: Problem, core: Core) -> Iterator[Plan]:
    pinned, world = problem.constraints, problem.cluster.world_size
    most = min(world, len(problem.graph.blocks))
    depths = [pinned.pipeline] if pinned.pipeline else [p for p in range(2, most + 1) if world % p == 0]
    for depth in depths:
        try:
            free = replace(problem, constraints=replace(pinned, schedule=None, pipeline=depth), kept=[])
            plan, others = core(free)
        except NothingFits as error:  # under another schedule, or after moves, it may
            plan, others = error.smallest, []
        except ValueError:  # nothing of this depth meets the other constraints; another may
            continue
        yield from [plan, *others][:MAX_STARTS]
