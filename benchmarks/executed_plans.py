"""Different plans for one model: what every method finds, and what is found with choices pinned; each plan once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.planner.search import METHODS
from autopar.report.common_words import common_words
from autopar.report.words import plan_in_words
from benchmarks.fixed_plans import staged

# Degrees that a pinned search does not name.
_ONE = {"data": 1, "tensor": 1, "pipeline": 1}


@dataclass(frozen=True)
class Search:
    """One way to a plan. method: of METHODS, or "staged" for a plan that no search makes (fixed_plans.py)."""

    method: str
    pins: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        pins = ", ".join(f"{name}={value}" for name, value in self.pins.items() if (name, value) not in _ONE.items())
        return f"{self.method}({pins})" if pins else self.method

    def plan(self, graph: Graph, cluster: Cluster, time_limit_s: float) -> Plan:
        """ValueError where there is no such plan."""
        if self.method == "staged":
            return staged(graph, self.pins["schedule"], cluster.world_size, self.pins["microbatches"])
        return autopar.search(
            graph, cluster, method=self.method, progress=False, time_limit_s=time_limit_s, **self.pins
        )


@dataclass(frozen=True)
class Found:
    """A plan, the searches that led to it, its step time by the common simulator, and the plan in words."""

    plan: Plan
    searches: tuple[Search, ...]
    predicted_s: float
    words: str

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.searches))


def all_methods(names: Sequence[str] = tuple(METHODS)) -> list[Search]:
    return [Search(name) for name in names]


def pinned(ranks: int, rows: int) -> list[Search]:
    """Searches held to what `ranks` ranks can do otherwise with a batch of so many rows; slow plans are among them."""
    some, many = min(ranks, rows), rows // ranks
    found: list[tuple[str, dict[str, Any]]] = [
        ("auto", {"data": ranks, "zero": 0, "microbatches": 1, "recompute": "none"}),
        ("auto", {"data": ranks, "zero": 3, "microbatches": 1, "recompute": "none"}),
        ("auto", {"data": ranks, "zero": 1, "microbatches": 1, "recompute": "full"}),
        ("auto", {"data": ranks, "zero": 3, "microbatches": many, "recompute": "full"}),
        ("auto", {"tensor": ranks, "microbatches": 1, "recompute": "none"}),
        ("auto", {"tensor": ranks, "microbatches": some, "recompute": "full"}),
        ("auto", {"pipeline": ranks, "microbatches": some, "schedule": "1f1b", "recompute": "none"}),
        ("auto", {"pipeline": ranks, "microbatches": rows, "schedule": "gpipe", "recompute": "full"}),
        ("dapple", {"pipeline": ranks, "microbatches": rows, "schedule": "zb-h1"}),
        ("pipedream", {"pipeline": ranks, "microbatches": 1, "schedule": "pipedream"}),
        ("pipedream", {"pipeline": ranks, "microbatches": some, "schedule": "2bw"}),
        ("staged", {"microbatches": some, "schedule": "interleaved"}),
        ("staged", {"microbatches": some, "schedule": "zb-v"}),
    ]
    if ranks % 2 == 0 and ranks > 2:
        half = ranks // 2
        found += [
            ("auto", {"data": half, "tensor": 2}),
            ("auto", {"data": half, "pipeline": 2, "microbatches": many}),
            ("auto", {"tensor": half, "pipeline": 2, "microbatches": some}),
        ]
    return [Search(method, pins if method == "staged" else _ONE | pins) for method, pins in found]


def distinct(
    graph: Graph,
    cluster: Cluster,
    searches: Sequence[Search],
    time_limit_s: float,
    say: Callable[[str], None] = lambda line: None,
) -> list[Found]:
    """The plans that the searches find, the fastest by prediction first; a plan that several find is there once.

    say: told of searches that find nothing, and of predictions that the common simulator does not share.
    """
    found: dict[Plan, Found] = {}
    for search in searches:
        try:
            plan = search.plan(graph, cluster, time_limit_s)
            plan.validate(graph, cluster)
        except ValueError as error:
            say(f"{search} finds no plan: {error}")
            continue
        key = bare(plan)
        known = found.get(key)
        if known is None:
            known = Found(plan, (), autopar.simulate(graph, plan, cluster).step_time_s, _in_words(plan, graph))
        found[key] = replace(known, searches=(*known.searches, search))
        claimed = plan.prediction.step_time_s if plan.prediction else known.predicted_s
        if abs(claimed / known.predicted_s - 1) > 1e-3:
            say(
                f"{search} predicts {claimed * 1e3:.1f} ms for its plan, the simulator {known.predicted_s * 1e3:.1f} ms"
            )
    return sorted(found.values(), key=lambda one: one.predicted_s)


def bare(plan: Plan) -> Plan:
    """What of the plan decides what runs, in one form: equal for plans that do the same."""
    stages, layouts = [], {}
    for stage in plan.stages:
        used = []
        for of_axis in stage.layouts if stage.axes else ():
            used.append(tuple(layouts.setdefault(plan.layouts[i], len(layouts)) for i in of_axis))
        shares = stage.shares if len(set(stage.shares)) > 1 else ()
        recompute = stage.block_recompute if set(stage.block_recompute) != {"none"} else ()
        zero = stage.zero if stage.data > 1 else 0
        group = stage.zero_group % stage.data if zero else 0
        stages.append(
            replace(stage, layouts=tuple(used), shares=shares, recompute=recompute, zero=zero, zero_group=group)
        )
    # One microbatch has one order.
    schedule = "1f1b" if plan.microbatches == 1 and plan.schedule == "gpipe" else plan.schedule
    return replace(
        plan, schedule=schedule, stages=tuple(stages), layouts=tuple(layouts), prediction=None, candidates=()
    )


def _in_words(plan: Plan, graph: Graph) -> str:
    """With what its model axes do, where it has any."""
    said = [plan_in_words(plan)]
    if any(stage.axes for stage in plan.stages):
        said.append(f"({common_words(plan, graph)})")
    if plan.rewrites:
        said.append("of the rewritten graph")
    return " ".join(said)
