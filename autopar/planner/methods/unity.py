"""Unity: algebraic rewrites and parallelization searched together.

A state is a rewritten graph; its cost is that of its best parallelization, because what a rewrite is worth depends on
how the ops around it are split: joining two products saves work on whole batches and may not on a device's share.

    best first      take the cheapest open graph, parallelize each graph that one rewrite makes of it     `_search`
    prune           keep those within ALPHA of the best; graphs seen before (by fingerprint) are dropped
    parallelize     partition, combine, replicate and reduce are the placements and conversions of the layout solver;
                    the graph is cut at blocks, whose boundary placements are enumerated, and blocks of one kind are
                    solved once (Unity splits at post-dominators and memoises the halves)                `_parallelize`

A rewrite of one of several isomorphic blocks is applied to all of them. The rewrites are capture/rewrites.py; a plan
lists those that it was made for, and the runtime executes the graph that they make.

Reference: Unger et al., "Unity: Accelerating DNN Training Through Joint Optimization of Algebraic Transformations and
Parallelization", OSDI 2022, sections 4 to 6. It has no pipelines.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from ...capture.rewrites import find_rewrites, rewritten
from ...cost.model import CostModel
from ...plan import Plan
from ..chains import LayoutChains
from ..problem import Problem, Shape
from ..rewriting import on_graph
from .bench import Bench

# Unity's default: what is up to 5% slower may lead to something faster.
ALPHA = 1.05
MAX_GRAPHS = 40
# Shapes that a rewritten graph is parallelized in: those that suit the captured one best.
MAX_SHAPES = 8


def unity(problem: Problem, jointly: bool = True) -> Plan:
    """The best plan over rewritten graphs.

    jointly: False chooses the rewrites first, by what they are worth on one device, and parallelizes after (to see what
    searching together is worth).
    """
    with Bench(problem, "unity") as bench:
        shapes = bench.shapes(lambda s: s.pipeline == 1, lambda s: s.zero == 0)
        if jointly:
            _search(bench, shapes)
        else:
            alone = replace(problem.cluster, num_hosts=1, devices_per_host=1)
            costs = CostModel(problem.graph, alone)
            single = Problem(problem.graph, alone, costs, LayoutChains(), budget=problem.budget)
            with Bench(single, "unity") as one:
                _search(one, one.shapes(lambda s: s.microbatches == 1))
            _parallelize(bench, one.best_plan().rewrites, shapes)
        return bench.best_plan()
    return bench.best_plan()


def _search(bench: Bench, shapes: Sequence[Shape]) -> None:
    times = _parallelize(bench, (), shapes)
    ranked = sorted(shapes, key=lambda shape: times[shape])[:MAX_SHAPES]
    least_s = min(times.values())
    seen = {bench.problem.graph.fingerprint}
    heap: list[tuple[float, int, tuple[str, ...]]] = [(least_s, 0, ())]
    while heap and len(seen) < MAX_GRAPHS and not bench.spent:
        cost_s, _, done = heapq.heappop(heap)
        if cost_s > ALPHA * least_s or cost_s == math.inf:
            break
        for more in find_rewrites(rewritten(bench.problem.graph, done)):
            if bench.spent or len(seen) >= MAX_GRAPHS:
                break
            try:
                graph = rewritten(bench.problem.graph, (*done, *more))
            except ValueError:
                # two of a group took away each other's place
                continue
            if graph.fingerprint in seen:
                continue
            seen.add(graph.fingerprint)
            found_s = min(_parallelize(bench, (*done, *more), ranked).values())
            least_s = min(least_s, found_s)
            if found_s <= ALPHA * least_s:
                heapq.heappush(heap, (found_s, len(seen), (*done, *more)))


def _parallelize(bench: Bench, rewrites: tuple[str, ...], shapes: Sequence[Shape]) -> dict[Shape, float]:
    """Offer the rewritten graph in each of the shapes; what each takes, infinite where it does not fit."""
    problem = bench.problem
    graph = rewritten(problem.graph, rewrites)
    own = problem
    if rewrites:
        try:
            own = on_graph(problem, graph)
        except ValueError:
            # what is pinned by name is no longer there
            return dict.fromkeys(shapes, math.inf)
    inner = Bench(own, "unity")
    times: dict[Shape, float] = {}
    for shape in shapes:
        if bench.spent:
            times.setdefault(shape, math.inf)
            break
        if shape.tensor > 1 and not own.splits(shape.tensor, shape.data):
            times[shape] = math.inf
            continue
        cuts = [inner.num_blocks * (s + 1) // shape.pipeline for s in range(shape.pipeline)]
        plan = replace(inner.equal_plan(shape, cuts), rewrites=rewrites)
        times[shape] = bench.offer(plan, own.costs)
        if times[shape] == math.inf:
            times[shape] = bench.offer(replace(inner.relieved(plan), rewrites=rewrites), own.costs)
    return {shape: times.get(shape, math.inf) for shape in shapes}
