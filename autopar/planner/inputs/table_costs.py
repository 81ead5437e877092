"""What stages cost by measured tables of layers: `Costs` that searches ask in the place of cost/model.py.

- seconds and bytes of a block: of its `LayerAt` at the stage's tensor degree, by the rows of a microbatch on one rank:
  linear between the sizes that were profiled, proportional beyond; bytes at rest stay as they are there. Recomputation
  "none" is the first choice of a layer, "full" its second. Where a profile does not tell the forward's share of the time,
  it is FORWARD_SHARE of the first choice's
- a cut sends all edges that cross it, as one message on the link between the first ranks of both sides, by
  cost/collectives.py; each tensor rank sends the whole of it
- edges that the tensor ranks of a stage synchronise (`LayerAt.edge_bytes`) take their bytes over the bandwidth of the link
  among these, in the forward and in the backward
- gradients, as large as the parameters, are reduced over data: by measured times where there are some for so many devices
  of one host, else by cost/collectives.py; what hides of it is the link's `overlap`, as far as the last backward goes

Ignored, because the tables have none: the optimizer's time, and parameters that several layers share. State is not sharded
(ZeRO 0). Halves of backwards were not measured: a schedule that splits them is priced as if those by weights took no time and
all that layers keep lay there between the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...cluster.spec import Cluster
from ...cost.collectives import collective_s
from ...cost.types import StageCost
from ...plan import Plan, Stage
from .layer_dag import Layer, LayerAt, LayerDag

# A backward has two products for each of the forward's: by the input and by the weight.
FORWARD_SHARE = 1 / 3
# Which of a layer's choices each recomputation is.
CHOICES = {"none": 0, "full": 1}

Points = Sequence[tuple[float, float]]


def at_size(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    """The value at `size` of values at `sizes`, ascending: linear between them, proportional to size beyond."""
    nearest = min(max(size, sizes[0]), sizes[-1])
    return float(np.interp(nearest, sizes, values)) * size / nearest


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One microbatch of a block on one rank."""

    forward_s: float
    backward_s: float
    each_bytes: float
    forward_peak_bytes: float
    backward_peak_bytes: float
    parameter_bytes: float
    rest_bytes: float


