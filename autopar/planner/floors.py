"""Lower bounds of a shape's step time and memory from a handful of stage costs, so that most shapes need no more.

Time. With C the time of a microbatch through the whole model, P stages of times c_0 .. c_{P-1} that sum to at least
C, and M microbatches, the work bound of planner/stages.py is least when c_s = c_0 (1 - 1/M)^s, where it equals

    (1)  C / (1 - (1 - 1/M)^P)                                                                           _spread_s

Blocks are whole. If block b takes at least tau_b on t ranks, the work bound needs a way to cut the blocks into P stages
so that every stage s, behind stages that take p_s together, has p_s + M c_s <= T. Filling each stage as far as T lets
it is such a way if there is one, and T is found by bisection:

    (1')  the least T for which filling reaches the end                                                   _filled_s


Memory. Stage s has r_s bytes at rest and keeps a_s for each of its K_s microbatches in flight, K_0 >= K_1 >= ..;
these sum to at least R and A. If the fullest stage holds L = max_s (r_s + K_s a_s), then summing over s, as it is or
divided by K_s,

    (2)  R + K_{P-1} A <= P L        and        R / K_0 + A <= L sum_s 1 / K_s                     _most_kept_bytes

so a limit on L is one on A. Where the model's A exceeds it, blocks must recompute: those first that free most bytes
per second of forward (a fractional knapsack), and their forward adds to C. Where even recomputing all is not enough,
nothing fits.

Tensor axis of t ranks: C and tau are those of the fastest layouts at the largest share of the batch, where collectives
cost relatively least, or at the shape's own (`refined_s`, and everywhere on devices that are slower at large sizes, as
measured ones with caches are); bytes and recomputed forwards are at least a t-th.

Assumed of the cost model: cutting a stage in two never makes its parts cheaper together, ZeRO and recomputation never
make a stage faster, and the statements on the tensor axis hold up to the slacks below.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from ..cost.types import StageCost
from ..schedule.orders import schedule_named
from ..simulate import at_rest_bytes, stage_peak_bytes
from .pricing import Piece, StagePrices
from .problem import Chain, Problem, Shape

# Allowance for blocks that take less together than alone, and for rates that rise as shares of the batch get smaller.
TIME_SLACK = 0.98
# Allowance for bytes that single blocks count and a whole model does not, such as a tensor that two blocks both keep.
MEMORY_SLACK = 0.95


class Floors:
    """Floors of the shapes of one problem."""

    def __init__(self, problem: Problem, prices: StagePrices) -> None:
        self.problem, self.prices = problem, prices
        self.rates_fall = problem.cluster.device.rates_fall
        self._passes: dict[tuple[int, int], np.ndarray] = {}
        self._again: dict[Shape, float] = {}
        self._fillings: dict[tuple, float] = {}
        self._knapsacks: dict[tuple[int, int, int], list[tuple[float, float]]] = {}

    def time_s(self, shape: Shape) -> float:
        """No plan of this shape is faster; infinite if none fits in memory."""
        return self._spread_s(shape, shape.shards if self.rates_fall else 1)

    def refined_s(self, shape: Shape) -> float:
        """The same, closer, for the price of one layout solve per tensor degree and share of the batch."""
        return max(self._spread_s(shape, shape.shards), self._filled_s(shape))

    def chain_s(self, shape: Shape, chain: Chain) -> float:
        """No plan of this shape with these layouts is faster; infinite if none fits in memory. For two stage costs."""
        plain = self._whole(shape, self.problem.recompute_choices[0], chain)
        if not self.may_fit(shape, chain, self.problem.memory_limit_bytes):
            return math.inf
        if self.rates_fall and shape.pipeline > 1:
            # The gradients of all blocks together may be too large for a cache that those of a stage fit into.
            most_s = self._pass_s(shape.tensor, shape.shards).sum()
        else:
            most_s = TIME_SLACK * (plain.forward_s + plain.backward_s)
        excess_bytes = MEMORY_SLACK * plain.activation_bytes - self._most_kept_bytes(shape, plain, 1)
        if excess_bytes > 0:
            again = self._whole(shape, self.problem.recompute_choices[-1], chain)
            freed_bytes = plain.activation_bytes - again.activation_bytes
            most_s += self._recomputed_s(shape, excess_bytes) / shape.tensor if freed_bytes > 0 else math.inf
        return most_s / (1 - (1 - 1 / shape.microbatches) ** shape.pipeline)

    def _spread_s(self, shape: Shape, shards: int) -> float:
        if shape not in self._again:
            plain = self._whole(shape, self.problem.recompute_choices[0])
            excess_bytes = plain.activation_bytes - self._most_kept_bytes(shape, plain, shape.tensor)
            self._again[shape] = self._recomputed_s(shape, excess_bytes) if excess_bytes > 0 else 0.0
        pass_s = self._pass_s(shape.tensor, shards).sum() * shards / shape.shards
        most_s = pass_s + self._again[shape] / shape.tensor
        return most_s / (1 - (1 - 1 / shape.microbatches) ** shape.pipeline) + self._tail_s(shape)

    def _filled_s(self, shape: Shape) -> float:
        """Bound (1')."""
        key = (shape.pipeline, shape.tensor, shape.shards, shape.microbatches)
        if key not in self._fillings:
            blocks_s = self._pass_s(shape.tensor, shape.shards)
            ends_s = np.concatenate([[0.0], np.cumsum(blocks_s)])
            low_s = ends_s[-1] * shape.microbatches / shape.pipeline
            high_s = ends_s[-1] * shape.microbatches
            for _ in range(20):
                middle_s = (low_s + high_s) / 2
                reached, stages = 0, 0
                while reached < len(blocks_s) and stages < shape.pipeline:
                    most_s = ends_s[reached] + (middle_s - ends_s[reached]) / shape.microbatches
                    reached = int(np.searchsorted(ends_s, most_s, side="right")) - 1
                    stages += 1
                if reached < len(blocks_s):
                    low_s = middle_s
                else:
                    high_s = middle_s
            self._fillings[key] = low_s
        return self._fillings[key]

    def _pass_s(self, tensor: int, shards: int) -> np.ndarray:
        """Least forward and backward seconds per block of a microbatch of one of `shards` shares of the batch."""
        if (tensor, shards) not in self._passes:
            seconds = self.problem.chains.pass_s(self.problem, tensor, shards)
            self._passes[tensor, shards] = TIME_SLACK * np.array(seconds)
        return self._passes[tensor, shards]

    def _tail_s(self, shape: Shape) -> float:
        """What follows the last backward where all blocks are one stage."""
        if shape.pipeline > 1:
            return 0.0
        whole = self._whole(shape, self.problem.recompute_choices[0])
        return TIME_SLACK * (max(0.0, whole.reduce_s - whole.reduce_overlap_s) + whole.optimizer_s) / shape.tensor

    def memory_bytes(self, shape: Shape, chain: Chain | None = None) -> float:
        """No plan of this shape (with these layouts) has a fullest rank with less."""
        least = self._whole(shape, self.problem.recompute_choices[-1], chain)
        held = self._in_flight(shape)
        rest_bytes, kept_bytes = self._rest_bytes(shape, least), least.activation_bytes
        passing_bytes = self._passing_bytes(shape, chain) if chain else 0.0
        by_sum = (rest_bytes + held[-1] * kept_bytes + passing_bytes) / shape.pipeline
        by_share = ((rest_bytes + passing_bytes) / held[0] + kept_bytes) / sum(1 / k for k in held)
        return MEMORY_SLACK * max(by_sum, by_share) / (1 if chain else shape.tensor)

    def _passing_bytes(self, shape: Shape, chain: Chain) -> float:
        """What comes and goes on stages while a block of the commonest kind runs, summed over those that must have one.

        Blocks of one kind stand together as far as this counts: a stage without any takes at least one other block.
        """
        blocks = self.problem.graph.blocks
        kind, count = Counter(block.kind for block in blocks).most_common(1)[0]
        index = [block.index for block in blocks if block.kind == kind][count // 2]
        cost = self._block(shape, index, self.problem.recompute_choices[-1], chain)
        stages = max(1, shape.pipeline - (len(blocks) - count))
        return stages * (max(cost.forward_peak_bytes, cost.backward_peak_bytes) + cost.unsharded_bytes)

    def may_fit(self, shape: Shape, chain: Chain, limit_bytes: float) -> bool:
        """False only if every plan of this shape with these layouts needs more than `limit_bytes` somewhere."""
        return self.memory_bytes(shape, chain) <= limit_bytes and self._have_room(shape, chain, limit_bytes)

    def _have_room(self, shape: Shape, chain: Chain, limit_bytes: float) -> bool:
        """Whether the stages together have room for all blocks of the commonest kind, recomputed as far as may be.

        What a stage needs grows with each such block by what the second one adds to the first.
        """
        blocks = self.problem.graph.blocks
        kind, count = Counter(block.kind for block in blocks).most_common(1)[0]
        mine = [block.index for block in blocks if block.kind == kind]
        index = mine[count // 2 - 1] if count > 1 else -1
        if count < 4 or index + 1 not in mine:
            return True
        choice = self.problem.recompute_choices[-1]
        one, two = (self._block(shape, index, choice, chain, blocks=n) for n in (1, 2))
        limit_bytes, room = limit_bytes / MEMORY_SLACK, 0
        for stage in range(shape.pipeline):
            first_bytes, second_bytes = (
                stage_peak_bytes(cost, shape.schedule, stage, shape.pipeline, shape.microbatches) for cost in (one, two)
            )
            if first_bytes <= limit_bytes:
                each_bytes = max(1, second_bytes - first_bytes)
                room += 1 + int((limit_bytes - first_bytes) / each_bytes)
        return room >= count

    def _most_kept_bytes(self, shape: Shape, cost: StageCost, ranks: int) -> float:
        """What a microbatch may keep over all stages and `ranks` ranks of each under the memory limit, by (2)."""
        limit_bytes = self.problem.memory_limit_bytes * ranks / MEMORY_SLACK
        held, rest_bytes = self._in_flight(shape), self._rest_bytes(shape, cost)
        by_sum = (shape.pipeline * limit_bytes - rest_bytes) / held[-1]
        return min(by_sum, limit_bytes * sum(1 / k for k in held) - rest_bytes / held[0])

    def _rest_bytes(self, shape: Shape, cost: StageCost) -> int:
        """What lies at rest beside all microbatches in flight: gradients too, unless all forwards come first."""
        gradients_early = cost.has_gradient_buffers or shape.microbatches > self._in_flight(shape)[0]
        return at_rest_bytes(cost) - (0 if gradients_early else cost.gradient_bytes)

    def _recomputed_s(self, shape: Shape, excess_bytes: float) -> float:
        """The least forward time that recomputation adds per microbatch to free so much; infinite if it cannot."""
        seconds = 0.0
        for freed_bytes, forward_s in self._knapsack(shape):
            if freed_bytes >= excess_bytes:
                return seconds + forward_s * excess_bytes / freed_bytes
            excess_bytes -= freed_bytes
            seconds += forward_s
        return math.inf

    def _knapsack(self, shape: Shape) -> list[tuple[float, float]]:
        """(bytes freed, seconds) of recomputing all blocks of each kind, the best value first."""
        key = (shape.data, shape.microbatches, shape.zero)
        if key not in self._knapsacks:
            found = []
            blocks = self.problem.graph.blocks
            for kind, count in Counter(block.kind for block in blocks).items():
                index = next(block.index for block in blocks if block.kind == kind)
                costs = [self._block(shape, index, choice) for choice in self.problem.recompute_choices]
                freed_bytes = (costs[0].activation_bytes - costs[-1].activation_bytes) / MEMORY_SLACK
                if freed_bytes > 0:
                    found.append((count * freed_bytes, count * max(0.0, costs[-1].backward_s - costs[0].backward_s)))
            self._knapsacks[key] = sorted(found, key=lambda item: item[1] / item[0])
        return self._knapsacks[key]

    def _block(
        self, shape: Shape, index: int, recompute: str, chain: Chain | None = None, blocks: int = 1
    ) -> StageCost:
        """One block (or a few) as a stage of its own, in a pipeline as short as it can stand in."""
        last = len(self.problem.graph.blocks) - blocks
        stage = int(index > 0)
        tensor = shape.tensor if chain else 1
        alone = Shape(stage + (index < last) + 1, shape.data, tensor, shape.microbatches, "1f1b", shape.zero)
        return self.prices.cost(alone, chain or Chain(), stage, Piece(index, index + blocks, recompute))

    def _whole(self, shape: Shape, recompute: str, chain: Chain | None = None) -> StageCost:
        """The whole model as one stage: with these layouts, or without a tensor axis."""
        alone = Shape(1, shape.data, shape.tensor if chain else 1, shape.microbatches, "1f1b", shape.zero)
        return self.prices.cost(alone, chain or Chain(), 0, Piece(0, len(self.problem.graph.blocks), recompute))

    def _in_flight(self, shape: Shape) -> list[int]:
        in_flight = schedule_named(shape.schedule).in_flight
        return [in_flight(s, shape.pipeline, shape.microbatches) for s in range(shape.pipeline)]
