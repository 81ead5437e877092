"""`auto` where a schedule is pinned that its searches do not price by themselves: several stages per group of ranks,
backwards in two halves, or no flush.

For every depth of pipeline that the constraints leave, the best plans under 1F1B are found as ever, and put under the
schedule; from there moves lead on (planner/alleviate.py). Small problems of equal devices are searched whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..plan import Candidate, Plan, Prediction
from ..report.words import plan_in_words
from ..schedule.orders import schedule_named
from .alleviate import Alleviation
from .candidates import NothingFits
from .groupings import every_grouping
from .moves import CHEAP
from .problem import Problem
from .rivals import Rivals
from .sketch import Sketch
from .unequal import MAX_SEEDED, pipelines
from .unequal_moves import RanksJudge, sketch_on_ranks
from .wide import is_small

# Process seconds that the moves take at most.
LIMIT_S = 2.0
# Plans under 1F1B that are put under the schedule, per depth of pipeline.
MAX_STARTS = 3

Core = Callable[[Problem], tuple[Plan, list[Plan]]]


def scheduled(problem: Problem, core: Core) -> Plan:
    """The best plan found. core: what finds the best plan of a problem under 1F1B and GPipe, and its next best.

    NothingFits, with a plan under 1F1B, where nothing that fits keeps the schedule; ValueError where there is not even that.
    """
    pinned = problem.constraints.pipeline
    depths = sorted({shape.pipeline for shape in problem.shapes if pinned or shape.pipeline > 1})
    starts = [plan for depth in depths for plan in _of_depth(problem, core, depth)]
    search = Alleviation(problem, min(math.inf if is_small(problem) else LIMIT_S, problem.budget.left_s))
    if (plan := _finished(search, lambda: search.run(starts))) is not None:
        return plan
    start = starts[0] if starts else core(_freed(problem, pinned))[0]
    nothing = Prediction(math.inf, problem.memory_limit_bytes + 1)
    raise NothingFits(_nothing_found(problem), replace(start, prediction=nothing, candidates=()))


def scheduled_on_ranks(problem: Problem, core: Core) -> Plan:
    """The best plan found on a cluster of unequal devices under a schedule with several stages per group; where devices are
    few, from all that groups may be, and from the best plan for what they have in common. ValueError where nothing that fits
    keeps the schedule."""
    few = problem.cluster.world_size <= MAX_SEEDED
    starts = [] if few else pipelines(_freed(problem, problem.constraints.pipeline))
    sketches = [_of_equal(problem, core)] if few else [sketch_on_ranks(problem, plan) for plan in starts]
    search = Alleviation(problem, min(LIMIT_S, problem.budget.left_s), CHEAP, RanksJudge(problem))
    every = every_grouping(problem, search.moves) if few else ()
    plan = _finished(search, lambda: search.run_from((*filter(None, sketches), *every), math.inf))
    if plan is None:
        raise ValueError(_nothing_found(problem))
    return plan


def _of_equal(problem: Problem, core: Core) -> Sketch | None:
    try:
        plan = scheduled(problem.as_equal, core)
    except ValueError:  # nothing fits there; here it may
        return None
    return Sketch.of(plan) if problem.constraints.pipeline in (None, plan.pipeline) else None


def _freed(problem: Problem, depth: int | None) -> Problem:
    """The problem under 1F1B, with what can be put under the schedule; None: pipelines of any depth."""
    pinned = problem.constraints
    zero = pinned.zero if schedule_named(pinned.schedule).may_shard else 0
    return replace(problem, constraints=replace(pinned, schedule=None, pipeline=depth, zero=zero), kept=[])


def _of_depth(problem: Problem, core: Core, depth: int) -> Iterator[Plan]:
    try:
        plan, others = core(_freed(problem, depth))
    except NothingFits as error:  # under another schedule, or after moves, it may
        plan, others = error.smallest, []
    except ValueError:  # nothing of this depth meets the other constraints; another may
        return
    yield from [plan, *others][:MAX_STARTS]


def _finished(search: Alleviation, run: Callable[[], object]) -> Plan | None:
    """The plan that the moves end with, if there is any."""
    problem = search.problem
    try:
        run()
    except KeyboardInterrupt:
        problem.budget.interrupted()
        if search.best is None:
            raise
    if search.best is None:
        return None
    judged = search.best.judged
    prediction = search.judge.prediction(judged)
    short = f"; the search was cut short {problem.budget.cut_short}" if problem.budget.cut_short else ""
    words = plan_in_words(judged.plan)
    chosen = Candidate(words, prediction.step_time_s, prediction.peak_memory_bytes, f"chosen{short}")
    plan = replace(judged.plan, prediction=prediction)
    return replace(plan, candidates=(chosen, *Rivals(problem, plan).rows(search.others())))


def _nothing_found(problem: Problem) -> str:
    return (
        f"no plan of {problem.graph.name} on {problem.cluster.world_size} devices under {problem.constraints} was found that "
        "fits in memory; leave out schedule=, or pin less beside it"
    )
