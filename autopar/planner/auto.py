"""The default search: best first over shapes, each refined only as far as its lower bound makes it worth.

A shape starts with a floor (`_Floors`). When it comes up, it gets the fastest layouts and a stage table with a tighter bound
(`StageSearch.root_bound_s`); when that comes up, its cuts are searched. If memory is what holds it back, layouts that take
less memory follow, with the bound that the fastest would have without the limit. The search ends when the least bound left
is no better than the best plan simulated, which is then the optimum of the space.

Floors. With C the time of a microbatch through the whole model, P stages of times c_0 .. c_{P-1} that sum to at least C, and M
microbatches, the work bound of planner/stages.py is least when c_s = c_0 (1 - 1/M)^s, where it equals

    C / (1 - (1 - 1/M)^P).

On a tensor axis of t ranks, C is that of one rank times the ratio of the two at the largest share of the batch, where
collectives cost relatively least; memory is at least a t-th. What the floors assume of the cost model: cutting a stage in
two never makes its parts cheaper together, ZeRO and recomputation never make a stage faster, and the two statements on
the tensor axis hold up to SLACK.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from ..plan import Plan
from .candidates import MAX_CANDIDATES, TooLarge, Tried, conclude, nothing_fits
from .pricing import Piece, StagePrices
from .problem import Chain, Problem, Shape
from .stages import TOLERANCE, StageSearch

# Allowance for rates that rise as shares get smaller (caches), and for the bytes that a rank holds besides its share.
SLACK = 0.95
# Partial plans looked at per shape before its proof of optimality is left open and the gap reported.
MAX_VISITS = 20_000


@dataclass(order=True, slots=True)
class _Entry:
    """A shape with its lower bound, and what to do when it comes up: `search` its cuts, or try its next `chains`.

    order: ties go to the first come.
    """

    bound_s: float
    order: int
    shape: Shape = field(compare=False)
    search: StageSearch | None = field(compare=False, default=None)
    chains: Iterator[Chain] | None = field(compare=False, default=None)


def auto(problem: Problem, progress: bool = True) -> Plan:
    """The plan of least simulated step time that fits; ValueError, with the smallest plan found, when none does."""
    return _Auto(problem, progress).run()


class _Auto:
    def __init__(self, problem: Problem, progress: bool) -> None:
        self.problem, self._progress = problem, progress
        self.prices = StagePrices(problem)
        self.floors = _Floors(problem, self.prices)
        self.best: Tried | None = None
        self.tried: list[Tried] = []
        self.tight: list[TooLarge] = []
        self.open_bound_s = math.inf
        self.heap: list[_Entry] = []

    def run(self) -> Plan:
        shapes = self.problem.shapes
        self.heap = [_Entry(self.floors.time_s(shape), i, shape) for i, shape in enumerate(shapes)]
        heapq.heapify(self.heap)
        with tqdm(total=len(shapes), desc="planning", unit="shape", delay=2, leave=False, disable=not self._progress) as bar:
            while self.heap and not self._is_beaten(self.heap[0].bound_s):
                entry = heapq.heappop(self.heap)
                if entry.search is not None:
                    self._solve(entry.search)
                else:
                    self._refine(entry)
                    bar.update(entry.chains is None)
        if self.best is None:
            raise nothing_fits(self.problem, self.prices, self.tight)
        self._represent(sorted(self.heap))
        return conclude(self.problem, self.prices, self.best, self.tried, self.tight, self.open_bound_s)

    def _is_beaten(self, bound_s: float) -> bool:
        return self.best is not None and bound_s >= self.best.step_time_s * (1 - TOLERANCE)

    def _refine(self, entry: _Entry) -> None:
        """Replace a shape without a stage table by a search of its cuts, with its next chain of layouts."""
        shape, chains = entry.shape, entry.chains
        if chains is None:
            least_bytes = self.floors.memory_bytes(shape)
            if least_bytes > self.problem.memory_limit_bytes:
                self.tight.append(TooLarge(least_bytes, shape))
                return
            chains = iter(self.problem.chains.of(self.problem, shape))
        chain = next(chains, None)
        if chain is None:
            return
        search = StageSearch(self.problem, shape, chain, self.prices)
        if search.root_bound_s < math.inf:
            heapq.heappush(self.heap, _Entry(search.root_bound_s, entry.order, shape, search))
        else:
            self.tight.append(TooLarge(search.smallest()[1], shape, search))
        # Later chains are slower and take less memory.
        if search.free_bound_s < search.root_bound_s * (1 - TOLERANCE):
            heapq.heappush(self.heap, _Entry(search.free_bound_s, entry.order, shape, chains=chains))

    def _solve(self, search: StageSearch) -> None:
        solution = search.solve(self.best.step_time_s if self.best else math.inf, MAX_VISITS)
        self.open_bound_s = min(self.open_bound_s, solution.open_bound_s)
        # A shape that lost is represented among the candidates by the plan that its bounds point to.
        tried = Tried.of(self.problem, search, solution.pieces or search.first())
        self.tried.append(tried)
        if solution.pieces is not None:
            self.best = tried

    def _represent(self, left: list[_Entry]) -> None:
        """Give the nearest of the ways to use the devices that were never searched a simulated plan each."""
        seen = {tried.shape.group for tried in self.tried}
        for entry in left:
            if entry.shape.group in seen or len(seen) >= MAX_CANDIDATES:
                continue
            search = entry.search or self._fastest(entry.shape)
            pieces = search.first()
            if pieces is not None:
                seen.add(entry.shape.group)
                self.tried.append(Tried.of(self.problem, search, pieces))

    def _fastest(self, shape: Shape) -> StageSearch:
        chain = next(iter(self.problem.chains.of(self.problem, shape)))
        return StageSearch(self.problem, shape, chain, self.prices)


class _Floors:
    """Lower bounds of a shape's step time and memory, from few questions to the cost model; see the module's docstring."""

    def __init__(self, problem: Problem, prices: StagePrices) -> None:
        self.problem, self.prices = problem, prices
        self._passes: dict[int, float] = {}
        self._ratios: dict[int, float] = {1: 1.0}

    def time_s(self, shape: Shape) -> float:
        pass_s = self._pass_s(shape.data, shape.microbatches) * self._ratio(shape.tensor)
        return pass_s / (1 - (1 - 1 / shape.microbatches) ** shape.pipeline)

    def memory_bytes(self, shape: Shape) -> float:
        if shape.tensor == 1:
            return 0.0  # its stage table is exact and as cheap
        alone = replace(shape, tensor=1)
        return StageSearch(self.problem, alone, Chain(), self.prices).smallest()[1] * SLACK / shape.tensor

    def _pass_s(self, data: int, microbatches: int) -> float:
        """One microbatch through the whole model, forward and backward, without a tensor axis."""
        shards = data * microbatches
        if shards not in self._passes:
            alone = Shape(1, data, 1, microbatches, "1f1b", 0)
            cost = self.prices.cost(alone, Chain(), 0, Piece(0, len(self.problem.graph.blocks), "none"))
            self._passes[shards] = cost.forward_s + cost.backward_s
        return self._passes[shards]

    def _ratio(self, tensor: int) -> float:
        if tensor not in self._ratios:
            self._ratios[tensor] = SLACK * self.problem.chains.pass_s(self.problem, tensor) / self._pass_s(1, 1)
        return self._ratios[tensor]
