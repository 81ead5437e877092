"""UniAP: stages and strategies of all layers as one mixed-integer program per (stages, microbatches).

The program is `uniap_program`. A layer is a block (or a run of blocks of about equal work where there are more than
`MAX_LAYERS`), a strategy is (data, tensor, ZeRO level, recomputation). One stage has one mesh, so strategies of
different meshes do not meet inside a stage; where the runtime wants equal stages, not in one plan either.

Reference: Lin et al., arXiv 2307.16375, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ...plan import Plan, Recompute
from ...schedule.orders import schedule_named
from ..problem import Problem, Shape
from .alpa import cluster_blocks
from .bench import Bench, Part, Spent
from .uniap_program import ChainCosts, Joint, solve_program

MAX_LAYERS = 24
# A program is given up after so long; UniAP itself stops Gurobi after 60 s.
PROGRAM_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class _Way:
    """A strategy: a mesh, and whether its layers recompute."""

    shape: Shape
    recompute: Recompute

    @property
    def mesh(self) -> tuple[int, int, int]:
        return self.shape.data, self.shape.tensor, self.shape.zero


def uniap(problem: Problem) -> Plan:
    """The best of UniAP's plans over the numbers of stages and microbatches."""
    with Bench(problem, "uniap") as bench:
        groups: dict[tuple[int, int], list[Shape]] = {}
        for shape in bench.shapes():
            groups.setdefault((shape.pipeline, shape.microbatches), []).append(shape)

        with suppress(Spent):
            # one mesh in all stages first: these programs are small
            least_s: dict[tuple[int, int], float] = {}
            for key, shapes in groups.items():
                for mesh in dict.fromkeys(_Way(shape, "none").mesh for shape in shapes):
                    if bench.spent:
                        break
                    found_s = _solve(bench, [s for s in shapes if _Way(s, "none").mesh == mesh])
                    least_s[key] = min(least_s.get(key, math.inf), found_s)
            for key in sorted(least_s, key=lambda key: least_s[key]):
                if bench.spent or not bench.unequal:
                    break
                if key[0] > 1 and len(groups[key]) > 1:
                    _solve(bench, groups[key])
        bench.fall_back(bench.shapes())
        return bench.best_plan()
    return bench.best_plan()


def _solve(bench: Bench, shapes: Sequence[Shape]) -> float:
    """Solve one program and offer its plan; the program's own objective, infinite where there is no solution (or none was
    found in time)."""
    problem, first = bench.problem, shapes[0]
    ways = [_Way(shape, choice) for shape in shapes for choice in problem.recompute_choices]
    edges = cluster_blocks(bench, first)
    costs = chain_costs(bench, ways, edges, first.pipeline)
    limit_s = min(PROGRAM_LIMIT_S, problem.budget.left_s / 2)
    found = solve_program(
        costs, first.pipeline, first.microbatches, problem.memory_limit_bytes, limit_s, lambda: bench.over
    )
    if found is None:
        bench.secure(first)
        return math.inf
    _offer(bench, ways, edges, found)
    return found.total_s


def chain_costs(bench: Bench, ways: Sequence[_Way], edges: Sequence[int], num_stages: int) -> ChainCosts:
    """The program's figures from the cost model. Memory of a layer: at rest, and its activations as often as 1F1B holds
    them; the largest transient of any layer counts on each stage's first."""
    num, mixed = len(edges) - 1, bench.unequal
    work_s, sends_s = np.zeros((num, len(ways))), np.zeros((num, len(ways)))
    memory_bytes = np.zeros((num, len(ways), num_stages))
    for k, way in enumerate(ways):
        held = schedule_named(way.shape.schedule).in_flight
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            cost = bench.cost(way.shape, start, stop, way.recompute)
            # what happens once per step, shared out over the microbatches
            once_s = max(0.0, cost.reduce_s - cost.reduce_overlap_s) + cost.reduce_model_s + cost.optimizer_s
            work_s[i, k] = cost.forward_s + cost.backward_s + once_s / way.shape.microbatches
            sends_s[i, k] = cost.send_s
            rest = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes + cost.unsharded_bytes
            for s in range(num_stages):
                flight = held(s, num_stages, way.shape.microbatches)
                memory_bytes[i, k, s] = rest + flight * cost.activation_bytes
    same = np.array([[a.mesh == b.mesh and (mixed or a == b) for b in ways] for a in ways])
    meets = np.array([[mixed or a.mesh == b.mesh for b in ways] for a in ways])
    inside = np.where(same, 0.0, math.inf)
    across = [
        np.where(meets, np.maximum(2 * sends_s[i][:, None], 2 * sends_s[i][None, :]), math.inf) for i in range(num - 1)
    ]
    return ChainCosts(work_s, [inside] * (num - 1), across, memory_bytes)


def _offer(bench: Bench, ways: Sequence[_Way], edges: Sequence[int], found: Joint) -> None:
    parts, first = [], 0
    for s in range(max(found.stage) + 1):
        layers = [i for i, stage in enumerate(found.stage) if stage == s]
        way = ways[found.strategy[layers[0]]]
        recompute = tuple(ways[found.strategy[i]].recompute for i in layers for _ in range(edges[i], edges[i + 1]))
        width = way.shape.data * way.shape.tensor
        ranks = tuple(range(first, first + width))
        first += width
        parts.append(
            Part(
                edges[layers[0]],
                edges[layers[-1] + 1],
                ranks,
                way.shape.data,
                way.shape.tensor,
                recompute,
                way.shape.zero,
            )
        )
    plan = bench.plan(parts, way.shape.microbatches, way.shape.schedule)
    bench.offer(plan)
    bench.offer(bench.uniform(plan))
    bench.offer(bench.relieved(plan))
