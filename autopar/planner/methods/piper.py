"""Piper: data, tensor and pipeline parallelism with recomputation per layer, by the recursion of `piper_dag`.

Its layers are the graph's blocks. A sample is what one rank of a data replica gets of one microbatch; a stage with s
samples in flight holds s times a block's activations beside its parameters, gradients and optimizer state, and the
largest transient of any block is left free. Recomputation of a block is its second choice.

Where stages must have equal meshes, each (data, tensor) of the space is a run of its own that uses all devices. Else
the degrees are free; samples are then shared out so that each stage takes the same microbatches.

Reference: Tarnawski et al., NeurIPS 2021, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ...cost.types import StageCost
from ...plan import Plan
from ..inputs.layer_dag import Choice, Edge, Layer, LayerAt, LayerDag, LayerMachine
from ..problem import Problem, Shape
from .bench import Bench, Part, Spent, split_rows
from .piper_dag import DagPlan, piper_dag


def piper(problem: Problem) -> Plan:
    """The best of Piper's plans over the sizes of microbatches."""
    with Bench(problem, "piper") as bench:
        shapes = bench.shapes(lambda s: s.zero == 0)
        with suppress(Spent):
            for shape in shapes:
                if bench.spent:
                    break
                dag, transient_bytes = layers_of(bench, [shape])
                machine = _machine(bench, shape.pipeline * shape.data * shape.tensor, shape, transient_bytes)
                found = piper_dag(dag, machine, data=[shape.data], all_devices=True, is_over=lambda: bench.over)
                if found is not None:
                    _offer(bench, found, shape)
                bench.secure(shape)
            if bench.unequal:
                _unequal(bench, shapes)
        bench.fall_back(shapes)
        return bench.best_plan()
    return bench.best_plan()


def layers_of(bench: Bench, shapes: Sequence[Shape]) -> tuple[LayerDag, float]:
    """The blocks as a chain of layers, at the tensor degree of each shape; and the most transient bytes of any."""
    choices = bench.problem.recompute_choices
    at: list[dict[int, LayerAt]] = [{} for _ in range(bench.num_blocks)]
    sizes = [0.0] * bench.num_blocks
    transient_bytes = 0.0
    for shape in shapes:
        costs = [bench.block_costs(shape, recompute) for recompute in choices]
        for b in range(bench.num_blocks):
            ways = tuple(
                Choice(name, c[b].forward_s + c[b].backward_s, c[b].activation_bytes, _rest_bytes(c[b]))
                for name, c in zip(choices, costs, strict=True)
            )
            joined = {e: 0.0 for e in (b - 1, b) if 0 <= e < bench.num_blocks - 1}
            at[b][shape.tensor] = LayerAt(ways, costs[0][b].gradient_bytes, joined)
            sizes[b] = max(sizes[b], costs[0][b].boundary_bytes)
            transient_bytes = max(
                transient_bytes, *(max(c[b].forward_peak_bytes, c[b].backward_peak_bytes) for c in costs)
            )
    layers = tuple(Layer(str(b), found) for b, found in enumerate(at))
    edges = tuple(Edge(b, b + 1, sizes[b]) for b in range(bench.num_blocks - 1))
    return LayerDag(layers, edges), transient_bytes


def _rest_bytes(cost: StageCost) -> float:
    return cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes + cost.unsharded_bytes


def _machine(bench: Bench, num_devices: int, shape: Shape, transient_bytes: float) -> LayerMachine:
    link = bench.problem.cluster.link(tuple(range(num_devices)))
    free_bytes = max(1.0, bench.problem.memory_limit_bytes - transient_bytes)
    return LayerMachine(num_devices, free_bytes, link.bandwidth_bytes_per_s, shape.shards)


def _offer(bench: Bench, found: DagPlan, shape: Shape) -> None:
    """The plan as found; and, because not every runtime mixes within a stage, with all of a stage recomputed or none."""
    parts, first = [], 0
    microbatches = shape.shards // max(stage.data for stage in found.stages)
    if bench.problem.constraints.microbatches not in (None, microbatches):
        return
    rows = bench.problem.graph.batch_size // microbatches
    for stage in found.stages:
        if rows < stage.data:
            return
        width = stage.data * stage.tensor
        shares = () if rows % stage.data == 0 else split_rows(rows, [1.0] * stage.data)
        start, stop = stage.layers[0], stage.layers[-1] + 1
        parts.append(
            Part(
                start,
                stop,
                tuple(range(first, first + width)),
                stage.data,
                stage.tensor,
                stage.choices,
                shape.zero,
                shares,
            )
        )
        first += width
    plan = bench.plan(parts, microbatches, shape.schedule)
    bench.offer(plan)
    bench.offer(bench.uniform(plan))


def _unequal(bench: Bench, shapes: Sequence[Shape]) -> None:
    """All degrees at once, for each size of a sample."""
    by_size: dict[int, dict[int, Shape]] = {}
    for shape in shapes:
        by_size.setdefault(shape.shards, {}).setdefault(shape.tensor, shape)
    for same in by_size.values():
        if bench.spent:
            return
        dag, transient_bytes = layers_of(bench, list(same.values()))
        first = next(iter(same.values()))
        machine = _machine(bench, bench.world_size, first, transient_bytes)
        found = piper_dag(dag, machine, all_devices=True, is_over=lambda: bench.over)
        if found is not None and first.shards % max(stage.data for stage in found.stages) == 0:
            _offer(bench, found, first)