@dataclass
class TableCosts:
    """Prices of stages from tables: `planner.problem.Costs`, per rank and microbatch.

    tables: by the rows that were profiled, ascending; layers in a topological order, the same at all sizes. collectives:
    measured (bytes, seconds) by name and number of devices of one host.
    """

    tables: Mapping[int, LayerDag]
    cluster: Cluster
    collectives: Mapping[tuple[str, int], Points] = field(default_factory=dict)
    _blocks: dict[tuple[int, int, int, int], BlockCost] = field(default_factory=dict, repr=False)

    def stage(self, plan: Plan, index: int) -> StageCost:
        """ValueError for a stage that the tables do not describe: its tensor degree, recomputation or ZeRO level."""
        stage = plan.stages[index]
        if stage.tensor not in self.degrees or stage.zero or not CHOICES.keys() >= set(stage.block_recompute):
            raise ValueError(
                f"tensor {stage.tensor}, zero {stage.zero}, recompute {sorted(set(stage.block_recompute))}: tables have "
                f"tensor degrees {in_words(self.degrees)}, zero 0, recompute none or full"
            )
        rows, span = stage_rows(plan, stage), range(stage.start, stage.stop)
        kept = [self.block(b, stage.tensor, "none", rows) for b in span]
        blocks = [
            self.block(b, stage.tensor, choice, rows) for b, choice in zip(span, stage.block_recompute, strict=True)
        ]
        synchronised_s = self._synchronised_s(stage, rows)
        backward_s = sum(b.backward_s for b in blocks) + synchronised_s
        parameter_bytes = sum(b.parameter_bytes for b in blocks)
        rest_bytes = sum(b.rest_bytes for b in blocks)
        held_bytes = min(parameter_bytes, rest_bytes)
        gradient_bytes = min(parameter_bytes, rest_bytes - held_bytes)
        message_bytes, send_s = self._send(plan, index)
        replicas = stage.ranks[:: stage.tensor]
        reduce_s = self._all_reduce_s(parameter_bytes, replicas)
        return StageCost(
            forward_s=sum(b.forward_s for b in blocks) + synchronised_s,
            backward_s=backward_s,
            prologue_s=0.0,
            send_s=send_s,
            boundary_bytes=int(message_bytes),
            reduce_s=reduce_s,
            reduce_overlap_s=self.cluster.link(replicas).overlap * min(reduce_s, backward_s),
            reduce_model_s=0.0,
            optimizer_s=0.0,
            parameter_bytes=int(held_bytes),
            gradient_bytes=int(gradient_bytes),
            optimizer_bytes=int(rest_bytes - held_bytes - gradient_bytes),
            unsharded_bytes=0,
            activation_bytes=int(sum(b.each_bytes for b in blocks)),
            forward_peak_bytes=int(max(b.forward_peak_bytes for b in blocks)),
            backward_peak_bytes=int(max(b.backward_peak_bytes for b in blocks)),
            deferred_bytes=int(sum(b.each_bytes for b in kept)),
            gradients_stay=True,  # rest_bytes count from the first forward on
        )

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Tensor degrees at which each layer was profiled, at some size."""
        found = [
            {degree for dag in self.tables.values() for degree in dag.layers[b].at} for b in range(self.num_blocks)
        ]
        return tuple(sorted(set.intersection(*found)))

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """As profiled at the smallest size."""
        return next(iter(self.tables.values())).layers

    def layer(self, block: int, tensor: int) -> list[tuple[int, LayerAt]]:
        """A layer at one of `degrees`, by size."""
        return [(size, at) for size, dag in self.tables.items() if (at := dag.layers[block].at.get(tensor))]

    def block(self, block: int, tensor: int, recompute: str, rows: int) -> BlockCost:
        """One block, without what happens at its borders."""
        choice = CHOICES[recompute]
        key = (block, tensor, choice, rows)
        if key not in self._blocks:
            sizes, ats = zip(*self.layer(block, tensor), strict=True)
            moving = zip(*(_moving(at, choice) for at in ats), strict=True)
            resting = zip(*((at.parameter_bytes, at.choices[choice].rest_bytes) for at in ats), strict=True)
            self._blocks[key] = BlockCost(
                *(at_size(sizes, values, rows) for values in moving),
                *(float(np.interp(rows, sizes, values)) for values in resting),
            )
        return self._blocks[key]

    def crossing_bytes(self, cut: int, rows: int) -> float:
        """What all edges hand over that lead from blocks before `cut` to it or to blocks behind, for so many rows."""
        return at_size(tuple(self.tables), self._crossing[cut], rows)

    @cached_property
    def _crossing(self) -> list[list[float]]:
        """By cut and size."""
        return [
            [sum(e.size_bytes for e in dag.edges if e.source < cut <= e.target) for dag in self.tables.values()]
            for cut in range(self.num_blocks)
        ]

    def _send(self, plan: Plan, index: int) -> tuple[float, float]:
        """Bytes and seconds of a microbatch on the way to the next stage, per rank of the side that holds more of it."""
        if index == len(plan.stages) - 1:
            return 0.0, 0.0
        stage, after = plan.stages[index], plan.stages[index + 1]
        size = self.crossing_bytes(stage.stop, max(stage_rows(plan, stage), stage_rows(plan, after)))
        ends = tuple(dict.fromkeys((stage.ranks[0], after.ranks[0])))
        return size, collective_s(self.cluster, "send", size, ends)

    def _all_reduce_s(self, size_bytes: float, ranks: tuple[int, ...]) -> float:
        points = self.collectives.get(("all_reduce", len(ranks)))
        if len(ranks) > 1 and points and not self.cluster.crosses_hosts(ranks):
            return at_size(*zip(*points, strict=True), size_bytes)
        return collective_s(self.cluster, "all_reduce", size_bytes, ranks) if size_bytes else 0.0

    def _synchronised_s(self, stage: Stage, rows: int) -> float:
        """Of one pass over the edges between the stage and others, among the tensor ranks of a replica."""
        size = 0.0
        for b in range(stage.start, stage.stop):
            for edge, other in self._touching[b]:
                if not stage.start <= other < stage.stop:
                    sizes, ats = zip(*self.layer(b, stage.tensor), strict=True)
                    size += at_size(sizes, [at.edge_bytes.get(edge, 0.0) for at in ats], rows)
        return size / self.cluster.link(stage.ranks[: stage.tensor]).bandwidth_bytes_per_s

    @cached_property
    def _touching(self) -> list[list[tuple[int, int]]]:
        """By block (edge, its other end), of the edges that any tensor degree synchronises there."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.num_blocks)]
        for i, edge in enumerate(next(iter(self.tables.values())).edges):
            for mine, other in ((edge.source, edge.target), (edge.target, edge.source)):
                ats = (at for dag in self.tables.values() for at in dag.layers[mine].at.values())
                if any(at.edge_bytes.get(i, 0.0) for at in ats):
                    found[mine].append((i, other))
        return found

    def kinds(self) -> list[int]:
        """Equal numbers for blocks that cost the same in any run of blocks: alike in tables, and in edges at and over them."""
        number: defaultdict[tuple, int] = defaultdict(lambda: len(number))
        return [number[self._kind(b)] for b in range(self.num_blocks)]

    def _kind(self, block: int) -> tuple:
        tables, over = [], []
        for size, dag in self.tables.items():
            ats = sorted(dag.layers[block].at.items())
            tables.append((size, *((t, at.choices, at.parameter_bytes) for t, at in ats)))
            for i, edge in enumerate(dag.edges):
                if edge.source <= block <= edge.target:
                    shared = tuple(at.edge_bytes.get(i, 0.0) for _, at in ats)
                    over.append((size, edge.source - block, edge.target - block, edge.size_bytes, shared))
        return block == 0, block == self.num_blocks - 1, tuple(tables), tuple(sorted(over))


def stage_rows(plan: Plan, stage: Stage) -> int:
    """Rows of a microbatch on the data rank of a stage that has most."""
    return max(stage.shares, default=plan.batch_size // plan.microbatches // stage.data)


def _moving(at: LayerAt, choice: int) -> tuple[float, ...]:
    """The fields of a `BlockCost` that grow with the rows."""
    one = at.choices[choice]
    forward_s = FORWARD_SHARE * at.choices[0].time_s if one.forward_s is None else one.forward_s
    return forward_s, one.time_s - forward_s, one.each_bytes, one.forward_peak_bytes, one.backward_peak_bytes


def in_words(values: Sequence[object]) -> str:
    return ", ".join(map(str, values)) or "none"
