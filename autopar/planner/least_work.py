"""A bound of every plan there is, whatever its meshes, layouts and schedule: the work of a step over all devices.

Each op runs somewhere, on rows and parts of weights that are no larger than the whole, and kernels take the least per row
where they are largest. With W_k the forward and backward of the whole batch at once on one device of kind k alone, and n_k
devices of it,

    T >= 1 / sum_k (n_k / W_k)

which leaves out communication, waiting, what memory makes plans compute again, and the optimizer.
"""

from __future__ import annotations

from dataclasses import replace

from ..plan import Plan
from .floors import TIME_SLACK
from .problem import Chain, Problem
from .replicas import replica_speeds
from .terms import costs_of


def with_work_bound(problem: Problem, plan: Plan) -> Plan:
    """The plan with this bound of its graph, where nothing closer is proved."""
    if plan.prediction is None or plan.prediction.lower_bound_s is not None:
        return plan
    bound_s = min(work_bound_s(problem, plan), plan.prediction.step_time_s)
    return replace(plan, prediction=replace(plan.prediction, lower_bound_s=bound_s))


def work_bound_s(problem: Problem, plan: Plan) -> float:
    """Seconds that no plan of this plan's graph is faster than."""
    graph = plan.graph_of(problem.graph)
    own = problem if graph is problem.graph else replace(problem, graph=graph, costs=costs_of(problem, graph))
    speeds = replica_speeds(own, range(problem.cluster.world_size), Chain(), 1, 1)
    return TIME_SLACK / sum(speeds)
