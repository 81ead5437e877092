"""Plans for clusters of several kinds of hosts."""

from __future__ import annotations

from dataclasses import replace

from ..plan import Plan, Prediction
from ..simulate import simulate
from .problem import Problem


def unequal(problem: Problem, progress: bool = True) -> Plan:
    """The best plan for the equal cluster that is nowhere better than this one, as it runs on this one."""
    from .auto import auto

    plan = auto(problem.as_equal, progress)
    line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
    return replace(plan, prediction=Prediction(line.step_time_s, max(line.peak_memory_bytes.values())))
