"""DAPPLE: stage cuts x replication x placement for synchronous pipelines, without tensor parallelism.

The search is `dapple_placement`; here its layers are the graph's blocks, with the times that the cost model gives them
at each number of replicas. Where stages must have equal meshes, each (stages, replicas) of the space is a run of its own.

Reference: Fan et al., PPoPP 2021, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...plan import Plan
from ..problem import Problem, Shape
from .bench import Bench, Part, split_rows
from .dapple_placement import Layers, Machines, Placed, place

# Devices up to which every number of replicas is tried; above, the divisors of the cluster.
MAX_FREE_REPLICAS = 16


def dapple(problem: Problem) -> Plan:
    """The best of DAPPLE's plans over the numbers of microbatches."""
    with Bench(problem, "dapple") as bench:
        shapes = bench.shapes(lambda s: s.tensor == 1, lambda s: s.zero == 0)
        for shape in shapes:
            if bench.spent:
                break
            # tensor ranks, if the constraints want any, count as one device
            machines = _machines(bench, shape.tensor)
            layers = Layers({shape.data: _block_s(bench, shape)}, *_sizes(bench, shape))
            found = machines and place(
                layers, machines, shape.microbatches, [shape.data], shape.pipeline, is_over=lambda: bench.over
            )
            if found:
                _offer(bench, found[0], shape)
            bench.secure(shape)
        if bench.unequal:
            for shape in {s.microbatches: s for s in shapes}.values():
                if bench.spent:
                    break
                _unequal(bench, replace(shape, data=1))
        return bench.best_plan()
    return bench.best_plan()


def _block_s(bench: Bench, shape: Shape) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum([c.forward_s + c.backward_s for c in bench.block_costs(shape)])])


def _sizes(bench: Bench, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    costs = bench.block_costs(shape)
    weights = np.concatenate([[0.0], np.cumsum([c.gradient_bytes for c in costs])])
    return weights, np.array([0.0, *(c.boundary_bytes * shape.data for c in costs)])


def _machines(bench: Bench, tensor: int) -> Machines | None:
    cluster = bench.problem.cluster
    if cluster.devices_per_host % tensor:
        return None if cluster.world_size % tensor else Machines(cluster.world_size // tensor, 1, *_rates(bench))
    return Machines(cluster.num_hosts, cluster.devices_per_host // tensor, *_rates(bench))


def _rates(bench: Bench) -> tuple[float, float]:
    cluster = bench.problem.cluster
    return cluster.intra.bandwidth_bytes_per_s, cluster.inter.bandwidth_bytes_per_s


def _unequal(bench: Bench, shape: Shape) -> None:
    machines = _machines(bench, shape.tensor)
    if machines is None:
        return
    total = machines.count * machines.devices
    rows = bench.problem.graph.batch_size // shape.microbatches
    replicas = [m for m in range(1, total + 1) if m <= rows and (total <= MAX_FREE_REPLICAS or total % m == 0)]
    block_s = {m: _block_s(bench, replace(shape, data=m)) for m in replicas if rows % m == 0}
    layers = Layers(block_s, *_sizes(bench, shape))
    found = place(layers, machines, shape.microbatches, is_over=lambda: bench.over)
    if found:
        _offer(bench, found[0], shape)


def _offer(bench: Bench, stages: Sequence[Placed], shape: Shape) -> None:
    """Hand out the devices of each machine in order."""
    machines = _machines(bench, shape.tensor)
    assert machines is not None
    rows = bench.problem.graph.batch_size // shape.microbatches
    used, parts = [0] * machines.count, []
    for stage in stages:
        ranks: list[int] = []
        for k, count in enumerate(stage.on):
            for _ in range(count):
                first = (k * machines.devices + used[k]) * shape.tensor
                ranks += range(first, first + shape.tensor)
                used[k] += 1
        shares = () if rows % stage.replicas == 0 else split_rows(rows, [1.0] * stage.replicas)
        parts.append(Part(stage.start, stage.stop, tuple(ranks), stage.replicas, shape.tensor, (), shape.zero, shares))
    plan = bench.plan(parts, shape.microbatches, shape.schedule)
    bench.offer(plan)
    bench.offer(bench.relieved(plan))
