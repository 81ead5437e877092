"""The step time of a finished plan in parts: means over stages of what they compute and communicate, and of their waiting.

On each stage M times what a microbatch computes and communicates, what is seen of the gradient reduction, and the optimizer;
what is left of the step is waiting (bubbles, transfers between stages).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cost.model import CostModel
from ..cost.types import StageCost
from ..graph import Graph
from ..plan import Plan, Term
from ..schedule.step_time import exposed_reduce_s
from .problem import Costs, Problem

COMPUTE, REDUCTION, OPTIMIZER, WAITING = "compute", "gradient reduction not hidden", "optimizer", "waiting (bubbles)"


def costs_of(problem: Problem, graph: Graph) -> Costs:
    """Prices of the problem's graph or of a rewritten one: the problem's model of it; made-up costs know one graph only."""
    costs = problem.costs
    if graph is problem.graph:
        return costs
    return costs.of_graph(graph) if isinstance(costs, CostModel) else CostModel(graph, problem.cluster)


def terms_of(problem: Problem, plan: Plan) -> tuple[Term, ...]:
    """Of a plan with its prediction."""
    costs = costs_of(problem, plan.graph_of(problem.graph))
    stages = [costs.stage(plan, s) for s in range(len(plan.stages))]
    return step_terms(plan, stages, costs, plan.prediction.step_time_s)


def step_terms(plan: Plan, stages: Sequence[StageCost], costs: Costs, step_time_s: float) -> tuple[Term, ...]:
    """The step time in parts, the largest first, waiting last."""
    found: dict[str, float] = {}
    passes: dict[StageCost, dict[str, float]] = {}
    for s, cost in enumerate(stages):
        if cost not in passes:
            passes[cost] = _pass_terms(plan, s, cost, costs)
        for name, time_s in passes[cost].items():
            found[name] = found.get(name, 0.0) + plan.microbatches * time_s
        found[REDUCTION] = found.get(REDUCTION, 0.0) + exposed_reduce_s(cost)
        found[OPTIMIZER] = found.get(OPTIMIZER, 0.0) + cost.optimizer_s
    # Several stages of one set of ranks run one after the other.
    terms = {name: time_s / plan.pipeline for name, time_s in found.items() if time_s > 0}
    ordered = sorted(terms.items(), key=lambda term: -term[1])
    return tuple(Term(*term) for term in (*ordered, (WAITING, max(0.0, step_time_s - sum(terms.values())))))


def _pass_terms(plan: Plan, s: int, cost: StageCost, costs: Costs) -> dict[str, float]:
    """Of one microbatch: compute, and each kind of collective."""
    whole_s = cost.forward_s + cost.backward_s
    breakdown = getattr(costs, "breakdown", None)
    if breakdown is None:
        return {COMPUTE: whole_s}
    collectives = {_collective(name): sum(pair) for name, pair in breakdown(plan, s).collectives.items()}
    return {COMPUTE: max(0.0, whole_s - sum(collectives.values())), **collectives}


def _collective(name: str) -> str:
    """The cost model's "inter/all_reduce" in words."""
    where, _, kind = name.rpartition("/")
    place = {"intra": " inside hosts", "inter": " between hosts"}.get(where, f" {where}".rstrip())
    return f"{kind.replace('_', '-')}{place}"
