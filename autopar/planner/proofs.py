"""The bound of the space of planner/broad.py: the least over all shapes, each refined only as far as it holds the rest down.

Of t model ranks none takes less than a t-th of what one rank would take alone, with its data ranks where they are, and
none keeps less. With C, a and tau of that rank for a microbatch, its forward computed again and what follows the last
backward, P stages and M microbatches, k = 1 / (1 - (1 - 1/M)^P) and q = (1 - 1/M)^(P - 1): weighing the work bounds of
planner/stages.py, T >= sum_{j<s} c_j + M c_s + t_s, with k (1 - 1/M)^(P - 1 - s) / M, which sum to one,

    (1)  T >= k (C + a + q tau / M) / t                                                                  `_alone_s`
    (2)  T >= the root of the stage table of that rank, over t; of t = 1 it is the shape's own            `_table_s`
    (3)  T >= k (q V + (1 - q) W / t), V: what no layouts within memory take of a microbatch with its share of what comes once
         per step (`LayoutChains.least_s`), W of that the microbatch alone                                 `_laid_out_s`

V and W may also be those of a divisor of t, in microbatches of the same data ranks that are as large or larger: all ranks
together take no less where they are more, and rows no less in smaller microbatches                               `_served_s`

A shape starts with the bound of planner/outlines.py and gets these in turn when it is the least of all; the work is counted,
so that answers are deterministic, and where the count is used up the least bound stands.

C is that of the rank alone, or that with what blocks take more because no layout of t ranks is faster, and its traffic over
data as if that hid behind the compute of the whole batch: with compute c a transfer g makes c + g - o min(g, c), which grows
with c, while what is seen of it falls.

Assumed: what planner/floors.py assumes, with its slacks where there is a model axis.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..cost.types import StageCost
from ..schedule.orders import schedule_named
from ..schedule.step_time import exposed_reduce_s
from .floors import MEMORY_SLACK, TIME_SLACK
from .pricing import Piece, StagePrices
from .problem import Chain, Problem, Shape
from .shapes import LoneShape
from .stages import StageSearch, Ways

# Work of the refinements, in questions to the cost model, near enough.
ALONE, SERVED, LAID_OUT, TABLE, LEARN = 2, 10, 30, 30, 60


class LoneSearch(StageSearch):
    """The stages of one rank of a shape, alone. lifts_s: what blocks take more, per microbatch."""

    def __init__(self, problem: Problem, shape: Shape, prices: StagePrices, lifts_s: np.ndarray) -> None:
        self._tensor, self._ends_s = shape.tensor, np.concatenate([[0.0], np.cumsum(lifts_s)])
        super().__init__(problem, LoneShape.of(shape), Chain(), prices)

    def _limit(self) -> float:
        return self.problem.memory_limit_bytes * self._tensor / MEMORY_SLACK

    def _best_ways(self, stage: int) -> Ways:
        found = super()._best_ways(stage)
        more_s = self._ends_s[None, self.stops(stage)] - self._ends_s[self.starts(stage), None]
        return replace(found, backward_s=found.backward_s + np.maximum(0.0, more_s))

    def _cycle_s(self, way: Ways, stage: int, trip_s: np.ndarray) -> float:
        """Which of the passes takes more is not known."""
        return 0.0


@dataclass(order=True, slots=True)
class _Open:
    """A shape with its bound, and how many of the refinements it has had. order: ties go to the first come."""

    bound_s: float
    order: int
    shape: Shape = field(compare=False)
    again: float = field(compare=False)
    level: int = field(compare=False, default=0)


class Proof:
    """Bounds of the shapes of one problem.

    least: what no layouts beat, as (tensor, shards, per block the seconds of all ranks of a replica for the whole batch).
    """

    def __init__(self, problem: Problem, prices: StagePrices) -> None:
        self.problem, self._prices = problem, prices
        self._limit_bytes = problem.memory_limit_bytes
        self._choices = problem.recompute_choices
        self._asked: dict[tuple, StageCost] = {}
        self._blocks: dict[int, np.ndarray] = {}
        self._served: dict[Shape, float] = {}
        self.least: dict[tuple[int, int], np.ndarray] = {}
        self._open: list[Shape] = []
        self.left = 0

    def bound_s(self, shapes: Sequence[Shape], bounds_s: np.ndarray, again: np.ndarray, best_s: float) -> float:
        """No plan of these shapes is faster; no more is looked for than `best_s`.

        bounds_s: of each shape; again: the share of the forward that it computes again at least.
        """
        heap = [
            _Open(float(bounds_s[i]), int(i), shapes[i], float(again[i]))
            for i in np.flatnonzero((bounds_s < best_s) & np.isfinite(bounds_s))
        ]
        heapq.heapify(heap)
        self.prepare([one.shape for one in heap])
        closed_s = math.inf
        while heap and heap[0].bound_s < min(best_s, closed_s):
            one = heapq.heappop(heap)
            refinements = self.refinements(one.shape)
            if one.level == len(refinements):
                closed_s = one.bound_s
                continue
            refine, work = refinements[one.level]
            if self.left < work:
                closed_s = one.bound_s
                continue
            self.left -= work
            bound_s = max(one.bound_s, refine(one.shape, one.again, best_s))
            heapq.heappush(heap, replace(one, bound_s=bound_s, level=one.level + 1))
        return min(closed_s, best_s, *(one.bound_s for one in heap[:1]))

    def prepare(self, shapes: Sequence[Shape]) -> None:
        """Let these shapes say which microbatches matter."""
        self._open = list(shapes)

    def refinements(self, shape: Shape) -> list[tuple[Callable[[Shape, float, float], float], int]]:
        """Bounds to be asked for in turn, with the work of each."""
        if shape.tensor == 1:
            return [(self._alone_s, ALONE), (self._table_s, TABLE)]
        coarse, fine = (
            0 if key in self.least else LEARN for key in (self._coarse(shape), (shape.tensor, shape.shards))
        )
        tables = [(self._table_s, TABLE)] if shape.pipeline > 1 else []
        return [
            (self._alone_s, ALONE),
            (self._served_s, coarse + (ALONE if self._like(shape) in self._served else SERVED)),
            *tables,
            (self._laid_out_s, fine + LAID_OUT),
            *tables,
        ]

    def _coarse(self, shape: Shape) -> tuple[int, int]:
        """The known degree and microbatches that serve a shape best, or which to learn: the largest microbatches that matter
        of its degree."""
        serving = [(t, shards) for t, shards in self.least if shape.tensor % t == 0 and self._serves(shards, shape)]
        wanted = [one.shards for one in self._open if one.tensor == shape.tensor and self._serves(one.shards, shape)]
        return max(serving) if serving else (shape.tensor, min(wanted))

    def _like(self, shape: Shape) -> Shape:
        """One stage of that degree and microbatches, on the same data ranks."""
        tensor, shards = self._coarse(shape)
        return Shape(1, shape.data, tensor, shards // shape.data, shape.schedule, self._zero(shape))

    @staticmethod
    def _serves(shards: int, shape: Shape) -> bool:
        """Whether a shape's data ranks have microbatches so large."""
        return shards <= shape.shards and shards % shape.data == 0

    # -- (1)

    def _alone_s(self, shape: Shape, again: float, best_s: float) -> float:
        lifts_s = float(self._lifts_s(shape).sum())
        own = self._cost(shape, shape.microbatches, shape.zero, self._choices[0])
        more_s, tail_s = 0.0, _tail_s(own)
        if again > 0:
            slower = self._cost(shape, shape.microbatches, shape.zero, self._choices[-1])
            more_s, tail_s = again * (slower.backward_s - own.backward_s), _tail_s(slower)
        found_s = self._spread_s(shape, _pass_s(own) + more_s, tail_s)
        if lifts_s > 0 and (hidden := self._hidden_s(shape, lifts_s)) is not None:
            found_s = max(found_s, self._spread_s(shape, hidden[0] + more_s, hidden[1]))
        return found_s

    def _hidden_s(self, shape: Shape, lifts_s: float) -> tuple[float, float] | None:
        """C and tau where blocks take `lifts_s` more, with what is seen of the traffic beside the compute of a whole batch;
        None if that may be less compute."""
        plain = self._cost(shape, shape.microbatches, 0, self._choices[0])
        whole, traffic = (self._cost(shape, 1, zero, self._choices[0]) for zero in (0, shape.zero))
        slower = self._cost(shape, 1, shape.zero, self._choices[-1])
        pass_s, count = _pass_s(plain) + lifts_s, shape.microbatches
        if pass_s - whole.backward_s / count > whole.forward_s or pass_s - whole.forward_s / count > whole.backward_s:
            return None
        return pass_s + max(0.0, _pass_s(traffic) - _pass_s(whole)), _tail_s(slower)

    def _spread_s(self, shape: Shape, pass_s: float, tail_s: float) -> float:
        """Bound (1) of these C and tau."""
        weight, share = _weights(shape)
        slack = TIME_SLACK if shape.tensor > 1 else 1.0
        return slack * weight * (pass_s + share * tail_s / shape.microbatches) / shape.tensor

    def _cost(self, shape: Shape, microbatches: int, zero: int, recompute: str) -> StageCost:
        """Of all blocks on one rank, alone."""
        zero = min(zero, self._zero(shape)) if zero == shape.zero else zero
        lone = replace(LoneShape.of(shape), pipeline=1, microbatches=microbatches, zero=zero)
        key = (lone, recompute)
        if key not in self._asked:
            num_blocks = len(self.problem.graph.blocks)
            self._asked[key] = self._prices.cost(lone, Chain(), 0, Piece(0, num_blocks, recompute))
        return self._asked[key]

    def _zero(self, shape: Shape) -> int:
        """The level that the shape runs at: some stacks keep parameters whole in pipelines (`Constants.pipeline_keeps`)."""
        constants = getattr(self.problem.costs, "constants", None)
        keeps = constants is not None and constants.pipeline_keeps
        return 1 if keeps and shape.zero == 3 and shape.pipeline > 1 and shape.microbatches > 1 else shape.zero

    # -- what layouts add

    def _lifts_s(self, shape: Shape) -> np.ndarray:
        """Per block, what it takes more of all ranks of a replica, per microbatch, than of one alone."""
        return np.maximum(0.0, self._lifted_s(shape) - self._blocks_s(shape.shards))

    def _lifted_s(self, shape: Shape) -> np.ndarray:
        """Per block, what it takes of all ranks of a replica at least, per microbatch, as far as is known."""
        serving = [
            least_s / shape.shards
            for (tensor, shards), least_s in self.least.items()
            if shape.tensor % tensor == 0 and shape.shards >= shards
        ]
        return np.max(serving, axis=0) if serving else np.zeros(len(self.problem.graph.blocks))

    def _blocks_s(self, shards: int) -> np.ndarray:
        """Per block, a microbatch of one of `shards` shares of the batch on one rank, alone, as a stage of its own."""
        if shards not in self._blocks:
            blocks, known = self.problem.graph.blocks, {}
            last = len(blocks) - 1
            for block in blocks:
                if block.kind not in known:
                    stage, index = int(block.index > 0), block.index
                    shape = Shape(stage + (index < last) + 1, shards, 1, 1, "1f1b", 0)
                    cost = self._prices.cost(shape, Chain(), stage, Piece(index, index + 1, self._choices[0]))
                    known[block.kind] = _pass_s(cost)
            self._blocks[shards] = np.array([known[block.kind] for block in blocks])
        return self._blocks[shards]

    def learn(self, tensor: int, shards: int) -> None:
        """What no layouts of so many ranks beat."""
        if (tensor, shards) not in self.least:
            seconds = self.problem.chains.pass_s(self.problem, tensor, shards)
            self.least[tensor, shards] = np.array(seconds) * shards * tensor

    # -- (2) and (3)

    def _table_s(self, shape: Shape, again: float, best_s: float) -> float:
        if shape.tensor == 1:
            return StageSearch(self.problem, shape, Chain(), self._prices).root_bound_s
        lifts_s = self._lifts_s(shape)
        if shape.zero > 1 and not self._all_hidden(shape):
            lifts_s = np.zeros(len(lifts_s))
        return TIME_SLACK * LoneSearch(self.problem, shape, self._prices, lifts_s).root_bound_s / shape.tensor

    def _all_hidden(self, shape: Shape) -> bool:
        """Whether no more of the traffic over data hides however long blocks take."""
        seen = [
            _pass_s(self._cost(shape, count, shape.zero, self._choices[0]))
            - _pass_s(self._cost(shape, count, 0, self._choices[0]))
            for count in (shape.microbatches, 1)
        ]
        return seen[0] <= seen[1] * (1 + 1e-6)

    def _served_s(self, shape: Shape, again: float, best_s: float) -> float:
        """Bounds (1) and (3), by what no layouts beat of a divisor of the degree in microbatches that are as large or larger:
        fewer of them take no longer."""
        self.learn(*self._coarse(shape))
        like = self._like(shape)
        if like not in self._served:
            self._served[like] = self.problem.chains.least_s(self.problem, like, math.inf, math.inf)
        least_s = self._served[like] * like.microbatches * like.tensor / (shape.microbatches * shape.tensor)
        return max(self._alone_s(shape, again, best_s), self._weighed_s(shape, least_s))

    def _laid_out_s(self, shape: Shape, again: float, best_s: float) -> float:
        """Bounds (1) and (3), by layouts of the shape's own."""
        self.learn(shape.tensor, shape.shards)
        in_flight = schedule_named(shape.schedule).in_flight
        held = [in_flight(stage, shape.pipeline, shape.microbatches) for stage in range(shape.pipeline)]
        # Where all forwards come first no gradients lie beside all activations, unless they are reduced.
        is_late = shape.data == 1 and shape.microbatches <= held[0]
        most_bytes = math.inf if is_late else self._limit_bytes * sum(1 / k for k in held) / MEMORY_SLACK
        enough_s = best_s / max(self._weighed_s(shape, 1.0) - self._weighed_s(shape, 0.0), 1e-30)
        found_s = self.problem.chains.least_s(
            self.problem, replace(shape, zero=self._zero(shape)), most_bytes, enough_s
        )
        return max(self._alone_s(shape, again, best_s), self._weighed_s(shape, found_s))

    def _weighed_s(self, shape: Shape, least_s: float) -> float:
        """Bound (3) of this V."""
        weight, share = _weights(shape)
        pass_s = float(self._lifted_s(shape).sum()) / shape.tensor
        return TIME_SLACK * weight * (share * least_s + (1 - share) * pass_s)


def _weights(shape: Shape) -> tuple[float, float]:
    """k and q."""
    left = 1 - 1 / shape.microbatches
    return 1 / (1 - left**shape.pipeline), left ** (shape.pipeline - 1)


def _pass_s(cost: StageCost) -> float:
    return cost.forward_s + cost.backward_s


def _tail_s(cost: StageCost) -> float:
    return exposed_reduce_s(cost) + cost.optimizer_s
