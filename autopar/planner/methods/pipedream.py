"""PipeDream: contiguous stages x replicas on levels of bandwidth, without tensor parallelism or recomputation.

The recursion is `pipedream_levels`; here its layers are the graph's blocks. Our batch stands for PipeDream's minibatch,
because the plan is run synchronously: T is the time of the whole batch on one device, and weights are synchronised
once. Memory: as many microbatches in flight as the recursion counts minibatches.

Where stages must have equal meshes, each number of replicas that divides the cluster is a run of its own.

Reference: Narayanan et al., SOSP 2019, section 3.1.
"""

from __future__ import annotations

from dataclasses import replace

from ...plan import Plan
from ..problem import Problem, Shape
from .bench import Bench, Part, split_rows
from .pipedream_heads import Heads, chain_heads
from .pipedream_levels import Level, PipeDreamPlan, pipedream_levels


def pipedream(problem: Problem) -> Plan:
    """The best of PipeDream's plans over the numbers of microbatches."""
    with Bench(problem, "pipedream") as bench:
        shapes = bench.shapes(lambda s: s.tensor == 1, lambda s: s.zero == 0)
        for shape in shapes:
            if bench.spent:
                break
            found = _equal(bench, shape)
            if found is not None:
                bench.offer(bench.equal_plan(shape, [stage.stop for stage in found.stages]))
        if bench.unequal:
            for microbatches in sorted({shape.microbatches for shape in shapes}, reverse=True):
                if bench.spent:
                    break
                _unequal(bench, next(s for s in shapes if s.microbatches == microbatches))
        return bench.best_plan()
    return bench.best_plan()


def _heads(bench: Bench, shape: Shape) -> Heads:
    """The model's blocks with times of the whole batch on one device (or one group of tensor ranks)."""
    costs = bench.block_costs(shape)
    count = shape.microbatches * shape.data
    return chain_heads(
        [count * (c.forward_s + c.backward_s) for c in costs],
        [c.gradient_bytes for c in costs],
        [c.activation_bytes for c in costs],
        [count * c.boundary_bytes for c in costs],
    )


def _equal(bench: Bench, shape: Shape) -> PipeDreamPlan | None:
    link = bench.problem.cluster.link(shape.ranks(0))
    level = Level(shape.pipeline * shape.data, link.bandwidth_bytes_per_s)
    heads = _heads(bench, shape)
    found = pipedream_levels(heads, [level], bench.problem.memory_limit_bytes, replicas=[shape.data])
    return found or pipedream_levels(heads, [level], replicas=[shape.data])


def _unequal(bench: Bench, shape: Shape) -> None:
    cluster = bench.problem.cluster
    levels = [Level(cluster.devices_per_host, cluster.intra.bandwidth_bytes_per_s)]
    if cluster.num_hosts > 1:
        levels.append(Level(cluster.num_hosts, cluster.inter.bandwidth_bytes_per_s))
    heads = _heads(bench, replace(shape, data=1))
    found = pipedream_levels(heads, levels, bench.problem.memory_limit_bytes)
    if found is None:
        return
    rows, first, parts = bench.problem.graph.batch_size // shape.microbatches, 0, []
    for stage in found.stages:
        if rows < stage.replicas:
            return
        ranks = tuple(range(first, first + stage.replicas))
        shares = () if rows % stage.replicas == 0 else split_rows(rows, [1.0] * stage.replicas)
        parts.append(Part(stage.start, stage.stop, ranks, stage.replicas, shares=shares))
        first += stage.replicas
    bench.offer(bench.plan(parts, shape.microbatches, shape.schedule))
