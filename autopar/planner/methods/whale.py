"""Whale: parallelism from two annotations, `replicate` and `split`, on parts of the model.

Ops of modules annotated `split` share out what is not the batch (the shards of a large classifier, or experts); those
annotated `replicate` (everything else, by default) share out the batch. Both lie on one axis of devices, so that a part
that is split follows one that is replicated on the same devices; the conversions between them are Whale's bridges, and
the layout solver finds the cheapest. On unequal devices the rows of the batch fall in proportion to what devices compute
and as their memory allows (`balanced`, by `whale_balance`); several stages stand in the order of their devices' memory,
with layers in proportion. The shards of what is split stay equal.

Without annotations, the ops of the largest parameter are split where that parameter holds at least `LARGE` of the
model (Whale's own example: a classifier over 100,000 classes), else everything is replicated.

Reference: Jia et al., USENIX ATC 2022, section 3.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ...graph import Graph, Op
from ...plan import Plan
from ...schedule.orders import schedule_named
from ...sharding.strategies import strategies
from ...sharding.strategy import Strategy
from ...simulate import at_rest_bytes
from ..axis_prices import AxisPrices
from ..layout_chain import chain_layouts
from ..layout_options import layout_options
from ..pricing import Piece, assemble
from ..problem import Chain, Problem, Shape
from .bench import Bench
from .metis_space import split_layers
from .whale_balance import batch_shares, stage_order

Annotation = Literal["replicate", "split"]

LARGE = 0.25


def whale(
    problem: Problem,
    annotations: Mapping[str, Annotation] | None = None,
) -> Plan:
    """The best plan that does as the annotations say. annotations: by pattern of a module's name ("head*").

    ValueError for an annotation that is neither, or a pattern that no module of the graph has.
    """
    given = _checked(problem.graph, annotations) if annotations is not None else suggested(problem.graph)
    with Bench(problem, "whale") as bench:
        shapes = bench.shapes(lambda s: s.pipeline == 1, lambda s: s.zero == 0)
        num_tried = 0
        for shape in shapes:
            if bench.spent:
                break
            # the whole axis for splits, or hosts replicated around it
            if "split" in given.values() or shape.tensor == 1 or problem.constraints.tensor:
                plan = _plan(bench, shape, given)
                if not problem.cluster.hosts or bench.offer(balanced(problem, plan)) == math.inf:
                    bench.offer(plan)
                num_tried += 1
                if num_tried == 1:
                    bench.fall_back(bench.shapes())
        return bench.best_plan()
    return bench.best_plan()


def suggested(graph: Graph) -> dict[str, Annotation]:
    """Annotations for a model that has none."""
    parameters = [p for p in graph.parameters if p.requires_grad]
    largest = max(parameters, key=lambda p: p.numel, default=None)
    if largest is None or largest.numel < LARGE * sum(p.numel for p in parameters):
        return {"*": "replicate"}
    return {op.module: "split" for op in graph.consumers[largest.name] if op.module} | {"*": "replicate"}


def _checked(graph: Graph, annotations: Mapping[str, str]) -> dict[str, Annotation]:
    modules = {op.module for op in graph.ops}
    for pattern, kind in annotations.items():
        if kind not in ("replicate", "split"):
            raise ValueError(f"annotations[{pattern!r}] is {kind!r}; expected 'replicate' or 'split'")
        if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
            raise ValueError(
                f"annotations[{pattern!r}]: no module of {graph.name} has such a name; expected one like "
                f"{', '.join(sorted(modules)[1:4])}"
            )
    return {**annotations, "*": annotations.get("*", "replicate")}  # type: ignore[dict-item]


def annotation(op: Op, annotations: Mapping[str, Annotation]) -> Annotation:
    """That of the first pattern that the op's module has."""
    return next(kind for pattern, kind in annotations.items() if fnmatch.fnmatchcase(op.module, pattern))


