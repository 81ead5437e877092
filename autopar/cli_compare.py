"""Every search method on one problem, judged by one simulator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .cluster.spec import Cluster
from .cost.model import CostModel
from .graph import Graph
from .plan import Plan
from .planner.chains import LayoutChains
from .planner.methods.exhaustive import count_plans
from .planner.problem import Constraints, Problem
from .planner.search import METHODS, search
from .report.explain import table
from .report.words import gib, plan_in_words, seconds
from .simulate import simulate

# The oracle simulates each plan of the space, at about a millisecond each; beyond this it is left out.
MAX_EXHAUSTIVE_PLANS = 5_000


def compare_methods(
    graph: Graph, cluster: Cluster, constraints: Mapping[str, Any], progress: bool, time_limit_s: float | None = None
) -> str:
    """A table with a row for each method: its plan, step time and memory by the common simulator, and planning time.

    time_limit_s: for each method. ValueError when the constraints are impossible, or no method finds a plan.
    """
    costs = CostModel(graph, cluster)
    problem = Problem(graph, cluster, costs, LayoutChains(), Constraints(**constraints))
    num_plans = count_plans(problem)
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    failures: list[ValueError] = []
    for method in METHODS:
        if method == "exhaustive" and num_plans > MAX_EXHAUSTIVE_PLANS:
            rows.append((method, "skipped", "", "", ""))
            notes.append(
                f"exhaustive was skipped: it would simulate {num_plans:,} plans, and {MAX_EXHAUSTIVE_PLANS:,} are the "
                "most that compare waits for; pin some degrees to make the space smaller"
            )
            continue
        start_s = time.perf_counter()
        try:
            plan = search(
                graph, cluster, method, model=costs, progress=progress, time_limit_s=time_limit_s, **constraints
            )
        except ValueError as error:
            failures.append(error)
            rows.append((method, "no plan", "", "", seconds(time.perf_counter() - start_s)))
            notes.append(f"{method} found no plan: {error}")
            continue
        rows.append(_row(method, graph, plan, cluster, costs, time.perf_counter() - start_s))
    if len(failures) + any(row[1] == "skipped" for row in rows) == len(rows):
        raise failures[0]
    header = ("method", "plan", "step", "memory", "planned in")
    return "\n".join(("", table(header, rows), *notes))


def _row(
    method: str, graph: Graph, plan: Plan, cluster: Cluster, costs: CostModel, elapsed_s: float
) -> tuple[str, ...]:
    line = simulate(graph, plan, cluster, model=None if plan.rewrites else costs)
    return (
        method,
        plan_in_words(plan),
        seconds(line.step_time_s),
        gib(max(line.peak_memory_bytes.values())),
        seconds(elapsed_s),
    )
