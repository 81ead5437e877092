"""The default search: best first over shapes, each refined only as far as its lower bound makes it worth.

A shape starts with a floor that needs one stage cost for all shapes that cut the batch alike (`_floor_s`); when it comes
up, its stage table gives a tighter bound (`StageSearch.root_bound_s`); when it comes up again, its cuts are searched. The
search ends when the least bound left is no better than the best plan simulated, which is then the optimum of the space.

What the floor assumes of the cost model: cutting a stage in two never makes its parts cheaper together, ZeRO and
recomputation never make a stage faster, and on a tensor axis of t ranks a stage takes at least FLOOR_SHARE / t of its time
on one. The rest is exact. With C the time of a microbatch through the whole model, P stages of times c_0 .. c_{P-1}
that sum to at least C, and M microbatches, the work bound of planner/stages.py is least when
c_s = c_0 (1 - 1/M)^s, where it equals C / (1 - (1 - 1/M)^P).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from ..plan import Plan
from .candidates import Tried, conclude, too_little_memory
from .pricing import Piece, StagePrices
from .problem import Chain, Problem, Shape
from .stages import TOLERANCE, StageSearch

# A t-th of an op's work may take less than a t-th of its time where the smaller share fits in a cache.
FLOOR_SHARE = 0.8
# Partial plans looked at per shape before its proof of optimality is left open and the gap reported.
MAX_VISITS = 20_000
# Rows of the table of candidates: enough for each way to use 8 devices, few enough to read.
MAX_CANDIDATES = 16


@dataclass(order=True, slots=True)
class _Entry:
    """A shape with its lower bound; `search` once its stage table is there. `order` breaks ties by first come."""

    bound_s: float
    order: int
    shape: Shape = field(compare=False)
    search: StageSearch | None = field(compare=False, default=None)


def auto(problem: Problem, progress: bool = True) -> Plan:
    """The plan of least simulated step time that fits; ValueError, with the smallest plan found, when none does."""
    return _Auto(problem, progress).run()


class _Auto:
    def __init__(self, problem: Problem, progress: bool) -> None:
        self.problem, self._progress = problem, progress
        self.prices = StagePrices(problem)
        self.best: Tried | None = None
        self.tried: list[Tried] = []
        self.tight: list[StageSearch] = []
        self.bound_s = math.inf
        self._passes: dict[int, float] = {}

    def run(self) -> Plan:
        shapes = self.problem.shapes
        heap = [_Entry(self._floor_s(shape), i, shape) for i, shape in enumerate(shapes)]
        heapq.heapify(heap)
        with tqdm(total=len(shapes), desc="planning", unit="shape", delay=2, leave=False, disable=not self._progress) as bar:
            while heap:
                entry = heapq.heappop(heap)
                if self.best is not None and entry.bound_s >= self.best.step_time_s * (1 - TOLERANCE):
                    heap.append(entry)
                    break
                if entry.search is None:
                    for search in self._searches(entry.shape):
                        if search.root_bound_s < math.inf:
                            heapq.heappush(heap, _Entry(search.root_bound_s, entry.order, entry.shape, search))
                        else:
                            self.tight.append(search)
                    bar.update()
                else:
                    self._solve(entry.search)
        if self.best is None:
            raise too_little_memory(self.problem, self.tight)
        self._fill_in(sorted(heap))
        return conclude(self.problem, self.best, self.tried, self.tight, self.bound_s, MAX_CANDIDATES)

    def _searches(self, shape: Shape) -> Iterator[StageSearch]:
        for chain in self.problem.chains(self.problem, shape):
            search = StageSearch(self.problem, shape, chain, self.prices)
            yield search
            # Later chains are slower and take less memory.
            if not search.is_short_of_memory:
                return

    def _solve(self, search: StageSearch) -> None:
        below_s = self.best.step_time_s if self.best else math.inf
        solution = search.solve(below_s, MAX_VISITS)
        if solution is not None:
            self.bound_s = min(self.bound_s, solution.bound_s)
            self.best = self._try(search, solution.pieces)
            self.tried.append(self.best)
        else:
            # It lost; the plan that its bounds point to stands for it among the candidates.
            self.tried.append(self._try(search, search.first()))

    def _try(self, search: StageSearch, pieces: tuple[Piece, ...]) -> Tried:
        return Tried.of(self.problem, search, pieces)

    def _floor_s(self, shape: Shape) -> float:
        """No plan of this shape is faster; see the module's docstring."""
        if shape.shards not in self._passes:
            alone = Shape(1, shape.data, 1, shape.microbatches, "1f1b", 0)
            cost = self.prices.cost(alone, Chain(), 0, Piece(0, len(self.problem.graph.blocks), "none"))
            self._passes[shape.shards] = cost.forward_s + cost.backward_s
        whole_s = self._passes[shape.shards] * (FLOOR_SHARE / shape.tensor if shape.tensor > 1 else 1.0)
        return whole_s / (1 - (1 - 1 / shape.microbatches) ** shape.pipeline)

    def _fill_in(self, left: list[_Entry]) -> None:
        """Give the ways to use the devices that were never looked at closely a simulated plan each, nearest first."""
        seen = {tried.group for tried in self.tried}
        for entry in left:
            group = (entry.shape.pipeline, entry.shape.data, entry.shape.tensor, entry.shape.zero)
            if group in seen or len(seen) >= MAX_CANDIDATES:
                continue
            seen.add(group)
            for search in [entry.search] if entry.search else self._searches(entry.shape):
                pieces = search.first()
                if pieces is None:
                    self.tight.append(search)
                else:
                    self.tried.append(self._try(search, pieces))
