"""Metis: stages of unequal device groups, by the pruned space of `metis_space`.

Every order of the kinds of devices, every number of stages and microbatches, every row of groups, every mesh on the way
from data to tensor parallelism: layers are split in proportion to what the groups compute, the rows of a microbatch among
unlike data ranks too, and the plan is priced by the common model, which also says where memory is short.

Reference: Um et al., USENIX ATC 2024, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from ...plan import Plan, same_recompute
from ...simulate import stage_peak_bytes
from ..problem import Problem, Shape
from ..replicas import replica_speeds
from .bench import Bench, Part, Spent, split_rows
from .metis_space import DeviceType, device_groups, meshes, split_layers, type_orders

# Rows of groups per number of stages: the most even ones.
MAX_ROWS = 12
# Beyond so many orders of kinds times rows of groups, fewer rows are tried with each order.
MAX_ORDERED_ROWS = 48
# With more stages than this, a stage holds too little to keep a device busy.
MAX_STAGES = 32


def metis(problem: Problem) -> Plan:
    """The best of Metis's plans."""
    with Bench(problem, "metis") as bench:
        shapes = bench.shapes(lambda s: s.zero == 0, lambda s: s.pipeline <= MAX_STAGES)
        with suppress(Spent):
            orders = _orders(bench)
            for shape in _first_of_each(shapes):
                rows = _groups(bench, shape)
                if len(orders) > 1:
                    rows = rows[: max(1, MAX_ORDERED_ROWS // len(orders))]
                for groups, order in itertools.product(rows, orders):
                    if bench.spent:
                        break
                    _walk(bench, shape, groups, order)
        bench.fall_back(shapes)
        return bench.best_plan()
    return bench.best_plan()


def _first_of_each(shapes: Sequence[Shape]) -> list[Shape]:
    """One shape per numbers of stages and microbatches; its own degrees do not matter."""
    found: dict[tuple[int, int], Shape] = {}
    for shape in shapes:
        found.setdefault((shape.pipeline, shape.microbatches), shape)
    return list(found.values())


def _orders(bench: Bench) -> list[tuple[int, ...]]:
    """All ranks, in every order of the kinds of hosts; in their own where the constraints want equal stages."""
    cluster = bench.problem.cluster
    if not cluster.hosts or not bench.unequal:
        return [tuple(range(cluster.world_size))]
    kinds: dict[int, list[int]] = {}
    for rank in range(cluster.world_size):
        kinds.setdefault(cluster.kind_number(rank), []).append(rank)
    types = [
        DeviceType(str(kind), len(ranks), max(device.flops_per_s.values()), device.memory_bytes)
        for kind, ranks in kinds.items()
        for device in [cluster.device_of(ranks[0])]
    ]
    return [tuple(rank for one in order for rank in kinds[int(one.name)]) for order in type_orders(types)]


def _groups(bench: Bench, shape: Shape) -> list[tuple[int, ...]]:
    if bench.unequal:
        return device_groups(bench.world_size, shape.pipeline)[:MAX_ROWS]
    return [(bench.world_size // shape.pipeline,) * shape.pipeline]


def _walk(bench: Bench, shape: Shape, groups: tuple[int, ...], order: tuple[int, ...]) -> None:
    """All meshes of one row of groups, which take the ranks in this order, that the space allows."""
    last: list[float] = [0.0] * len(groups)
    legal = {(s.pipeline, s.data, s.tensor, s.microbatches) for s in bench.problem.shapes}
    for chosen in meshes(groups, lambda _: last):
        if bench.spent:
            return
        if not bench.unequal and len(set(chosen)) > 1:
            continue
        if len(set(chosen)) == 1 and len(set(groups)) == 1:
            if (len(groups), *chosen[0], shape.microbatches) not in legal:
                continue
        elif not _possible(bench, chosen, shape.microbatches):
            continue
        plan = _plan(bench, shape, chosen, order)
        if plan is None:
            continue
        costs = [bench.problem.costs.stage(plan, s) for s in range(len(chosen))]
        last[:] = [
            _limit_bytes(bench, plan.stages[s].ranks)
            - stage_peak_bytes(cost, plan.schedule, s, len(chosen), plan.microbatches)
            for s, cost in enumerate(costs)
        ]
        bench.offer(plan)
        if min(last) < 0:
            bench.offer(bench.relieved(plan))


def _limit_bytes(bench: Bench, ranks: Sequence[int]) -> int:
    return min(bench.problem.memory_limit_of(rank) for rank in ranks)


def _possible(bench: Bench, chosen: Sequence[tuple[int, int]], microbatches: int) -> bool:
    rows = bench.problem.graph.batch_size // microbatches
    return all(rows >= data and (tensor == 1 or bench.problem.splits(tensor, data)) for data, tensor in chosen)


def _plan(bench: Bench, shape: Shape, chosen: Sequence[tuple[int, int]], order: tuple[int, ...]) -> Plan | None:
    """Layers in proportion to speed; a group's speed is what it makes of the whole model."""
    rows = bench.problem.graph.batch_size // shape.microbatches
    differ = bool(bench.problem.cluster.hosts)
    speeds, replicas, groups, work, costs = [], [], [], None, []
    first = 0
    for data, tensor in chosen:
        even = replace(shape, data=math.gcd(data, rows), tensor=tensor)
        found = bench.block_costs(even)
        costs.append(found)
        took = [c.forward_s + c.backward_s for c in found]
        work = work or took
        # Along the axes of a mesh ranks ascend.
        groups.append(tuple(sorted(order[first : first + data * tensor])))
        first += data * tensor
        each = [1.0 / even.data / max(sum(took), 1e-30)] * data
        if differ:
            each = replica_speeds(bench.problem, groups[-1], bench.fastest(even), tensor, even.shards)
        replicas.append(each)
        speeds.append(sum(each))

    def fits(s: int, start: int, stop: int) -> bool:
        some = costs[s][start:stop]
        rest = sum(c.parameter_bytes + c.gradient_bytes + c.optimizer_bytes for c in some)
        held = min(len(chosen) - s, shape.microbatches) * sum(c.activation_bytes for c in some)
        peak = max(max(c.forward_peak_bytes, c.backward_peak_bytes) for c in some)
        return rest + held + peak <= _limit_bytes(bench, groups[s])

    assert work is not None
    stops = split_layers(work, speeds, fits) or split_layers(work, speeds)
    if stops is None:
        return None
    parts = []
    recompute = bench.problem.recompute_choices[0]
    edges = itertools.pairwise((0, *stops))
    for (data, tensor), ranks, each, (start, stop) in zip(chosen, groups, replicas, edges, strict=True):
        shares = () if rows % data == 0 and len(set(each)) == 1 else split_rows(rows, each)
        kept = same_recompute(recompute, stop - start)
        parts.append(Part(start, stop, ranks, data, tensor, kept, shape.zero, shares if len(set(shares)) > 1 else ()))
    return bench.plan(parts, shape.microbatches, shape.schedule)
