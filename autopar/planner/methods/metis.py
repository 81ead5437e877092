"""Metis: stages of unequal device groups, by the pruned space of `metis_space`.

Every number of stages and microbatches, every row of groups, every mesh on the way from data to tensor parallelism:
layers are split in proportion to what the groups compute, the plan is priced by the common model, which also says where
memory is short. Devices of a cluster are of one kind; orders of device types then are one.

Reference: Um et al., USENIX ATC 2024, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from ...plan import Plan, same_recompute
from ...simulate import stage_peak_bytes
from ..problem import Problem, Shape
from .bench import Bench, Part, split_rows
from .metis_space import device_groups, meshes, split_layers

# Rows of groups per number of stages: the most even ones.
MAX_ROWS = 12
# With more stages than this, a stage holds too little to keep a device busy.
MAX_STAGES = 32


def metis(problem: Problem) -> Plan:
    """The best of Metis's plans."""
    with Bench(problem, "metis") as bench:
        shapes = bench.shapes(lambda s: s.zero == 0, lambda s: s.pipeline <= MAX_STAGES)
        for shape in _first_of_each(shapes):
            for groups in _groups(bench, shape):
                if bench.spent:
                    break
                _walk(bench, shape, groups)
        bench.fall_back(shapes)
        return bench.best_plan()
    return bench.best_plan()


def _first_of_each(shapes: Sequence[Shape]) -> list[Shape]:
    """One shape per numbers of stages and microbatches; its own degrees do not matter."""
    found: dict[tuple[int, int], Shape] = {}
    for shape in shapes:
        found.setdefault((shape.pipeline, shape.microbatches), shape)
    return list(found.values())


def _groups(bench: Bench, shape: Shape) -> list[tuple[int, ...]]:
    if bench.unequal:
        return device_groups(bench.world_size, shape.pipeline)[:MAX_ROWS]
    return [(bench.world_size // shape.pipeline,) * shape.pipeline]


def _walk(bench: Bench, shape: Shape, groups: tuple[int, ...]) -> None:
    """All meshes of one row of groups that the space allows."""
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
        plan = _plan(bench, shape, chosen)
        if plan is None:
            continue
        costs = [bench.problem.costs.stage(plan, s) for s in range(len(chosen))]
        last[:] = [
            bench.problem.memory_limit_bytes - stage_peak_bytes(cost, plan.schedule, s, len(chosen), plan.microbatches)
            for s, cost in enumerate(costs)
        ]
        bench.offer(plan)
        if min(last) < 0:
            bench.offer(bench.relieved(plan))


def _possible(bench: Bench, chosen: Sequence[tuple[int, int]], microbatches: int) -> bool:
    rows = bench.problem.graph.batch_size // microbatches
    return all(rows >= data and (tensor == 1 or bench.problem.splits(tensor, data)) for data, tensor in chosen)


def _plan(bench: Bench, shape: Shape, chosen: Sequence[tuple[int, int]]) -> Plan | None:
    """Layers in proportion to speed; a group's speed is what it makes of the whole model."""
    rows = bench.problem.graph.batch_size // shape.microbatches
    speeds, work, costs = [], None, []
    for data, tensor in chosen:
        even = replace(shape, data=math.gcd(data, rows), tensor=tensor)
        found = bench.block_costs(even)
        costs.append(found)
        took = [c.forward_s + c.backward_s for c in found]
        work = work or took
        speeds.append(data / even.data / max(sum(took), 1e-30))

    def fits(s: int, start: int, stop: int) -> bool:
        some = costs[s][start:stop]
        rest = sum(c.parameter_bytes + c.gradient_bytes + c.optimizer_bytes for c in some)
        held = min(len(chosen) - s, shape.microbatches) * sum(c.activation_bytes for c in some)
        peak = max(max(c.forward_peak_bytes, c.backward_peak_bytes) for c in some)
        return rest + held + peak <= bench.problem.memory_limit_bytes

    assert work is not None
    stops = split_layers(work, speeds, fits) or split_layers(work, speeds)
    if stops is None:
        return None
    parts, first = [], 0
    recompute = bench.problem.recompute_choices[0]
    for (data, tensor), (start, stop) in zip(chosen, itertools.pairwise((0, *stops)), strict=True):
        ranks = tuple(range(first, first + data * tensor))
        first += data * tensor
        shares = () if rows % data == 0 else split_rows(rows, [1.0] * data)
        kept = same_recompute(recompute, stop - start)
        parts.append(Part(start, stop, ranks, data, tensor, kept, shape.zero, shares))
    return bench.plan(parts, shape.microbatches, shape.schedule)
