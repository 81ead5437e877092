"""The layouts that a shape may use: the efficient (time, memory) chains over all blocks of the model.

One chain spans the whole model, so that stages agree at their boundaries wherever the pipeline is cut. Its prices are
the cost model's, for one rank of the tensor axis: compute and conversions of a microbatch, and, spread over the
microbatches of a step, the gradient reductions and the optimizer that follow from the bytes at rest. Memory counts as
on the stage that holds most microbatches, per microbatch in flight; it only decides which chains are tried, the stage
search then counts exactly. So shapes of one tensor degree and share of the batch differ in their parameters' prices
alone, and have the rest of their programs in common.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class Regime:
    """What layouts are found for: a microbatch on one of `tensor` ranks.

    data, zero: as in a shape; they decide on the reduction of gradients. shards: into how many parts the batch is cut.
    per_step: a microbatch's part of what happens once per step. rest: its part of the bytes at rest.
    """

    tensor: int
    data: int
    zero: int
    shards: int
    per_step: float
    rest: float

    @classmethod
    def of(cls, shape: Shape) -> Regime:
        held = schedule_named(shape.schedule).in_flight(0, shape.pipeline, shape.microbatches)
        return cls(shape.tensor, shape.data, shape.zero, shape.shards, 1 / shape.microbatches, 1 / held)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(self.tensor))

    @property
    def data_ranks(self) -> tuple[int, ...]:
        return tuple(range(0, self.data * self.tensor, self.tensor))


class LayoutChains:
    """The chains of each shape, made when first asked for."""

    def __init__(self) -> None:
        self._options: dict[tuple, LayoutOptions] = {}
        self._basis: dict[tuple, LayoutOptions] = {}
        self._fastest: dict[tuple, ChainSolution] = {}
        self._frontiers: dict[tuple, tuple[ChainSolution, ...]] = {}
        self._made: dict[tuple[Layout, ...], Chain] = {}
        self._serving: dict[tuple[int, int, int], bool] = {}
        self._orders: dict[Hashable, Order] = {}
        self._answers: dict[tuple[int, int], Answers] = {}

    def of(self, problem: Problem, shape: Shape) -> Iterator[Chain]:
        """Distinct chains for `shape`, the fastest first; the empty chain where there is no tensor axis."""
        regime = Regime.of(shape)
        if regime.tensor == 1:
            yield Chain()
            return
        yield from self._distinct(self._solutions(problem, regime))

    def without_recompute(self, problem: Problem, shape: Shape) -> Iterator[Chain]:
        """Those of `of` that are found for blocks which compute nothing again, if they may."""
        if shape.tensor == 1:
            yield Chain()
            return
        yield from self._distinct(self._solutions(problem, Regime.of(shape), problem.recompute_choices[:1]))

    def serve(self, problem: Problem, tensor: int, anchor: int, shards: int) -> bool:
        """Whether chains that were found where the batch is cut into `anchor` parts can run where it is `shards`."""
        if tensor == 1 or anchor == shards:
            return True
        key = (tensor, anchor, shards)
        if key not in self._serving:
            there, here = (
                AxisPrices(problem, Regime(tensor, 1, 0, n, 0.0, 0.0), False, self._answers_of(tensor, n))
                for n in (anchor, shards)
            )
            self._serving[key] = all(
                mine is theirs or set(map(id, theirs)) <= set(map(id, mine))
                for op in problem.distinct_ops
                for mine, theirs in ((here.strategies(op), there.strategies(op)),)
            )
        return self._serving[key]

    def smallest(self, problem: Problem, shape: Shape) -> Chain:
        """The chain that keeps least, with the most recomputation."""
        if shape.tensor == 1:
            return Chain()
        options = self._options_of(problem, Regime.of(shape), problem.recompute_choices[-1])
        return self._chain(smallest_chain(options, 0, len(problem.graph.blocks)))

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> list[float]:
        """Per block, forward and backward on `tensor` ranks of one of `shards` shares of the batch.

        No layout is faster; what happens once per step apart.
        """
        return self._basis_of(problem, tensor, shards, "none").least_s()

    def _distinct(self, solutions: Iterable[ChainSolution]) -> Iterator[Chain]:
        seen: set[tuple[Layout, ...]] = set()
        for solution in solutions:
            if solution.layouts not in seen:
                seen.add(solution.layouts)
                yield self._chain(solution)

    def _chain(self, solution: ChainSolution) -> Chain:
        """The same object for the same layouts, so that what is priced for one shape serves others."""
        if solution.layouts not in self._made:
            self._made[solution.layouts] = Chain.of(solution.layouts)
        return self._made[solution.layouts]

    def _solutions(self, problem: Problem, regime: Regime, choices: Sequence[str] = ()) -> Iterator[ChainSolution]:
        """The fastest chain, and, if more are asked for, the frontiers of some recompute choices: by default of the least
        and the most that is computed again."""
        num_blocks = len(problem.graph.blocks)
        choices = choices or (problem.recompute_choices[0], problem.recompute_choices[-1])
        # Speed alone does not depend on how many microbatches are in flight, nor so on the schedule.
        key = (replace(regime, rest=0.0), choices[0])
        if key not in self._fastest:
            self._fastest[key] = chain_layouts(self._options_of(problem, *key), 0, num_blocks)
        yield self._fastest[key]
        for recompute in dict.fromkeys(choices):
            key = (regime, recompute)
            if key not in self._frontiers:
                options = self._options_of(problem, regime, recompute)
                self._frontiers[key] = chain_frontier(options, 0, num_blocks, num_points=MAX_CHAINS)
            yield from self._frontiers[key]

    def _basis_of(self, problem: Problem, tensor: int, shards: int, recompute: str) -> LayoutOptions:
        """The programs without what happens once per step."""
        key = (tensor, shards, recompute)
        if key not in self._basis:
            regime = Regime(tensor, 1, 0, shards, 0.0, 0.0)
            prices = PassPrices(problem, regime, recompute == "full", self._answers_of(tensor, shards))
            self._basis[key] = layout_options(problem.graph, tensor, prices, self._orders)
        return self._basis[key]

    def _options_of(self, problem: Problem, regime: Regime, recompute: str) -> LayoutOptions:
        key = (regime, recompute)
        if key not in self._options:
            answers = self._answers_of(regime.tensor, regime.shards)
            prices = AxisPrices(problem, regime, recompute == "full", answers)
            basis = self._basis_of(problem, regime.tensor, regime.shards, recompute)
            self._options[key] = layout_options(problem.graph, regime.tensor, prices, self._orders, basis)
        return self._options[key]

    def _answers_of(self, tensor: int, shards: int) -> Answers:
        return self._answers.setdefault((tensor, shards), Answers())


@dataclass(frozen=True)
class Answers:
    """What the cost model said for one tensor degree and one share of the batch, whatever else a shape is.

    Tensors of one size and kind, which lie alike on the batch, have their conversions in common.
    """

    ops: dict[tuple[str, str], Seconds2] = field(default_factory=dict)
    conversions: dict[tuple, Seconds2] = field(default_factory=dict)
    strategies: dict[int, tuple[Strategy, ...]] = field(default_factory=dict)
    classes: dict[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True)
class AxisPrices:
    """`LayoutCosts` of the tensor axis under one regime, by the problem's cost model; bytes per microbatch in flight."""

    problem: Problem
    regime: Regime
    recompute: bool
    answers: Answers = field(default_factory=Answers)

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        """Those that do not cut the batch: that is the data axis's part, and a shape says how much of it there is."""
        found = strategies(self.problem.graph, op, self.regime.tensor, self.regime.shards)
        # Ops at one position of isomorphic blocks have one tuple of strategies, which the graph's analysis keeps.
        kept = self.answers.strategies
        if id(found) not in kept:
            kept[id(found)] = tuple(strategy for strategy in found if not self._cuts_batch(op, strategy))
        return kept[id(found)]

    def _cuts_batch(self, op: Op, strategy: Strategy) -> bool:
        placed = zip((*op.inputs, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
        return any(isinstance(place, Split) and self._rows.get(name) == place for name, place in placed)

    def op_s(self, op: Op, strategy: Strategy) -> Seconds2:
        known, key = self.answers.ops, (op.name, strategy.key)
        if key not in known:
            known[key] = self._model.op_s(
                op, strategy, shards=self.regime.shards, precision=self.problem.graph.precision
            )
        return self._twice(known[key])

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        if have == want:
            return (0.0, 0.0)
        known, key = self.answers.conversions, (self._class(tensor), have, want)
        if key not in known:
            known[key] = self._model.conversion_s(
                tensor,
                have,
                want,
                shards=self.regime.shards,
                ranks=self.regime.ranks,
                precision=self.problem.graph.precision,
            )
        forward_s, backward_s = known[key]
        is_parameter = key[0][0] == "parameter"
        if is_parameter and conversion(have, want).backward == "all_reduce":
            backward_s *= self.regime.per_step
        return self._twice((forward_s, backward_s))

    def _class(self, name: str) -> tuple:
        """What the conversions of a tensor depend on."""
        known = self.answers.classes
        if name not in known:
            tensor = self.problem.graph.tensors[name]
            known[name] = (
                tensor.role, tensor.shape, tensor.dtype, tensor.requires_grad, self._local.batch.get(name)
            )  # fmt: skip
        return known[name]

    def rest_s(self, parameter: str, placement: Placement) -> float:
        if not self.problem.graph.tensors[parameter].requires_grad:
            return 0.0
        cluster, data, zero = self.problem.cluster, self.regime.data, self.regime.zero
        size = self._local.size_bytes(parameter, placement, self.regime.tensor)
        held = size / data if zero else size
        step_s = optimizer_s(cluster.device, {held: 1}, self._model.corrections, self._model.constants)
        each_s = 0.0
        if data > 1:
            ranks = self.regime.data_ranks
            seen = 1 - cluster.link(ranks).overlap
            corrections = self._model.corrections
            # Buckets and blocks share the latency among many parameters.
            latency_s = collective_s(cluster, "all_reduce", 0.0, ranks, corrections)
            if zero == 3:
                gather_s = collective_s(cluster, "all_gather", size, ranks, corrections)
                each_s = 2 * seen * (gather_s - collective_s(cluster, "all_gather", 0.0, ranks, corrections))
                scatter_s = collective_s(cluster, "reduce_scatter", size, ranks, corrections)
                step_s += seen * (scatter_s - collective_s(cluster, "reduce_scatter", 0.0, ranks, corrections))
            else:
                step_s += seen * (collective_s(cluster, "all_reduce", size, ranks, corrections) - latency_s)
        return each_s + step_s * self.regime.per_step

    def rest_bytes(self, parameter: str, placement: Placement) -> float:
        tensor, data, zero = self.problem.graph.tensors[parameter], self.regime.data, self.regime.zero
        size = self._local.size_bytes(parameter, placement, self.regime.tensor)
        # Parameter, gradient, optimizer state: from these levels on ZeRO shards each.
        parts = [(size, 3)]
        if tensor.requires_grad:
            parts += [(size, 2), (OPTIMIZER_BYTES_PER_ELEMENT * size // tensor.dtype.itemsize, 1)]
        return self.regime.rest * sum(part / (data if zero >= level else 1) for part, level in parts)

    def saved_bytes(self, tensor: str, placement: Placement) -> float:
        if self.recompute:
            return 0.0
        return self._local.size_bytes(tensor, placement, self.regime.tensor)

    def saved_extra_bytes(self, op: Op, strategy: Strategy) -> float:
        if self.recompute:
            return 0.0
        return op.saved_extra_bytes * strategy.work / self.regime.shards

    def input_bytes(self, tensor: str, placement: Placement) -> float:
        if not self.recompute:
            return 0.0
        return self._local.size_bytes(tensor, placement, self.regime.tensor)

    def _twice(self, seconds: Seconds2) -> Seconds2:
        """Recomputation runs the forward again in front of the backward."""
        forward_s, backward_s = seconds
        return (forward_s, backward_s + forward_s) if self.recompute else seconds

    @property
    def _model(self) -> CostModel:
        return self.problem.costs

    @cached_property
    def _local(self) -> LocalShapes:
        shards = self.regime.shards
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


class PassPrices(AxisPrices):
    """Of a microbatch alone, without what happens once per step."""

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        forward_s, backward_s = super().conversion_s(tensor, have, want)
        is_parameter = self.problem.graph.tensors[tensor].role == "parameter"
        return forward_s, 0.0 if is_parameter and conversion(have, want).backward == "all_reduce" else backward_s

    def rest_s(self, parameter: str, placement: Placement) -> float:
        return 0.0
