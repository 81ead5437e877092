"""The oracle: simulate every plan of the space. For small cases, and for the tests of the searches that are clever.

The space is the wide one of planner/wide.py, on up to 4 devices with that of unlike stages (planner/wide_mixes.py), where
the problem is small and its plans are no more than MAX_PLANS; else that of the exact search: 1F1B and GPipe, ZeRO 0 and 3,
recomputation "none" or "full" for each stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ...plan import Candidate, Plan, Prediction
from ...report.words import gib, plan_in_words
from ...simulate import simulate
from ..pricing import Piece, assemble
from ..problem import Problem
from ..wide import count_wide_plans, every_wide_plan, is_small
from ..wide_mixes import count_mixed_plans, every_mixed_plan

# About ten minutes of simulation; beyond it the method is not the right one.
MAX_PLANS = 200_000


def exhaustive(problem: Problem) -> Plan:
    """The plan of least simulated step time that fits. ValueError when there are too many plans, or none fits."""
    num_plans, plans = the_space(problem)
    if num_plans > MAX_PLANS:
        raise ValueError(
            f"method='exhaustive' would simulate {num_plans} plans, at most {MAX_PLANS} make sense; use method='auto', "
            f"which finds the same plan, or pin some of pipeline=, data=, tensor=, microbatches=, zero=, recompute="
        )
    best: Plan | None = None
    smallest: tuple[int, int, Plan] | None = None
    budget = problem.budget
    try:
        with budget.bar("exhaustive", " plans", num_plans) as bar:
            for plan in plans:
                if budget.expired(has_plan=best is not None):
                    break
                line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
                peak_bytes = max(line.peak_memory_bytes.values())
                excess_bytes = problem.excess_bytes(line.peak_memory_bytes)
                if smallest is None or excess_bytes < smallest[0]:
                    smallest = (excess_bytes, peak_bytes, plan)
                if excess_bytes <= 0 and (best is None or line.step_time_s < best.prediction.step_time_s):
                    best = replace(plan, prediction=Prediction(line.step_time_s, peak_bytes))
                bar.update()
    except KeyboardInterrupt:
        if best is None:
            raise
        budget.interrupted()
    if best is None and budget.cut_short:
        raise budget.no_plan("exhaustive")
    if best is None:
        excess_bytes, peak_bytes, plan = smallest
        limit_bytes = peak_bytes - excess_bytes
        raise ValueError(
            f"no plan of {problem.graph.name} fits in {limit_bytes} bytes ({gib(limit_bytes)}) per device; the "
            f"smallest ({plan_in_words(plan)}) needs {peak_bytes} bytes, {excess_bytes} too many"
        )
    verdict = f"chosen; the search was cut short {budget.cut_short}" if budget.cut_short else "chosen"
    found = best.prediction
    row = Candidate(plan_in_words(best), found.step_time_s, found.peak_memory_bytes, verdict)
    # Layouts of two axes are the best that are found for one given the other.
    is_whole = all(len(problem.model_axes(shape.tensor)) < 2 for shape in problem.shapes)
    bound_s = found.step_time_s if is_whole and not budget.cut_short else None
    return replace(best, prediction=replace(found, lower_bound_s=bound_s), candidates=(row,))


def the_space(problem: Problem) -> tuple[int, Iterator[Plan]]:
    """How many plans would be simulated, and these."""
    if is_small(problem):
        num_plans = count_wide_plans(problem) + count_mixed_plans(problem)
        if num_plans <= MAX_PLANS:
            return num_plans, itertools.chain(every_wide_plan(problem), every_mixed_plan(problem))
    return count_plans(problem), every_plan(problem)


def every_plan(problem: Problem) -> Iterator[Plan]:
    """All plans of the exact search's space, whether or not they fit in memory."""
    num_blocks = len(problem.graph.blocks)
    for shape in problem.shapes:
        for chain in problem.chains.of(problem.as_equal, shape):
            for cuts in itertools.combinations(range(1, num_blocks), shape.pipeline - 1):
                edges = list(itertools.pairwise((0, *cuts, num_blocks)))
                if not all(problem.allows_stage(s, *edge, shape.pipeline) for s, edge in enumerate(edges)):
                    continue
                for choice in itertools.product(problem.recompute_choices, repeat=shape.pipeline):
                    pieces = [Piece(*edge, recompute) for edge, recompute in zip(edges, choice, strict=True)]
                    plan = assemble(problem, shape, chain, pieces)
                    if not problem.refusal(plan):
                        yield plan


def count_plans(problem: Problem) -> int:
    """Plans of the exact search's space, chains of layouts apart."""
    num_blocks, ways = len(problem.graph.blocks), len(problem.recompute_choices)
    return sum(math.comb(num_blocks - 1, shape.pipeline - 1) * ways**shape.pipeline for shape in problem.shapes)
