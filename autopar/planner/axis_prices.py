"""What the layout solver asks about one model axis of one shape, answered by the problem's cost model.

Prices are for one rank of the axis: compute and conversions of a microbatch, and, spread over the microbatches of a step,
the gradient reductions and the optimizer that follow from the bytes at rest. Memory counts as on the stage that holds
most microbatches, per microbatch in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..cost.collectives import collective_s
from ..cost.compute import optimizer_s
from ..cost.local import LocalShapes
from ..cost.model import OPTIMIZER_BYTES_PER_ELEMENT, CostModel
from ..cost.stage_memory import at_rest
from ..graph import Op
from ..schedule.orders import schedule_named
from ..sharding.batch import batch_layout
from ..sharding.placement import Placement, Split, conversion
from ..sharding.strategies import strategies
from ..sharding.strategy import Strategy
from .layout_costs import Seconds2
from .problem import Problem, Shape

# A size of a transfer from which on bandwidth alone counts.
UNIT_BYTES = 2.0**26


@dataclass(frozen=True)
class Answers:
    """What the cost model said for one tensor degree and one share of the batch, whatever else a shape is.

    Tensors of one size and kind, which lie alike on the batch, have their conversions in common.
    """

    ops: dict[tuple[str, str], Seconds2] = field(default_factory=dict)
    conversions: dict[tuple, Seconds2] = field(default_factory=dict)
    strategies: dict[tuple, tuple[Strategy, ...]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    numbers: dict[tuple, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AxisPrices:
    """`LayoutCosts` of the tensor axis of one shape, by the problem's cost model; bytes per microbatch in flight.

    role: of the axis (planner/roles.py); answers are for one.
    """

    problem: Problem
    shape: Shape
    recompute: bool
    answers: Answers = field(default_factory=Answers)
    role: str = ""

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        """Those that do not cut the batch: that is the data axis's part, and a shape says how much of it there is."""
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        # Ops at one position of isomorphic blocks have one tuple of strategies, which the graph's analysis keeps.
        kept, key = self.answers.strategies, (id(found), self.problem.pins.words.get(op.name))
        if key not in kept:
            kept[key] = self.problem.allowed_strategies(op, self._uncut(op), self.role)
        return kept[key]

    def _uncut(self, op: Op) -> tuple[Strategy, ...]:
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        return tuple(strategy for strategy in found if not self._cuts_batch(op, strategy))

    def _cuts_batch(self, op: Op, strategy: Strategy) -> bool:
        placed = zip((*op.inputs, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
        return any(isinstance(place, Split) and self._rows.get(name) == place for name, place in placed)

    def op_s(self, op: Op, strategy: Strategy) -> Seconds2:
        known, key = self.answers.ops, (op.name, strategy.key)
        if key not in known:
            known[key] = self._model.op_s(
                op, strategy, shards=self.shape.shards, precision=self.problem.graph.precision
            )
        return self._twice(known[key])

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        if have == want:
            return (0.0, 0.0)
        known, key = self.answers.conversions, (self._class(tensor), have, want)
        if key not in known:
            ranks = self.shape.ranks(0)[: self.shape.tensor]
            known[key] = self._model.conversion_s(
                tensor, have, want, shards=self.shape.shards, ranks=ranks, precision=self.problem.graph.precision
            )
        forward_s, backward_s = known[key]
        is_parameter = self.problem.graph.tensors[tensor].role == "parameter"
        if is_parameter and conversion(have, want).backward == "all_reduce":
            backward_s /= self.shape.microbatches
        return self._twice((forward_s, backward_s))

    def _class(self, name: str) -> int:
        """The number of all tensors whose conversions take the same."""
        known, numbers = self.answers.classes, self.answers.numbers
        if name not in known:
            tensor = self.problem.graph.tensors[name]
            what = (tensor.role, tensor.shape, tensor.dtype, tensor.requires_grad, self._local.batch.get(name))
            known[name] = numbers.setdefault(what, len(numbers))
        return known[name]

    def rest_s(self, parameter: str, placement: Placement) -> float:
        if not self.problem.graph.tensors[parameter].requires_grad:
            return 0.0
        cluster, data = self.problem.cluster, self.shape.data
        size = self._local.size_bytes(parameter, placement, self.shape.tensor)
        held = size / data if self.shape.zero else size
        step_s = optimizer_s(cluster.device, {held: 1}, self._model.corrections, self._model.constants)
        each_s = 0.0
        if data > 1:
            ranks = self.shape.ranks(0)[:: self.shape.tensor]
            seen = 1 - cluster.link(ranks).overlap
            corrections = self._model.corrections
            # Buckets and blocks share the latency among many parameters.
            latency_s = collective_s(cluster, "all_reduce", 0.0, ranks, corrections)
            if self.shape.zero == 3:
                gather_s = collective_s(cluster, "all_gather", size, ranks, corrections)
                each_s = 2 * seen * (gather_s - collective_s(cluster, "all_gather", 0.0, ranks, corrections))
                scatter_s = collective_s(cluster, "reduce_scatter", size, ranks, corrections)
                scatter_s -= collective_s(cluster, "reduce_scatter", 0.0, ranks, corrections)
                step_s += scatter_s * (seen if self._model.constants.scatter_hides else 1.0)
            else:
                step_s += seen * (collective_s(cluster, "all_reduce", size, ranks, corrections) - latency_s)
        return each_s + step_s / self.shape.microbatches

    def rest_bytes(self, parameter: str, placement: Placement) -> float:
        tensor = self.problem.graph.tensors[parameter]
        size = self._local.size_bytes(parameter, placement, self.shape.tensor)
        # Parameter, gradient, optimizer state: from these levels on ZeRO shards each.
        parts = [(size, 3)]
        if tensor.requires_grad:
            parts += [(size, 2), (OPTIMIZER_BYTES_PER_ELEMENT * size // tensor.dtype.itemsize, 1)]
        return sum(part / (self.shape.data if self.shape.zero >= n else 1) for part, n in parts) / self.in_flight

    def saved_bytes(self, tensor: str, placement: Placement) -> float:
        if self.recompute:
            return 0.0
        return self._local.size_bytes(tensor, placement, self.shape.tensor)

    def saved_extra_bytes(self, op: Op, strategy: Strategy) -> float:
        if self.recompute:
            return 0.0
        return op.saved_extra_bytes * strategy.work / self.shape.shards

    def input_bytes(self, tensor: str, placement: Placement) -> float:
        if not self.recompute:
            return 0.0
        return self._local.size_bytes(tensor, placement, self.shape.tensor)

    def _twice(self, seconds: Seconds2) -> Seconds2:
        """Recomputation runs the forward again in front of the backward."""
        forward_s, backward_s = seconds
        return (forward_s, backward_s + forward_s) if self.recompute else seconds

    @property
    def _model(self) -> CostModel:
        return self.problem.costs

    @cached_property
    def _local(self) -> LocalShapes:
        shards = self.shape.shards
        placements = batch_layout(self.problem.graph, shards).placements if shards > 1 else {}
        return LocalShapes(self.problem.graph, shards, placements)

    @cached_property
    def _rows(self) -> Mapping[str, Placement]:
        """Where the rows of the batch lie in each tensor; empty where they cannot be told apart."""
        rows = self.problem.graph.batch_size
        parts = next((d for d in range(2, rows + 1) if rows % d == 0), None)
        if parts is None or self.problem.batch_conflict:
            return {}
        return batch_layout(self.problem.graph, parts).placements

    @cached_property
    def in_flight(self) -> int:
        return schedule_named(self.shape.schedule).in_flight(0, self.shape.pipeline, self.shape.microbatches)


class PassPrices(AxisPrices):
    """Of a microbatch alone, without what happens once per step."""

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        forward_s, backward_s = super().conversion_s(tensor, have, want)
        is_parameter = self.problem.graph.tensors[tensor].role == "parameter"
        return forward_s, 0.0 if is_parameter and conversion(have, want).backward == "all_reduce" else backward_s

    def rest_s(self, parameter: str, placement: Placement) -> float:
        return 0.0


class LeastPrices(AxisPrices):
    """No more than what the cost model asks: where transfers are put together, latency counts once, and large ones have the
    best protocol; so each parameter counts with what a byte of a large transfer takes, as far as it cannot hide."""

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        forward_s, backward_s = super().conversion_s(tensor, have, want)
        is_parameter = self.problem.graph.tensors[tensor].role == "parameter"
        if is_parameter and conversion(have, want).backward == "all_reduce":
            ranks = self.shape.ranks(0)[: self.shape.tensor]
            size = self._local.size_bytes(tensor, want, self.shape.tensor)
            once_s = size * self._byte_s("all_reduce", ranks) / self.shape.microbatches
            backward_s = min(backward_s, once_s + (forward_s if self.recompute else 0.0))
        return forward_s, backward_s

    def rest_s(self, parameter: str, placement: Placement) -> float:
        if not self.problem.graph.tensors[parameter].requires_grad:
            return 0.0
        shape, model = self.shape, self._model
        size = self._local.size_bytes(parameter, placement, shape.tensor)
        held = size / shape.data if shape.zero else size
        step_s = optimizer_s(self.problem.cluster.device, {held: 1}, model.corrections, model.constants)
        if shape.data == 1:
            return step_s / shape.microbatches
        each_s, once_s = self._data_byte_s
        return size * each_s + (step_s + size * once_s) / shape.microbatches

    def rest_bytes(self, parameter: str, placement: Placement) -> float:
        tensor, shape, constants = self.problem.graph.tensors[parameter], self.shape, self._model.constants
        size, used_bytes = self._local.size_bytes(parameter, placement, shape.tensor), tensor.dtype.itemsize
        rest = at_rest(tensor.at_rest.itemsize, used_bytes, constants)
        elements = size / used_bytes
        found = elements * rest.parameter / shape.data if shape.zero == 3 else min(size, elements * rest.parameter)
        if tensor.requires_grad:
            cuts_gradient = shape.zero > 1 or (shape.zero == 1 and constants.slices_at_rest and shape.microbatches == 1)
            found += elements * rest.gradient / (shape.data if cuts_gradient else 1)
            found += elements * rest.optimizer / (shape.data if shape.zero else 1)
        return found / self.in_flight

    @cached_property
    def _data_byte_s(self) -> tuple[float, float]:
        """Seconds that a byte of a parameter takes on the data axis: in every microbatch, and once per step."""
        shape, model = self.shape, self._model
        constants, ranks = model.constants, shape.ranks(0)[:: shape.tensor]
        hides = self.problem.cluster.link(ranks).overlap
        if self.problem.cluster.device.asynchronous:
            hides = min(1.0, hides * (constants.gather_overlap if shape.zero == 3 else constants.overlap))
        seen, reduced = 1 - hides, model.reduced_share
        if not shape.zero:
            return 0.0, seen * reduced * self._byte_s("all_reduce", ranks)
        scatter_s = reduced * self._byte_s("reduce_scatter", ranks) * (seen if constants.scatter_hides else 1.0)
        gather_s = self._byte_s("all_gather", ranks)
        if shape.zero == 3:
            often = constants.scatter_each or not constants.scatter_hides
            return 2 * seen * gather_s + (scatter_s if often else 0.0), 0.0 if often else scatter_s
        after_s = (1 - constants.update_overlap) * gather_s
        return (scatter_s, after_s) if shape.zero == 2 else (0.0, scatter_s + after_s)

    def _byte_s(self, kind: str, ranks: tuple[int, ...]) -> float:
        model = self._model
        one_s, two_s = (
            collective_s(self.problem.cluster, kind, units * UNIT_BYTES, ranks, model.corrections, model.constants)
            for units in (1, 2)
        )
        return (two_s - one_s) / UNIT_BYTES
