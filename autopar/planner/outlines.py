"""What a chain of layouts costs in outline, from a handful of stage costs, and what that makes of many shapes at once.

With w_S the time of a forward and backward of one of S equal parts of the batch, of all blocks on one data rank, and P
stages, D data ranks, M microbatches, S = D M,

    pass    w_S = w + W / S, from two values of S              w: what comes with each microbatch however small it is
    work    C = (w_S + 2 (P - 1) h + z) / P                    h: handing a boundary on, z: ZeRO's traffic    `estimate`
    step    T ~ C (u (M - 1) + P) + tail / P                   tail: the optimizer, and reductions not hidden

where u >= 1 is what the fullest stage takes of an even share, blocks being whole. Without h, z and tail, and with W_1 = w_1
for S w_S, two bounds follow: rows never take less time in smaller microbatches; the fullest stage computes all microbatches; and
the work bound of planner/stages.py is least where stages get shorter by 1 - 1/M,

    T >= u W_1 / (P D)        T >= (W_1 / S) / (1 - (1 - 1/M)^P)                                              `bound`

Memory: R bytes at rest, A kept per microbatch, K_s microbatches in flight on stage s. Spread evenly, the first stage holds
(R + K_0 A) / P. However they are spread, a limit L on every stage asks for

    R + K_{P-1} A <= P L      and      R / K_0 + A <= L sum_s 1 / K_s                                   as in floors.py

else blocks recompute, those that must, for their forward; where even all of them do not free enough nothing fits.

Of T tensor ranks whose layouts are not known yet: on each, a T-th, and what has to move at least if a block's work is
shared out, its boundary there and back in both passes, or its parameters twice and their gradients once

    sum over blocks of min(4 boundary / S, 3 parameters) / bandwidth                                          `_moved_s`

Assumed: what planner/floors.py assumes. All arrays are over shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..cost.collectives import collective_s
from ..cost.types import StageCost
from ..schedule.orders import schedule_named
from ..simulate import at_rest_bytes
from .floors import MEMORY_SLACK, TIME_SLACK
from .pricing import Piece, StagePrices
from .problem import Chain, Problem, Shape

# A size at which bandwidth counts and latency does not.
UNIT_BYTES = 2.0**26
# What hides of a gradient reduction behind the last backward, in estimates.
HIDDEN = 0.7


@dataclass(frozen=True)
class ShapeArrays:
    """Shapes as arrays, one entry each. first_held, last_held: microbatches that the first and the last stage hold at most;
    inverse_held: the sum over stages of one by what they hold."""

    shapes: Sequence[Shape]
    pipeline: np.ndarray
    data: np.ndarray
    tensor: np.ndarray
    microbatches: np.ndarray
    zero: np.ndarray
    first_held: np.ndarray
    last_held: np.ndarray
    inverse_held: np.ndarray

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> ShapeArrays:
        known: dict[tuple, tuple[int, int, float]] = {}
        for shape in shapes:
            key = (shape.schedule, shape.pipeline, shape.microbatches)
            if key not in known:
                in_flight = schedule_named(shape.schedule).in_flight
                held = [in_flight(s, shape.pipeline, shape.microbatches) for s in range(shape.pipeline)]
                known[key] = held[0], held[-1], sum(1 / k for k in held)
        held_by = [known[shape.schedule, shape.pipeline, shape.microbatches] for shape in shapes]
        fields = ("pipeline", "data", "tensor", "microbatches", "zero")
        degrees = (np.array([getattr(shape, name) for shape in shapes]) for name in fields)
        return cls(shapes, *degrees, *np.array(held_by, dtype=float).reshape(-1, 3).T)

    def part(self, index: np.ndarray) -> ShapeArrays:
        """The shapes with these numbers."""
        arrays = (self.pipeline, self.data, self.tensor, self.microbatches, self.zero)
        held = (self.first_held, self.last_held, self.inverse_held)
        return ShapeArrays([self.shapes[i] for i in index], *(array[index] for array in (*arrays, *held)))

    @property
    def shards(self) -> np.ndarray:
        return self.data * self.microbatches

    @cached_property
    def storages(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The distinct (data, zero), and which of them each shape has."""
        numbers = {
            pair: i for i, pair in enumerate(dict.fromkeys(zip(self.data.tolist(), self.zero.tolist(), strict=True)))
        }
        pairs = zip(self.data.tolist(), self.zero.tolist(), strict=True)
        return list(numbers), np.array([numbers[pair] for pair in pairs], dtype=int)

    @cached_property
    def depths(self) -> tuple[list[int], np.ndarray]:
        """The distinct numbers of stages, and which of them each shape has."""
        found, which = np.unique(self.pipeline, return_inverse=True)
        return found.tolist(), which


