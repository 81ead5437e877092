"""`autopar.search`: one entrance for every planning method."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..cluster.spec import Cluster
from ..cost.model import CostModel
from ..graph import Graph
from ..plan import Plan
from .auto import auto
from .budget import Budget, Stop
from .chains import LayoutChains
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
from .problem import Constraints, Costs, Problem

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


def search(
    graph: Graph,
    cluster: Cluster,
    method: str = "auto",
    *,
    model: Costs | None = None,
    progress: bool = True,
    time_limit_s: float | None = None,
    stop: Stop | None = None,
    **constraints: Any,
) -> Plan:
    """The plan that trains `graph` on `cluster` with the least predicted step time, among those that fit in memory.

    method: "auto" (exact over the space, see planner/auto.py) or "exhaustive" (simulates every plan; small cases only).
    model: the cost model; by default `CostModel(graph, cluster)`. progress: show a bar when planning takes long.
    time_limit_s: after so many seconds the search ends with the best plan that it has; a search that has none yet goes on
        until its first. stop: an event (anything with is_set) that ends it at once, from another thread. Ctrl-C ends it
        too. What ended a search early stands in the verdict of the plan's first candidate, with how much faster a plan
        could be at most where the method knows.
    constraints: data=, tensor=, pipeline= (degrees), microbatches=, schedule= ("1f1b" or "gpipe"), zero= (0 or 3),
        recompute= ("none" or "full") pin one choice each; memory_limit_bytes= is what a plan may use of each device (by
        default the device's memory less a reserve); context= and expert= may only be 1.
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
    budget = Budget(time_limit_s, stop, progress)
    costs = model or CostModel(graph, cluster)
    problem = Problem(graph, cluster, costs, LayoutChains(), Constraints(**constraints), budget=budget)
    return replace(METHODS[method](problem), precision=graph.precision)


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, 3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
