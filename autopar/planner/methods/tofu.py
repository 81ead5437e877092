"""Tofu: every op split over all workers, at the least bytes moved.

The recursion over two workers is `tofu_recursion`. In a plan, steps that split along the batch make the data axis and
the others the model axis; the latter's layouts are the exact optimum, in bytes, over all strategies that share an op's
work out (a chain of blocks is the nearly linear graph that Tofu coarsens to). Of the ways to factor the workers into
data x model, the one that moves least bytes is taken.

Reference: Wang, Huang and Li, EuroSys 2019, sections 4 and 5. It has no pipelines and no replicated compute.
"""

from __future__ import annotations

from ...graph import Op
from ...plan import Plan
from ...sharding.placement import REPLICATED, Placement, conversion
from ...sharding.strategies import strategies
from ...sharding.strategy import Strategy
from ..axis_prices import AxisPrices
from ..layout_chain import chain_layouts
from ..layout_options import layout_options
from ..pricing import Piece, assemble
from ..problem import Chain, Problem, Shape
from .bench import Bench


def tofu(problem: Problem) -> Plan:
    """The plan that moves least bytes of those that fit."""
    with Bench(problem, "tofu") as bench:
        shapes = bench.shapes(lambda s: s.pipeline == 1, lambda s: s.zero == 0)
        by_bytes = []
        for shape in shapes:
            if bench.spent:
                break
            chain, moved = _least_bytes(problem, shape)
            by_bytes.append((moved, shape.microbatches, len(by_bytes), shape, chain))
        for _, _, _, shape, chain in sorted(by_bytes, key=lambda one: one[:3]):
            if bench.best is not None or bench.spent:
                break
            bench.offer(_plan(bench, shape, chain))
            if bench.best is None:
                bench.offer(bench.relieved(_plan(bench, shape, chain)))
        return bench.best_plan()
    return bench.best_plan()


def _plan(bench: Bench, shape: Shape, chain: Chain) -> Plan:
    cuts = [bench.num_blocks * s // shape.pipeline for s in range(shape.pipeline + 1)]
    recompute = bench.problem.recompute_choices[0]
    pieces = [Piece(start, stop, recompute) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return assemble(bench.problem, shape, chain, pieces)


def _least_bytes(problem: Problem, shape: Shape) -> tuple[Chain, float]:
    """The layouts that move least, and the bytes that a rank moves per step with them."""
    prices = BytePrices(problem, shape, False)
    reduced = sum(prices.rest_s(p.name, REPLICATED) for p in problem.graph.parameters) * shape.microbatches
    if shape.tensor == 1:
        return Chain(), reduced
    found = chain_layouts(layout_options(problem.graph, shape.tensor, prices), 0, len(problem.graph.blocks))
    return Chain.of(found.layouts), found.time_s * shape.microbatches


class BytePrices(AxisPrices):
    """`LayoutCosts` in bytes that a rank sends, in place of seconds; ops that can share their work out do."""

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        kept, key = self.answers.strategies, (id(found), self.problem.pins.words.get(op.name))
        if key not in kept:
            allowed = self.problem.allowed_strategies(op, found)
            kept[key] = tuple(s for s in allowed if s.work < 1 and not self._cuts_batch(op, s)) or allowed
        return kept[key]

    def op_s(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        n = self.shape.tensor
        borders = strategy.border_bytes / self.shape.shards
        return 2 * (n - 1) / n * strategy.collective_bytes / self.shape.shards + borders, borders

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> tuple[float, float]:
        if have == want:
            return (0.0, 0.0)
        actions = conversion(have, want)
        size = self._local.size_bytes(tensor, REPLICATED, 1)
        forward, backward = (_SENT.get(action, lambda n: 0.0)(self.shape.tensor) * size for action in _both(actions))
        if not self.problem.graph.tensors[tensor].requires_grad:
            backward = 0.0
        elif self.problem.graph.tensors[tensor].role == "parameter" and actions.backward == "all_reduce":
            backward /= self.shape.microbatches
        return forward, backward

    def rest_s(self, parameter: str, placement: Placement) -> float:
        if not self.problem.graph.tensors[parameter].requires_grad or self.shape.data == 1:
            return 0.0
        size = self._local.size_bytes(parameter, placement, self.shape.tensor)
        return 2 * (self.shape.data - 1) / self.shape.data * size / self.shape.microbatches


def _both(actions) -> tuple[str, str]:
    return actions.forward, actions.backward


# Bytes that each of n ranks sends in a ring, per byte of the whole tensor.
_SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n / n,
}