@dataclass(frozen=True, slots=True)
class Rest:
    """Per data degree and ZeRO level, of the whole model on one rank: bytes at rest, of gradients among them, and those that
    lie whole while blocks compute; seconds per microbatch that ZeRO adds; of the optimizer, and of the reduction over
    data. Of many shapes, arrays."""

    held_bytes: float | np.ndarray
    gradient_bytes: float | np.ndarray
    passing_bytes: float | np.ndarray
    extra_s: float | np.ndarray
    optimizer_s: float | np.ndarray
    reduce_s: float | np.ndarray


class Outline:
    """One chain of a tensor degree, priced as one stage in microbatches of two sizes.

    shards: into how many parts the batch is cut for the larger one. like: another outline of the degree, in proportion to
    which what lies at rest is estimated.
    """

    def __init__(
        self,
        problem: Problem,
        prices: StagePrices,
        tensor: int,
        chain: Chain,
        shards: int,
        like: Outline | None = None,
    ) -> None:
        self.problem, self.prices, self.tensor, self.chain, self._like = problem, prices, tensor, chain, like
        self.rows = problem.graph.batch_size
        self.shards = shards if shards * 4 <= self.rows else _divisor_at_most(self.rows, max(1, self.rows // 16))
        choices = problem.recompute_choices
        self.large, self.again = (self._cost(1, self.shards, 0, choice) for choice in (choices[0], choices[-1]))
        self.small = self._cost(1, self.rows, 0, choices[0])
        self._rests: dict[tuple[int, int], Rest] = {}
        self._fullest: dict[int, float] = {}

    @property
    def pass_s(self) -> float:
        """Forward and backward of the larger microbatch."""
        return self.large.forward_s + self.large.backward_s

    def rest(self, data: int, zero: int) -> Rest:
        key = (data, zero)
        if key not in self._rests and self._like is not None:
            share = at_rest_bytes(self.small) / max(at_rest_bytes(self._like.small), 1)
            theirs = self._like.rest(data, zero)
            self._rests[key] = Rest(*(share * getattr(theirs, one.name) for one in fields(Rest)))
        if key not in self._rests:
            cost = self._cost(data, self.rows // data, zero, self.problem.recompute_choices[0])
            extra_s = cost.forward_s + cost.backward_s - self.small.forward_s - self.small.backward_s
            self._rests[key] = Rest(
                at_rest_bytes(cost), cost.gradient_bytes, cost.unsharded_bytes, max(0.0, extra_s), cost.optimizer_s,
                cost.reduce_s,
            )  # fmt: skip
        return self._rests[key]

    def _cost(self, data: int, microbatches: int, zero: int, recompute: str) -> StageCost:
        shape = Shape(1, data, self.tensor, microbatches, "1f1b", zero)
        piece = Piece(0, len(self.problem.graph.blocks), recompute)
        return self.prices.cost(shape, self.chain, 0, piece)

    @cached_property
    def _block_s(self) -> np.ndarray:
        """Per block its part of `pass_s`."""
        blocks, found = self.problem.graph.blocks, []
        known: dict[tuple, float] = {}
        last = len(blocks) - 1
        for block in blocks:
            index = block.index
            key = (block.kind, self.chain.rows(index, index + 1))
            if key not in known:
                stage = int(index > 0)
                shape = Shape(stage + (index < last) + 1, 1, self.tensor, self.shards, "1f1b", 0)
                choice = self.problem.recompute_choices[0]
                cost = self.prices.cost(shape, self.chain, stage, Piece(index, index + 1, choice))
                known[key] = cost.forward_s + cost.backward_s
            found.append(known[key])
        return np.array(found) * (self.pass_s / max(sum(found), 1e-30))

    def fullest(self, stages: int) -> float:
        """u: what the fullest of so many stages takes at least, as a multiple of an even share."""
        if stages not in self._fullest:
            ends_s = np.concatenate([[0.0], np.cumsum(self._block_s)])
            low_s, high_s = max(ends_s[-1] / stages, self._block_s.max()), ends_s[-1]
            for _ in range(20):
                middle_s, reached = (low_s + high_s) / 2, 0
                for _ in range(stages):
                    reached = int(np.searchsorted(ends_s, ends_s[reached] + middle_s, side="right")) - 1
                fits = reached == len(ends_s) - 1
                low_s, high_s = (low_s, middle_s) if fits else (middle_s, high_s)
            self._fullest[stages] = low_s * stages / max(ends_s[-1], 1e-30)
        return self._fullest[stages]

    @cached_property
    def _send_s(self) -> tuple[float, float]:
        """Handing the boundary in the middle to the next stage: of the larger and the smaller microbatch."""
        num_blocks = len(self.problem.graph.blocks)
        pipeline = self.problem.cluster.world_size // self.tensor
        if num_blocks < 2 or pipeline < 2:
            return 0.0, 0.0
        piece = Piece(0, num_blocks // 2, self.problem.recompute_choices[0])
        large, small = (
            self.prices.cost(Shape(pipeline, 1, self.tensor, parts, "1f1b", 0), self.chain, 0, piece).send_s
            for parts in (self.shards, self.rows)
        )
        return large, small

    @cached_property
    def _moved(self) -> list[tuple[float, float, int]]:
        """Bytes of the boundary behind a block, for the whole batch, and of its parameters, and how many such blocks."""
        tensors, found = self.problem.graph.tensors, Counter()
        for block in self.problem.graph.blocks:
            boundary = sum(tensors[name].size_bytes for name in block.outputs)
            found[boundary, sum(tensors[name].size_bytes for name in block.parameters)] += 1
        return [(*sizes, count) for sizes, count in found.items()]

    def _moved_s(self, tensor: int, shards: np.ndarray) -> np.ndarray:
        """Seconds per microbatch that `tensor` ranks need at least to share out the work of blocks."""
        if tensor == 1:
            return np.zeros(len(shards))
        cluster, ranks = self.problem.cluster, tuple(range(tensor))
        latency_s = collective_s(cluster, "all_gather", 0.0, ranks)
        byte_s = (collective_s(cluster, "all_gather", UNIT_BYTES, ranks) - latency_s) / UNIT_BYTES
        seconds = np.zeros(len(shards))
        for boundary, parameters, count in self._moved:
            seconds += count * (4 * latency_s + byte_s * np.minimum(4 * boundary / shards, 3 * parameters))
        return seconds

    # -- many shapes at once; all are of this tensor degree

    def _microbatch_s(self, large_s: float, small_s: float, shards: np.ndarray) -> np.ndarray:
        """Of something that takes large_s and small_s for the two sizes of microbatches."""
        if self.shards == self.rows:
            return np.full(len(shards), large_s)
        whole_s = max(0.0, large_s - small_s) / (1 / self.shards - 1 / self.rows)
        return np.maximum(0.0, small_s - whole_s / self.rows) + whole_s / shards

    def estimate(self, some: ShapeArrays) -> tuple[np.ndarray, np.ndarray]:
        """Expected step seconds within memory, infinite where nothing is expected to fit; and without a limit of it.

        Shapes of a multiple of this tensor degree are taken to share everything out over their ranks.
        """
        part, tensor = self.tensor / some.tensor, int(some.tensor[0])
        shards, stages, count = some.shards, some.pipeline, some.microbatches
        rests = self._rests_of(some)
        extra_s, optimizer_s, reduce_s = part * rests.extra_s, part * rests.optimizer_s, part * rests.reduce_s
        large, small = self.large, self.small
        forward_s = part * self._microbatch_s(large.forward_s, small.forward_s, shards)
        last_s = part * self._microbatch_s(large.backward_s, small.backward_s, shards)
        pass_s = forward_s + last_s + self._moved_s(tensor, shards) - self._moved_s(self.tensor, shards)
        held, kept, least = (part * size for size in self._memory(some, rests))
        peak_bytes = part * max(large.forward_peak_bytes, large.backward_peak_bytes) * self.shards / shards
        passing = peak_bytes + rests.passing_bytes
        room = ((self.problem.memory_limit_bytes - passing) * stages - held) / some.first_held
        limited_s = pass_s + self._share_again(kept, least, room) * forward_s
        besides_s = extra_s + 2 * (stages - 1) * self._microbatch_s(*self._send_s, shards)
        tail_s = optimizer_s / stages + np.maximum(0.0, reduce_s - HIDDEN * last_s) / stages
        times = (self._fullest_of(some) * (count - 1) + stages) / stages
        return (limited_s + besides_s) * times + tail_s, (pass_s + besides_s) * times + tail_s

    def recomputed(self, some: ShapeArrays) -> np.ndarray:
        """Of the outline without a model axis: the share of the forward that plans of these shapes compute again at least;
        infinite where none fits."""
        assert self.tensor == self.shards == 1
        rests = self._rests_of(some)
        held, kept, least = self._memory(some, rests)
        # Where all forwards come first no gradients lie beside all activations, unless they are reduced.
        late = (some.data == 1) & (some.microbatches <= some.first_held)
        held = held - np.where(late, rests.gradient_bytes, 0.0)
        limit = self.problem.memory_limit_bytes * some.tensor / MEMORY_SLACK
        room = np.minimum(
            (limit * some.pipeline - held) / some.last_held, limit * some.inverse_held - held / some.first_held
        )
        return self._share_again(kept, least, room)

    def bound(self, some: ShapeArrays, whole_s: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Of the outline without a model axis: no plan of these shapes takes fewer seconds, however it is laid out,
        because no layout keeps less than its share; infinite where none fits.

        whole_s: what the batch takes at least, of all ranks of a replica together. share: as `recomputed` says.
        """
        part = TIME_SLACK / some.tensor
        pass_s = part * (whole_s + share * self.large.forward_s)
        spread_s = pass_s / some.shards / (1 - (1 - 1 / some.microbatches) ** some.pipeline)
        # Which blocks recompute is not known, so what the fullest stage takes is counted without.
        fullest_s = self._fullest_of(some) * part * self.pass_s / some.data / some.pipeline
        fullest_s = np.maximum(fullest_s, part * whole_s / some.data / some.pipeline)
        return np.maximum(spread_s, np.where(np.isinf(share), math.inf, fullest_s))

    def least_bytes(self, some: ShapeArrays) -> np.ndarray:
        """Bytes of the fullest rank if everything is spread evenly and recomputed."""
        held, _, least = self._memory(some, self._rests_of(some))
        return (held + least * some.first_held) / some.pipeline

    def _rests_of(self, some: ShapeArrays) -> Rest:
        """Of each shape, in arrays."""
        pairs, which = some.storages
        rests = [self.rest(data, zero) for data, zero in pairs]
        return Rest(*(np.array([getattr(rest, one.name) for rest in rests])[which] for one in fields(Rest)))

    def _fullest_of(self, some: ShapeArrays) -> np.ndarray:
        depths, which = some.depths
        return np.array([self.fullest(stages) for stages in depths])[which]

    def _memory(self, some: ShapeArrays, rests: Rest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """R, A as it is and A recomputed: of all stages of a replica together, on one rank of each."""
        held = rests.held_bytes
        kept, least = self.large.activation_bytes, self.again.activation_bytes
        return held, kept * self.shards / some.shards, least * self.shards / some.shards

    @staticmethod
    def _share_again(kept: np.ndarray, least: np.ndarray, room: np.ndarray) -> np.ndarray:
        """The share of the blocks that must be computed again; infinite where all of them are not enough."""
        excess = np.maximum(0.0, kept - room)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(excess > 0, excess / (kept - least), 0.0)
        return np.where((share >= 0) & (share <= 1), share, math.inf)


def _divisor_at_most(value: int, most: int) -> int:
    return next(d for d in range(most, 0, -1) if value % d == 0)
