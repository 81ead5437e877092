"""The layouts that a shape may use: the efficient (time, memory) chains over all blocks of the model.

One chain spans the whole model, so that stages agree at their boundaries wherever the pipeline is cut. Its prices
(planner/axis_prices.py) decide which chains are tried, the stage search then counts exactly. Shapes of one tensor degree
and share of the batch differ in their parameters' prices alone, and have the rest of their programs in common.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

from ..plan import Layout
from .axis_prices import Answers, AxisPrices, LeastPrices, PassPrices
from .layout_chain import ChainSolution, chain_frontier, chain_layouts, least_objective, smallest_chain
from .layout_elimination import Order
from .layout_options import LayoutOptions, layout_options
from .problem import Chain, Problem, Shape
from .roles import ModelAxis
from .two_axes import AxisPairs

# Chains per shape and recompute choice, from the fastest to the smallest.
MAX_CHAINS = 3
# Weights of a byte that are tried in `least_s`, as shares of what takes the fastest layouts' time over the bytes allowed.
WEIGHTS = (0.25, 0.0625, 0.5)


class LayoutChains:
    """The chains of each shape, made when first asked for."""

    def __init__(self) -> None:
        self._options: dict[tuple, LayoutOptions] = {}
        self._basis: dict[tuple, LayoutOptions] = {}
        self._fastest: dict[tuple, tuple[ChainSolution, LayoutOptions]] = {}
        self._frontiers: dict[int, tuple[ChainSolution, ...]] = {}
        self._made: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], Chain] = {}
        self._serving: dict[tuple[int, int, int], bool] = {}
        self._orders: dict[Hashable, Order] = {}
        self._answers: dict[tuple[int, int], Answers] = {}
        self._pairs: AxisPairs | None = None

    def close(self) -> None:
        """Forget everything. What is kept knows the problem, and the problem knows this: a circle that only Python's cycle
        collector would free, in half a second."""
        self.__init__()

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
        axes = problem.model_axes(tensor)
        if key not in self._serving and len(axes) > 1:
            self._serving[key] = self._pairs_of(problem).serve(axes, shards, others)
        if key not in self._serving:
            there, here = (
                AxisPrices(
                    problem, Shape(1, 1, tensor, n, "1f1b", 0), False, self._answers.setdefault((tensor, n), Answers()),
                    _role(problem, tensor),
                )
                for n in (shards, others)
            )  # fmt: skip
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
        if len(problem.model_axes(shape.tensor)) > 1:
            for recompute, lean in (*((c, False) for c in dict.fromkeys(choices)), (choices[-1], True)):
                yield self._pair(problem, shape, recompute, lean)
            return
        seen: set[tuple[Layout, ...]] = set()
        for solution in self._solutions(problem, shape, choices):
            if solution.layouts not in seen:
                seen.add(solution.layouts)
                yield self._chain(solution.layouts)

    def _chain(self, layouts: tuple[Layout, ...], inner: tuple[Layout, ...] = ()) -> Chain:
        """The same object for the same layouts, so that what is priced for one shape serves others."""
        if (layouts, inner) not in self._made:
            self._made[layouts, inner] = Chain.of(layouts, inner)
        return self._made[layouts, inner]

    def _pair(self, problem: Problem, shape: Shape, recompute: str, lean: bool) -> Chain:
        """On the two axes that the shape has, the fastest or those that keep least."""
        axes = problem.model_axes(shape.tensor)
        return self._chain(*self._pairs_of(problem).in_roles(shape, axes, recompute == "full", lean))

    def _pairs_of(self, problem: Problem) -> AxisPairs:
        if self._pairs is None:
            self._pairs = AxisPairs(problem)
        return self._pairs

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
        if len(problem.model_axes(shape.tensor)) > 1:
            return self._pair(problem, shape, problem.recompute_choices[-1], lean=True)
        options = self._options_of(problem, shape, problem.recompute_choices[-1])
        return self._chain(smallest_chain(options, 0, len(problem.graph.blocks)).layouts)

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> list[float]:
        """Per block, forward and backward on `tensor` ranks of one of `shards` shares of the batch.

        No layout is faster; what happens once per step apart. Of two axes the inner one is taken to share all out.
        """
        outer, *inner = problem.model_axes(tensor) if tensor > 1 else (ModelAxis(1),)
        least_s = self._basis_of(problem, outer.degree, shards, "none").least_s()
        return [one_s / math.prod(axis.degree for axis in inner) for one_s in least_s]

    def least_s(self, problem: Problem, shape: Shape, most_bytes: float, enough_s: float) -> float:
        """Seconds per microbatch and rank, with a share of what happens once per step, of a replica's stages together: no
        layouts take less that keep no more than `most_bytes`, whichever blocks recompute. No more is looked for than
        `enough_s`.

        most_bytes: per microbatch in flight; what lies at rest counts with its share of one on the first stage. By weak
        duality, for any weight w of a byte: least (time + w bytes) - w most_bytes.
        """
        if len(problem.model_axes(shape.tensor)) > 1:
            return 0.0
        choices = problem.recompute_choices
        # Computing again takes longer, so that it is of use to memory alone.
        found_s = free_s = least_objective([self._options_of(problem, shape, choices[0], LeastPrices)], 0.0)
        for share in WEIGHTS if most_bytes < math.inf else ():
            if found_s >= enough_s:
                break
            weight = share * free_s / max(most_bytes, 1.0)
            options = [self._options_of(problem, shape, recompute, LeastPrices) for recompute in choices]
            found_s = max(found_s, least_objective(options, weight) - weight * most_bytes)
        return found_s

    def _basis_of(self, problem: Problem, tensor: int, shards: int, recompute: str) -> LayoutOptions:
        """The programs without what happens once per step."""
        key = (tensor, shards, recompute)
        if key not in self._basis:
            shape = Shape(1, 1, tensor, shards, "1f1b", 0)
            prices = PassPrices(problem, shape, recompute == "full", self._answers_of(shape), _role(problem, tensor))
            self._basis[key] = layout_options(problem.graph, tensor, prices, self._orders)
        return self._basis[key]

    def _options_of(
        self, problem: Problem, shape: Shape, recompute: str, kind: type[AxisPrices] = AxisPrices
    ) -> LayoutOptions:
        prices = kind(problem, shape, recompute == "full", self._answers_of(shape), _role(problem, shape.tensor))
        key = (kind, shape.data, shape.tensor, shape.microbatches, shape.zero, recompute, prices.in_flight)
        if key not in self._options:
            basis = self._basis_of(problem, shape.tensor, shape.shards, recompute)
            self._options[key] = layout_options(problem.graph, shape.tensor, prices, self._orders, basis)
        return self._options[key]

    def _answers_of(self, shape: Shape) -> Answers:
        return self._answers.setdefault((shape.tensor, shape.shards), Answers())


def _role(problem: Problem, tensor: int) -> str:
    """Of an axis that is all of a shape's `tensor` ranks, or the outer one where there are two."""
    return next((name for name, degree in problem.constraints.roles[:1] if degree == tensor), "")