def _plan(bench: Bench, shape: Shape, annotations: Mapping[str, Annotation]) -> Plan:
    problem = bench.problem
    chain = Chain()
    if shape.tensor > 1:
        prices = AnnotatedPrices(problem.as_equal, shape, False)
        prices.annotations.update(annotations)
        options = layout_options(problem.graph, shape.tensor, prices)
        chain = Chain.of(chain_layouts(options, 0, bench.num_blocks).layouts)
    cuts = [bench.num_blocks * s // shape.pipeline for s in range(shape.pipeline + 1)]
    recompute = problem.recompute_choices[0]
    if shape.pipeline > 1 and problem.cluster.hosts:
        return _staged(bench, shape, chain)
    pieces = [Piece(start, stop, recompute) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return assemble(problem, shape, chain, pieces)


def _staged(bench: Bench, shape: Shape, chain: Chain) -> Plan:
    """Stages of equal meshes: devices with more memory first, layers in proportion to what a stage's slowest computes."""
    problem, width = bench.problem, shape.data * shape.tensor
    ranks = list(range(problem.cluster.world_size))
    order = [ranks[i] for i in stage_order([problem.cluster.memory_bytes_of(rank) for rank in ranks])]
    groups = [tuple(sorted(order[width * s : width * (s + 1)])) for s in range(shape.pipeline)]
    speeds = [min(flops_per_s(problem, rank) for rank in group) for group in groups]
    work = [cost.forward_s + cost.backward_s for cost in bench.block_costs(shape)]
    stops = split_layers(work, speeds)
    assert stops is not None, (len(work), shape.pipeline)
    pieces = [Piece(*edge, problem.recompute_choices[0]) for edge in itertools.pairwise((0, *stops))]
    plan = assemble(problem, shape, chain, pieces)
    stages = zip(plan.stages, groups, strict=True)
    return replace(plan, stages=tuple(replace(stage, ranks=group) for stage, group in stages))


def flops_per_s(problem: Problem, rank: int) -> float:
    """What a device computes, in the precision of the graph."""
    peaks = problem.cluster.device_of(rank).flops_per_s
    return peaks.get(problem.graph.precision, peaks["float32"])


def balanced(problem: Problem, plan: Plan) -> Plan:
    """The plan with the rows of each stage's microbatches in proportion to what its replicas compute, as far as their
    memory holds them; a stage whose rows do not fit so keeps equal shares."""
    rows = plan.batch_size // plan.microbatches
    stages = []
    for index, stage in enumerate(plan.stages):
        replicas = [stage.ranks[d * stage.tensor : (d + 1) * stage.tensor] for d in range(stage.data)]
        rates = [min(flops_per_s(problem, rank) for rank in replica) for replica in replicas]
        if stage.data > 1 and len(set(rates)) > 1:
            held = schedule_named(plan.schedule).in_flight(index, len(plan.stages), plan.microbatches)
            most = [_most_rows(problem, plan, index, replica, held) for replica in replicas]
            if sum(most) >= rows and min(most) >= 1:
                shares = batch_shares(rows, rates, most)
                stage = replace(stage, shares=shares if len(set(shares)) > 1 else ())
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def _most_rows(problem: Problem, plan: Plan, index: int, replica: tuple[int, ...], held: int) -> int:
    """Rows of a microbatch that the memory of a replica's devices holds, `held` microbatches at a time."""
    cost = problem.costs.of_rank(plan, index, replica[0])
    fixed = at_rest_bytes(cost) + cost.unsharded_bytes
    kept = held * cost.activation_bytes + max(cost.forward_peak_bytes, cost.backward_peak_bytes)
    free = min(problem.memory_limit_of(rank) for rank in replica) - fixed
    rows = plan.batch_size // plan.microbatches // plan.stages[index].data
    return max(0, int(free * rows / max(1, kept)))


class AnnotatedPrices(AxisPrices):
    """The strategies that an op's annotation allows: along the batch for `replicate`, along anything else for `split`;
    all of them where there is none such."""

    @property
    def annotations(self) -> dict[str, Annotation]:
        return self.__dict__.setdefault("_annotations", {})

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        kind = annotation(op, self.annotations)
        key = (id(found), kind, self.problem.pins.words.get(op.name))
        kept = self.__dict__.setdefault("_allowed", {})
        if key not in kept:
            found = self.problem.allowed_strategies(op, found)
            wanted = tuple(s for s in found if s.work < 1 and self._cuts_batch(op, s) == (kind == "replicate"))
            kept[key] = wanted or found
        return kept[key]
