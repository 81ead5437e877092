"""Rows of the batch: which of them one data rank computes in each microbatch, equal shares or not.

The batch is seen as `units` equal runs of rows, so long that every rank's part of a microbatch is a whole number of
them. With equal shares a unit is one such part. Everything that asks how the batch may be cut (batch_layout,
strategies) is asked for `units`; what asks for sizes is told of how many such parts the batch would consist (`parts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ..plan import Plan, Stage

Parts = int | Fraction
"""Into how many parts of one size a dim is cut; a Fraction where the whole is no multiple of the part."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What one data rank has of the batch: in each microbatch of `per_microbatch` units, `length` from `start` on."""

    microbatches: int
    per_microbatch: int
    start: int
    length: int

    @property
    def units(self) -> int:
        return self.microbatches * self.per_microbatch

    @property
    def parts(self) -> Parts:
        return parts_of(self.units, self.length)

    def first(self, microbatch: int) -> int:
        """The first unit of this rank's part of a microbatch."""
        return microbatch * self.per_microbatch + self.start

    def of_global(self, num_rows: int) -> tuple[int, int, int]:
        """(rows of a microbatch, this rank's first, how many) for a batch of `num_rows`."""
        per_unit = num_rows // self.units
        return per_unit * self.per_microbatch, per_unit * self.start, per_unit * self.length


def rows_of(plan: Plan, stage: Stage, data_rank: int) -> Rows:
    """The rows of one data rank of a stage."""
    shares = stage_shares(stage) or (1,) * stage.data
    return Rows(plan.microbatches, sum(shares), sum(shares[:data_rank]), shares[data_rank])


def stage_shares(stage: Stage) -> tuple[int, ...]:
    """Units of a microbatch per data rank; () where they are equal."""
    unit = math.gcd(*stage.shares)
    return tuple(share // unit for share in stage.shares)


def stage_units(plan: Plan, stage: Stage) -> int:
    """Into how many units the stage's data ranks and microbatches cut the batch; equal shares: data x microbatches."""
    return rows_of(plan, stage, 0).units


def stage_parts(stage: Stage, microbatches: int, data_rank: int | None = None) -> Parts:
    """`Rows.parts` of a data rank, by default the one with the most rows. Its numerator divides `stage_units`."""
    if not stage.shares:
        return stage.data * microbatches
    share = max(stage.shares) if data_rank is None else stage.shares[data_rank]
    return parts_of(microbatches * sum(stage.shares), share)


def parts_of(whole: int, part: int) -> Parts:
    found = Fraction(whole, part)
    return found.numerator if found.denominator == 1 else found
