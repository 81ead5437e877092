"""Algebraic rewrites of the graph, at the end of `auto`: what capture/rewrites.py can do to the captured graph, kept where
the rewritten graph has a faster plan.

Rewrites come in groups, because isomorphic blocks have them alike. First all groups together are tried, then each alone;
from the best of these on, one more group at a time as long as that is faster. A rewritten graph is planned by the same
search: all groups together in all degrees, as what joining products is worth depends on how they are split (Unger et al.,
"Unity", OSDI 2022), and so is each alone while there is time; others in the degrees and microbatches of the best plan so
far. Meshes that differ by stage are left as they are, and so are graphs whose modules are pinned by name.

On many devices products are large, and what a rewrite saves is small against the time to plan anew: there all groups are
tried together only, in the shape of the plan that was found, if they can be worth it (planner/rewriting_once.py); and in all
shapes where the search takes no longer than LIMIT_S.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..capture.rewrites import find_rewrites, rewritten
from ..cost.model import CostModel
from ..graph import Graph
from ..plan import Plan, Prediction
from .chains import LayoutChains
from .constraints import SEARCHED_SCHEDULES
from .problem import Problem
from .rewriting_once import LEAST_SHARE, most_saved_s, planned_alike, rewriting_s
from .terms import costs_of

# Process seconds that it takes at most: so many, or as long as the search before it.
LIMIT_S = 1.0
# A search that takes no longer is run again whatever rewrites may be worth.
QUICK_S = 0.5
# What is faster by less is as fast: other ops round differently, so the graph stays as it is for so little.
LEAST_GAIN = 1e-3


def with_rewrites(problem: Problem, plan: Plan, search: Callable[[Problem], Plan], spent_s: float) -> Plan:
    """`plan`, or a faster one whose `rewrites` say what is done to the graph first.

    search: what found `plan`. spent_s: the process seconds that it took.
    """
    pinned = problem.constraints
    is_alike = len({(stage.data, stage.tensor) for stage in plan.stages}) == 1
    if not isinstance(problem.costs, CostModel) or not is_alike:
        return plan
    if pinned.rewrites is False or pinned.layout or pinned.stage:
        return plan
    groups, seen = find_rewrites(problem.graph), {problem.graph.fingerprint}
    best, ends_s = plan, time.process_time() + max(LIMIT_S, spent_s)
    alone = [[group] for group in groups]
    from_plain = ([groups] if len(groups) > 1 else []) + alone
    if problem.is_large:
        is_tried = groups and (spent_s <= QUICK_S or _may_pay(problem, plan, groups))
        from_plain, alone = [groups] if is_tried else [], []
    try:
        for is_plain, more in [*((True, more) for more in from_plain), *((False, more) for more in alone)]:
            rewrites, graph = _applied(problem.graph, plan.rewrites if is_plain else best.rewrites, more)
            if graph.fingerprint in seen:
                continue
            seen.add(graph.fingerprint)
            ways = [planned_alike(problem, graph, best)] if problem.is_large else []
            if not problem.is_large or spent_s <= LIMIT_S:
                ways.append(_planned(search, problem, graph, None if is_plain else best))
            for found in ways:
                if found is not None and _time_s(found) < _time_s(best) * (1 - LEAST_GAIN):
                    best = replace(found, rewrites=rewrites)
            if time.process_time() >= ends_s or problem.budget.expired():
                break
    except KeyboardInterrupt:
        problem.budget.interrupted()
    if best is plan:
        return plan
    chosen = next(row for row in best.candidates if row.verdict.startswith("chosen"))
    gain = f"{_time_s(plan) / _time_s(best):.3f}x slower: the graph as it was captured"
    before = (replace(row, verdict=gain) for row in plan.candidates if row.verdict.startswith("chosen"))
    # Bounds of the captured graph do not hold for another.
    prediction = Prediction(_time_s(best), best.prediction.peak_memory_bytes)
    return replace(best, prediction=prediction, candidates=(chosen, *before))


def _may_pay(problem: Problem, plan: Plan, groups: Sequence[tuple[str, ...]]) -> bool:
    """Whether rewrites can save enough of the step, and there is time to make the graph."""
    if min(LIMIT_S, problem.budget.left_s) < rewriting_s(problem.graph, groups) or problem.budget.expired():
        return False
    return most_saved_s(problem, plan, groups) >= LEAST_SHARE * _time_s(plan)


def _applied(graph: Graph, done: tuple[str, ...], more: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], Graph]:
    """Rewrites and the graph that they make: those done, and of `more` each group that still has its place."""
    made = rewritten(graph, done)
    for group in more:
        try:
            made, done = rewritten(graph, (*done, *group)), (*done, *group)
        except ValueError:  # an earlier group took its place away
            continue
    return done, made


def _planned(search: Callable[[Problem], Plan], problem: Problem, graph: Graph, like: Plan | None) -> Plan | None:
    """The best plan of a rewritten graph, in the degrees of `like` if that is given; None where none is legal or fits."""
    pinned = replace(problem.constraints, rewrites=False)
    if like is not None:
        stage, besides = like.stages[0], math.prod(degree for _, degree in pinned.roles)
        schedule = pinned.schedule or (like.schedule if like.schedule not in SEARCHED_SCHEDULES else None)
        pinned = replace(
            pinned, data=stage.data, tensor=stage.tensor // besides, pipeline=like.pipeline,
            microbatches=like.microbatches, schedule=schedule,
        )  # fmt: skip
    try:
        own = replace(
            problem,
            graph=graph,
            costs=problem.costs.of_graph(graph),
            chains=LayoutChains(),
            constraints=pinned,
            kept=[],
        )
        return search(own)
    except ValueError:
        return None


def on_graph(problem: Problem, graph: Graph) -> Problem:
    """The same problem of a graph that rewrites have made of its own. ValueError where what is pinned by name is no longer
    there."""
    return replace(problem, graph=graph, costs=costs_of(problem, graph), chains=LayoutChains())


def _time_s(plan: Plan) -> float:
    return plan.prediction.step_time_s
