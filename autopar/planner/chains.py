"""The layouts that a shape may use: the efficient (time, memory) chains over all blocks of the model.

One chain spans the whole model, so that stages agree at their boundaries wherever the pipeline is cut. Its prices are
the cost model's, for one rank of the tensor axis: compute and conversions of a microbatch, and, spread over the
microbatches of a step, the gradient reductions and the optimizer that follow from the bytes at rest. Memory counts as
on the stage that holds most microbatches, per microbatch in flight; it only decides which chains are tried, the stage
search then counts exactly. So shapes of one tensor degree and share of the batch differ in their parameters' prices
alone, and have the rest of their programs in common.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..cost.collectives import collective_s
from ..cost.compute import optimizer_s
from ..cost.local import LocalShapes
from ..cost.model import OPTIMIZER_BYTES_PER_ELEMENT, CostModel
from ..graph import Op
from ..plan import Layout
from ..schedule.orders import schedule_named
from ..sharding.batch import batch_layout
from ..sharding.placement import Placement, Split, conversion
from ..sharding.strategies import strategies
from ..sharding.strategy import Strategy
from .layout_chain import ChainSolution, chain_frontier, chain_layouts, smallest_chain
from .layout_costs import Seconds2
from .layout_elimination import Order
from .layout_options import LayoutOptions, layout_options
from .problem import Chain, Problem, Shape

# Chains per shape and recompute choice, from the fastest to the smallest.
MAX_CHAINS = 3


class LayoutChains:
    """The chains of each shape, made when first asked for."""

    def __init__(self) -> None:
        self._options: dict[tuple, LayoutOptions] = {}
        self._basis: dict[tuple, LayoutOptions] = {}
        self._fastest: dict[tuple, tuple[ChainSolution, LayoutOptions]] = {}
        self._frontiers: dict[int, tuple[ChainSolution, ...]] = {}
        self._made: dict[tuple[Layout, ...], Chain] = {}
        self._serving: dict[tuple[int, int, int], bool] = {}
        self._orders: dict[Hashable, Order] = {}
        self._answers: dict[tuple[int, int], Answers] = {}

    def of(self, problem: Problem, shape: Shape) -> Iterator[Chain]:
        """Distinct chains for `shape`, the fastest first; the empty chain where there is no tensor axis."""
        # Also those for blocks that may not recompute: prices of layouts leave out overlap, so that one which is found for
        # other prices can be the fastest in a whole plan.
        yield from self._distinct(problem, shape, (problem.recompute_choices[0], "none", "full"))

    def without_recompute(self, problem: Problem, shape: Shape) -> Iterator[Chain]:
        """Those of `of` that are found for blocks which compute nothing again, if they may."""
        yield from self._distinct(problem, shape, problem.recompute_choices[:1])

    def serve(self, problem: Problem, tensor: int, shards: int, others: int) -> bool:
        """Whether chains that were found where the batch is cut into `shards` parts can run where it is `others`."""
        if tensor == 1 or shards == others:
            return True
        key = (tensor, shards, others)
        if key not in self._serving:
            there, here = (
                AxisPrices(
                    problem, Shape(1, 1, tensor, n, "1f1b", 0), False, self._answers.setdefault((tensor, n), Answers())
                )
                for n in (shards, others)
            )
            self._serving[key] = all(
                mine is theirs or set(map(id, theirs)) <= set(map(id, mine))
                for op in problem.distinct_ops
                for mine, theirs in ((here.strategies(op), there.strategies(op)),)
            )
        return self._serving[key]

    def _distinct(self, problem: Problem, shape: Shape, choices: Sequence[str]) -> Iterator[Chain]:
        if shape.tensor == 1:
            yield Chain()
            return
        seen: set[tuple[Layout, ...]] = set()
        for solution in self._solutions(problem, shape, choices):
            if solution.layouts not in seen:
                seen.add(solution.layouts)
                yield self._chain(solution)

    def _chain(self, solution: ChainSolution) -> Chain:
        """The same object for the same layouts, so that what is priced for one shape serves others."""
        if solution.layouts not in self._made:
            self._made[solution.layouts] = Chain.of(solution.layouts)
        return self._made[solution.layouts]

    def _solutions(self, problem: Problem, shape: Shape, choices: Sequence[str]) -> Iterator[ChainSolution]:
        """The fastest chain, and, if more are asked for, the frontiers of these recompute choices."""
        num_blocks = len(problem.graph.blocks)
        # Speed alone does not depend on how many microbatches are in flight, nor so on the schedule.
        key = (shape.data, shape.tensor, shape.microbatches, shape.zero, choices[0])
        if key not in self._fastest:
            options = self._options_of(problem, shape, choices[0])
            self._fastest[key] = chain_layouts(options, 0, num_blocks), options
        fastest, its_options = self._fastest[key]
        yield fastest
        for recompute in dict.fromkeys(choices):
            options = self._options_of(problem, shape, recompute)
            # Options live as long as this object.
            if id(options) not in self._frontiers:
                # Its bytes are those of its own options.
                known = fastest if options is its_options else None
                self._frontiers[id(options)] = chain_frontier(
                    options, 0, num_blocks, num_points=MAX_CHAINS, fastest=known
                )
            yield from self._frontiers[id(options)]

    def smallest(self, problem: Problem, shape: Shape) -> Chain:
        """The chain that keeps least, with the most recomputation."""
        if shape.tensor == 1:
            return Chain()
        options = self._options_of(problem, shape, problem.recompute_choices[-1])
        return self._chain(smallest_chain(options, 0, len(problem.graph.blocks)))

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> list[float]:
        """Per block, forward and backward on `tensor` ranks of one of `shards` shares of the batch.

        No layout is faster; what happens once per step apart.
        """
        return self._basis_of(problem, tensor, shards, "none").least_s()

    def _basis_of(self, problem: Problem, tensor: int, shards: int, recompute: str) -> LayoutOptions:
        """The programs without what happens once per step."""
        key = (tensor, shards, recompute)
        if key not in self._basis:
            shape = Shape(1, 1, tensor, shards, "1f1b", 0)
            prices = PassPrices(problem, shape, recompute == "full", self._answers_of(shape))
            self._basis[key] = layout_options(problem.graph, tensor, prices, self._orders)
        return self._basis[key]

    def _options_of(self, problem: Problem, shape: Shape, recompute: str) -> LayoutOptions:
        prices = AxisPrices(problem, shape, recompute == "full", self._answers_of(shape))
        key = (shape.data, shape.tensor, shape.microbatches, shape.zero, recompute, prices.in_flight)
        if key not in self._options:
            basis = self._basis_of(problem, shape.tensor, shape.shards, recompute)
            self._options[key] = layout_options(problem.graph, shape.tensor, prices, self._orders, basis)
        return self._options[key]

    def _answers_of(self, shape: Shape) -> Answers:
        return self._answers.setdefault((shape.tensor, shape.shards), Answers())


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
    """`LayoutCosts` of the tensor axis of one shape, by the problem's cost model; bytes per microbatch in flight."""

    problem: Problem
    shape: Shape
    recompute: bool
    answers: Answers = field(default_factory=Answers)

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        """Those that do not cut the batch: that is the data axis's part, and a shape says how much of it there is."""
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        # Ops at one position of isomorphic blocks have one tuple of strategies, which the graph's analysis keeps.
        kept, key = self.answers.strategies, (id(found), self.problem.pins.words.get(op.name))
        if key not in kept:
            allowed = self.problem.allowed_strategies(op, found)
            kept[key] = tuple(strategy for strategy in allowed if not self._cuts_batch(op, strategy))
        return kept[key]

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
                step_s += (seen if self._model.constants.scatter_hides else 1.0) * (
                    scatter_s - collective_s(cluster, "reduce_scatter", 0.0, ranks, corrections)
                )
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
