"""What every run of blocks costs as a stage, as arrays, from few questions to the cost model.

Blocks of one kind and layout that stand next to each other are a segment. A run's cost depends on how many blocks it
takes of its first segment and how many of its last, a and b, and is all but linear in both: prices add up block by
block, and what does not (the first block of a stage, buckets of gradients) shows at one or two blocks. So the cost
model is asked at the knots

    a, b in {1, 2, the most}                                                                       _knots

and what lies between is interpolated. Segments of up to three blocks, and runs at the knots, are therefore exact. The
stage search orders and bounds with these figures, and prices what it may return exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..cost.types import StageCost
from ..schedule.orders import schedule_named
from ..schedule.step_time import exposed_reduce_s
from ..simulate import at_rest_bytes

FIELDS = ("forward_s", "backward_s", "send_s", "tail_s", "rest_bytes", "gradient_bytes", "transient_bytes",
          "activation_bytes", "forward_peak_bytes", "backward_peak_bytes", "buffers", "exists")  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Costs of blocks [start, stop) as one stage: arrays [start, stop].

    tail_s: what follows a stage's last backward, `reduce_model_s` apart, which may depend on where other stages lie.
    transient_bytes: `StageCost.unsharded_bytes`. buffers: whether gradients have buffers that stay (1.0 or 0.0).
    exists: 1.0 where there is such a run; elsewhere all is zero.
    """

    forward_s: np.ndarray
    backward_s: np.ndarray
    send_s: np.ndarray
    tail_s: np.ndarray
    rest_bytes: np.ndarray
    gradient_bytes: np.ndarray
    transient_bytes: np.ndarray
    activation_bytes: np.ndarray
    forward_peak_bytes: np.ndarray
    backward_peak_bytes: np.ndarray
    buffers: np.ndarray
    exists: np.ndarray

    def peak_bytes(self, schedule: str, stage: int, num_stages: int, microbatches: int) -> np.ndarray:
        """`simulate.stage_peak_bytes` of every run."""
        held = schedule_named(schedule).in_flight(stage, num_stages, microbatches)
        transient = np.maximum(self.forward_peak_bytes, self.backward_peak_bytes)
        full = held * self.activation_bytes + transient
        drained = self.gradient_bytes + (held - 1) * self.activation_bytes + self.backward_peak_bytes
        fixed = self.rest_bytes + self.transient_bytes
        if microbatches > held:
            return fixed + full
        return fixed + np.where(self.buffers > 0, full, np.maximum(full, drained) - self.gradient_bytes)


def figures(cost: StageCost) -> tuple[float, ...]:
    """`FIELDS` of one stage."""
    return (
        cost.forward_s,
        cost.backward_s,
        cost.send_s,
        exposed_reduce_s(cost) - cost.reduce_model_s + cost.optimizer_s,
        at_rest_bytes(cost),
        cost.gradient_bytes,
        cost.unsharded_bytes,
        cost.activation_bytes,
        cost.forward_peak_bytes,
        cost.backward_peak_bytes,
        float(cost.has_gradient_buffers),
        1.0,
    )


def make_runs(
    kinds: Sequence[object], starts: range, stops: range, most_blocks: int, ask: Callable[[int, int], StageCost]
) -> Runs:
    """The runs [start, stop) of at most `most_blocks` blocks whose ends are among `starts` and `stops`.

    kinds: per block; equal neighbours are one segment. ask: the cost of one run.
    """
    num_blocks = len(kinds)
    table = np.zeros((len(FIELDS), num_blocks + 1, num_blocks + 1))
    segments = _segments(kinds)
    for first, (low, high) in enumerate(segments):
        for last in range(first, len(segments)):
            if last == first:
                _within(table, low, high, starts, stops, most_blocks, ask)
            elif segments[last][0] - high + 2 <= most_blocks:
                _across(table, (low, high), segments[last], starts, stops, most_blocks, ask)
    return Runs(*table)


def _segments(kinds: Sequence[object]) -> list[tuple[int, int]]:
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    return list(zip(edges, edges[1:], strict=False))


def _within(table, low: int, high: int, starts: range, stops: range, most_blocks: int, ask) -> None:
    """Runs inside one segment, which their length alone tells apart."""
    ends = [(a, b) for a in starts if low <= a < high for b in stops if a < b <= min(high, a + most_blocks)]
    if not ends:
        return
    example = {b - a: (a, b) for a, b in reversed(ends)}
    lengths = sorted(example)
    knots = _knots(lengths)
    known = np.array([figures(ask(*example[n])) for n in knots])
    filled = (_weights(lengths, knots) @ known).T
    number = {n: i for i, n in enumerate(lengths)}
    rows, columns = np.array(ends).T
    table[:, rows, columns] = filled[:, [number[b - a] for a, b in ends]]


def _across(table, first: tuple[int, int], last: tuple[int, int], starts: range, stops: range, most: int, ask) -> None:
    """Runs that begin in one segment and end in another."""
    (low, high), (after, end) = first, last
    begins = [high - a for a in starts if low <= a < high]
    finishes = [b - after for b in stops if after < b <= end]
    if not begins or not finishes:
        return
    begins.sort()
    between = after - high
    # Only what a stage can be: the longest runs would leave the other stages without blocks.
    begins = [a for a in begins if a + between + finishes[0] <= most]
    if not begins:
        return
    finishes = [b for b in finishes if begins[0] + between + b <= most]
    across, along = _knots(begins), _knots(finishes)
    known = np.array([[figures(ask(high - a, after + b)) for b in along] for a in across])
    filled = np.einsum("ak,klf,bl->fab", _weights(begins, across), known, _weights(finishes, along))
    rows = high - np.array(begins)
    columns = after + np.array(finishes)
    fits = np.add.outer(begins, finishes) + between <= most
    table[:, rows[:, None], columns[None, :]] = np.where(fits, filled, 0.0)


def _knots(values: Sequence[int]) -> list[int]:
    return sorted({*values[:2], values[-1]})


def _weights(values: Sequence[int], knots: Sequence[int]) -> np.ndarray:
    """[value, knot]: linear interpolation, exact at the knots."""
    return np.array([np.interp(values, knots, unit) for unit in np.eye(len(knots))]).T
