"""What a rank holds at once, as counts that do not depend on costs: its peak memory by one product of matrices.

Walking a rank's compute order, count for each of its stages the microbatches in flight, the input halves that wait for
their weight half, and whether a backward has begun (then gradients exist). Each instruction gives a row of counts, of
which few are distinct; the peak of a plan is the largest row times bytes. `program_peak_bytes` of the simulator says the
same, instruction by instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autopar.cost.types import StageCost

from .instructions import BackwardInput, BackwardWeight, Forward
from .orders import schedule_named

# A schedule with whole rounds of as many microbatches as groups repeats itself; from so many rounds on nothing new comes.
_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Residency:
    """rows: [distinct moment, five columns per stage of the group]: microbatches in flight, weight halves that wait, whether
    gradients exist, and whether its forward, or its backward, is what runs."""

    rows: np.ndarray

    def peak_bytes(self, costs: Sequence[StageCost]) -> int:
        """Peak bytes of one rank whose stages cost that, in ascending order; `simulate.program_peak_bytes`."""
        fixed = 0
        column: list[list[int]] = [[], [], [], [], []]
        for cost in costs:
            # Gradients that have buffers stay from step to step.
            stays = cost.has_gradient_buffers
            fixed += cost.parameter_bytes + cost.optimizer_bytes + (cost.gradient_bytes if stays else 0)
            column[0].append(cost.activation_bytes)
            column[1].append(cost.deferred_bytes)
            column[2].append(0 if stays else cost.gradient_bytes)
            column[3].append(cost.unsharded_bytes + cost.forward_peak_bytes)
            column[4].append(cost.unsharded_bytes + cost.backward_peak_bytes)
        return fixed + max(0, int((self.rows @ np.array(sum(column, []), dtype=np.int64)).max()))


@lru_cache(maxsize=4096)
def residency(schedule: str, num_groups: int, microbatches: int, virtual: int, group: int) -> Residency:
    """What ranks of `group` hold in a training step of a schedule that flushes."""
    chosen = schedule_named(schedule)
    assert chosen.flushes, schedule
    most = _ROUNDS * num_groups
    # GPipe holds all microbatches; interleaved rounds are of other sizes where the groups do not divide the microbatches.
    if schedule != "gpipe" and microbatches > most and (chosen.virtual or microbatches % num_groups == 0):
        microbatches = most
    mine = [s for s in range(num_groups * virtual) if chosen.group_of(s, num_groups) == group]
    place = {stage: i for i, stage in enumerate(mine)}
    held, waiting, begun = ([0] * virtual for _ in range(3))
    # Of moments that differ in one stage's microbatches in flight alone, the fullest is enough.
    rows: dict[tuple, int] = {}

    def note(column: int, at: int) -> None:
        running = [0] * (2 * virtual)
        running[column * virtual + at] = 1
        key = (*held[1:], *waiting, *begun, *running)
        rows[key] = max(rows.get(key, 0), held[0])

    for instruction in chosen.order(group, num_groups, microbatches, virtual):
        kind, at = type(instruction), place[instruction.stage]
        if kind is Forward:
            held[at] += 1
            note(0, at)
            continue
        note(1, at)
        begun[at] = 1
        if kind is BackwardWeight:
            waiting[at] -= 1
        else:
            held[at] -= 1
            waiting[at] += kind is BackwardInput
        note(1, at)
    return Residency(np.array([(first, *rest) for rest, first in rows.items()], dtype=np.int64))
