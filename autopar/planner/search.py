"""`autopar.search`: one entrance for every planning method."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from ..cluster.spec import Cluster
from ..cost.model import CostModel
from ..graph import Graph
from ..plan import Plan
from ..schedule.orders import SCHEDULES
from .auto import auto
from .budget import Budget, Stop
from .chains import LayoutChains
from .constraints import Constraints, Space
from .explanation import explained
from .methods.aceso import aceso
from .methods.alpa import alpa
from .methods.dapple import dapple
from .methods.exhaustive import exhaustive
from .methods.flexflow import flexflow
from .methods.metis import metis
from .methods.pipedream import pipedream
from .methods.piper import piper
from .methods.tofu import tofu
from .methods.uniap import uniap
from .methods.unity import unity
from .methods.whale import whale
from .problem import Costs, Problem
from .roles import refusal

METHODS: dict[str, Callable[[Problem], Plan]] = {
    "auto": auto,
    "exhaustive": exhaustive,
    "pipedream": pipedream,
    "dapple": dapple,
    "piper": piper,
    "flexflow": flexflow,
    "tofu": tofu,
    "unity": unity,
    "alpa": alpa,
    "whale": whale,
    "aceso": aceso,
    "metis": metis,
    "uniap": uniap,
}

# Where a method can make more than 1F1B and GPipe, or model axes with roles, if it is asked to. Interleaved and V-shaped
# schedules have several stages per device.
_SYNCHRONOUS = Space(schedules=("1f1b", "gpipe", "zb-h1"))
SPACES: dict[str, Space] = {
    "auto": Space(schedules=tuple(SCHEDULES), roles=("context", "expert"), unlike=True),
    "exhaustive": Space(schedules=("1f1b", "gpipe", "zb-h1", "pipedream", "2bw"), roles=("context", "expert")),
    "pipedream": Space(schedules=("1f1b", "gpipe", "pipedream", "2bw")),
    "dapple": _SYNCHRONOUS,
    "piper": _SYNCHRONOUS,
    "alpa": _SYNCHRONOUS,
    "metis": _SYNCHRONOUS,
    "uniap": _SYNCHRONOUS,
}


def search(
    graph: Graph,
    cluster: Cluster,
    method: str = "auto",
    *,
    model: Costs | None = None,
    progress: bool = True,
    time_limit_s: float | None = None,
    stop: Stop | None = None,
    what_if: bool = False,
    **constraints: Any,
) -> Plan:
    """The plan that trains `graph` on `cluster` with the least predicted step time, among those that fit in memory.

    method: "auto" (exact over the space, see planner/auto.py) or "exhaustive" (simulates every plan; small cases only).
    model: the cost model; by default `CostModel(graph, cluster)`. progress: show a bar when planning takes long.
    time_limit_s: after so many seconds the search ends with the best plan that it has; a search that has none yet goes on
        until its first. stop: an event (anything with is_set) that ends it at once, from another thread. Ctrl-C ends it
        too. What ended a search early stands in the verdict of the plan's first candidate, with how much faster a plan
        could be at most where the method knows. what_if: also price the best plans that lost on other clusters, to say in
        `plan.prediction.changes` what would change the choice, and look for a closer bound (some seconds on a large model).
    constraints: data=, tensor=, pipeline= (degrees), microbatches=, schedule= (see schedule/orders.py), zero= (0 to 3),
        recompute= ("none", "selective" or "full") pin one choice each. memory_limit_bytes= is what a plan may use of each
        device, or memory_reserve= what it must leave free (a float: share; a whole number: bytes; 0.1 by default).
        layout={"*.q_proj": "column"} pins how the ops of modules lie on the model axis, by pattern of their names (the
        words are those of planner/pins.py), stage={"model.layers.0.*": 0} which stage runs them (-1: the last).
        rewrites=False keeps the graph as it was captured. context= and expert= are degrees of model axes that split the
        positions, or the experts (planner/roles.py); tensor= is then the degree of an axis beside, and two axes are the most.
        `SPACES` says which method can keep which schedule, and which makes such axes.
    KeyboardInterrupt: Ctrl-C before there is any plan.
    ValueError: `stop` before there is any plan; an unknown method or constraint; constraints that contradict each other,
        the batch, the model or the cluster; no plan that fits in memory (with the smallest that was found, and what it
        lacks).
    Needs no process group.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}{_nearest(method, METHODS)}")
    known = Constraints.__dataclass_fields__
    for name in constraints:
        if name not in known:
            raise ValueError(f"unknown constraint {name}=; expected one of {', '.join(known)}{_nearest(name, known)}")
    space, pinned = SPACES.get(method, Space()), Constraints(**constraints)
    _check_space(method, space, pinned)
    budget = Budget(time_limit_s, stop, progress)
    costs = model or CostModel(graph, cluster)
    chains = LayoutChains()
    problem = Problem(graph, cluster, costs, chains, pinned, budget=budget, space=space, thorough=what_if)
    with _no_collections(), closing(chains):
        plan = replace(METHODS[method](problem), precision=graph.precision)
        own = problem.pins.on(plan.graph_of(graph))
        if lacking := own.refusal(plan) or refusal(pinned.roles, own.graph, plan):
            raise ValueError(
                f"method={method!r} finds no plan of {graph.name} that keeps {pinned}: in its best one {lacking}; use fewer "
                "of these constraints, or another method"
            )
        return explained(problem, plan, what_if)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's cycle collector: a search makes little that it would free, and each of its passes over the whole
    graph and all prices takes some tenths of a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_space(method: str, space: Space, pinned: Constraints) -> None:
    """ValueError, with the methods that can, where the method cannot make what is pinned."""
    for name, field in (("schedule", "schedules"), ("zero", "zeros"), ("recompute", "recompute")):
        value = getattr(pinned, name)
        if value is None or value in getattr(space, field):
            continue
        able = [other for other in METHODS if value in getattr(SPACES.get(other, Space()), field)]
        raise ValueError(
            f"{name}={value!r}: method={method!r} makes plans with {name} "
            f"{', '.join(map(repr, getattr(space, field)))} only; use method={' or '.join(map(repr, able))}"
        )

    for name, degree in pinned.roles:
        if name not in space.roles:
            able = [other for other in METHODS if name in SPACES.get(other, Space()).roles]
            raise ValueError(
                f"{name}={degree}: method={method!r} makes plans with {name} 1 only; use method="
                f"{' or '.join(map(repr, able))}"
            )


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, 3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
