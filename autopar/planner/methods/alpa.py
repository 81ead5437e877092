"""Alpa: an inter-operator dynamic program over an intra-operator integer program.

The outer pass is `alpa_stages`. The inner one is the layout solver (`planner/layouts.py`: one-hot strategies, edges as
transport variables), which lays every block out on each logical mesh (data, tensor) of a submesh; c(i, k, m) is the
cost model's time of blocks i..k with the best of these. Blocks are joined to at most `MAX_LAYERS` layers of about
equal work, as Alpa's operator clustering does.

Where stages must have equal meshes, each (data, tensor, zero) of the space is the one submesh of a run of its own.

Reference: Zheng et al., OSDI 2022, sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from ...cost.types import StageCost
from ...plan import Plan, Recompute, same_recompute
from ..problem import Problem, Shape
from .alpa_stages import Assignment, assign_stages, submeshes
from .bench import Bench, Part, Spent

MAX_LAYERS = 24
# Alpa skips caps closer than 1e-6 s; a share of the cap does not depend on the model's size.
GAP = 0.01


def alpa(problem: Problem) -> Plan:
    """The best of Alpa's plans over the numbers of microbatches."""
    with Bench(problem, "alpa") as bench:
        shapes = bench.shapes()
        with suppress(Spent):
            for shape in shapes:
                if bench.spent:
                    break
                for recompute in problem.recompute_choices:
                    edges = cluster_blocks(bench, shape)
                    found = _equal(bench, shape, edges, recompute)
                    if found is not None:
                        cuts = [edges[stage.stop] for stage in found.stages]
                        bench.offer(bench.equal_plan(shape, cuts, [recompute] * shape.pipeline))
                        break
            if bench.unequal:
                for microbatches in sorted({shape.microbatches for shape in shapes}):
                    if bench.spent:
                        break
                    _unequal(bench, [s for s in shapes if s.microbatches == microbatches])
        bench.fall_back(shapes)
        return bench.best_plan()
    return bench.best_plan()


def cluster_blocks(bench: Bench, shape: Shape) -> list[int]:
    """Where layers begin: at most `MAX_LAYERS` runs of blocks (at least one per stage), of about equal work."""
    num, wanted = bench.num_blocks, max(MAX_LAYERS, shape.pipeline)
    if num <= wanted:
        return list(range(num + 1))
    work = np.cumsum([c.forward_s + c.backward_s for c in bench.block_costs(replace(shape, pipeline=1))])
    edges = [0]
    for layer in range(1, wanted):
        edge = int(np.searchsorted(work, work[-1] * layer / wanted)) + 1
        edges.append(min(max(edge, edges[-1] + 1), num - (wanted - layer)))
    return [*edges, num]


def _stage(bench: Bench, shape: Shape, edges: Sequence[int], i: int, k: int, recompute: Recompute) -> StageCost:
    return bench.cost(shape, edges[i], edges[k], recompute)


def tables(bench: Bench, shape: Shape, edges: Sequence[int], recompute: Recompute) -> tuple[np.ndarray, np.ndarray]:
    """(c, max_succ) of one mesh: [first layer, last layer + 1]."""
    num = len(edges) - 1
    costs_s, succ = np.full((num, num + 1), math.inf), np.full((num, num + 1), -1)
    for i in range(num):
        # the first stage starts at the first layer, and each has at least one; with one stage only the whole counts
        for k in range(i + 1, num + 1):
            if (i or k < num) and shape.pipeline == 1:
                continue
            cost = _stage(bench, shape, edges, i, k, recompute)
            costs_s[i, k] = cost.forward_s + cost.backward_s
            rest = cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes + cost.unsharded_bytes
            left = bench.problem.memory_limit_bytes - rest - max(cost.forward_peak_bytes, cost.backward_peak_bytes)
            succ[i, k] = min(shape.microbatches, left // max(1, cost.activation_bytes)) - 1 if left >= 0 else -1
            if succ[i, k] >= shape.microbatches - 1:
                succ[i, k] = 10**6
    return costs_s, succ


def _equal(bench: Bench, shape: Shape, edges: Sequence[int], recompute: Recompute) -> Assignment | None:
    costs_s, succ = tables(bench, shape, edges, recompute)
    count = shape.pipeline
    return assign_stages(costs_s[:, :, None], succ[:, :, None], [1], count, shape.microbatches, count, GAP)


def _unequal(bench: Bench, shapes: Sequence[Shape]) -> None:
    """All submeshes of the cluster, each with the better of its logical meshes for each run of layers."""
    cluster, first = bench.problem.cluster, shapes[0]
    rows = bench.problem.graph.batch_size // first.microbatches
    edges = cluster_blocks(bench, first)
    sizes = submeshes(cluster.num_hosts, cluster.devices_per_host)
    num = len(edges) - 1
    costs_s = np.full((num, num + 1, len(sizes)), math.inf)
    succ = np.full(costs_s.shape, -1)
    meshes = np.zeros(costs_s.shape, np.int32)
    logical = []
    for mesh, size in enumerate(sizes):
        for tensor in sorted({s.tensor for s in shapes}):
            data = size // tensor
            if size % tensor or rows % data or (tensor > 1 and not bench.problem.splits(tensor, data)):
                continue
            shape = replace(first, pipeline=2 if size < cluster.world_size else 1, data=data, tensor=tensor, zero=0)
            for recompute in bench.problem.recompute_choices:
                found_s, found_succ = tables(bench, shape, edges, recompute)
                logical.append((shape, recompute))
                better = (found_s < costs_s[:, :, mesh]) & (found_succ >= 0)
                costs_s[:, :, mesh] = np.where(better, found_s, costs_s[:, :, mesh])
                succ[:, :, mesh] = np.where(better, found_succ, succ[:, :, mesh])
                meshes[:, :, mesh] = np.where(better, len(logical) - 1, meshes[:, :, mesh])
    found = assign_stages(costs_s, succ, sizes, cluster.world_size, first.microbatches, gap=GAP)
    if found is None:
        return
    # larger submeshes first on the ranks, so that whole hosts stay whole
    order = sorted(range(len(found.stages)), key=lambda s: -sizes[found.stages[s].mesh])
    begin, taken = {}, 0
    for s in order:
        begin[s] = taken
        taken += sizes[found.stages[s].mesh]
    parts = []
    for s, stage in enumerate(found.stages):
        shape, recompute = logical[meshes[stage.start, stage.stop, stage.mesh]]
        start, stop = edges[stage.start], edges[stage.stop]
        ranks = tuple(range(begin[s], begin[s] + sizes[stage.mesh]))
        parts.append(Part(start, stop, ranks, shape.data, shape.tensor, same_recompute(recompute, stop - start)))
    bench.offer(bench.plan(parts, first.microbatches, first.schedule))
