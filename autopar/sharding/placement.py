"""Placements of a tensor on one mesh axis, and the conversions between them.

Each placement states the forward value and the gradient together (they come in dual pairs):

| placement       | forward value on each rank | gradient on each rank |
|-----------------|----------------------------|-----------------------|
| Split(d, k)     | a slice along dim d        | the same slice        |
| REPLICATED      | the whole                  | the whole             |
| PARTIAL         | a summand of the whole     | the whole             |
| SHARED          | the whole                  | a summand of the whole|

`Split(dim, blocks)` views dim as (blocks, n, rest) and gives rank r the part [:, r]: `blocks=1` is the ordinary
contiguous split; `blocks=B` splits the inner factor of a merged dim `(b s)`, and `blocks=3` splits each third of a
fused query-key-value projection alike. torch calls the latter a strided shard with split_factor = blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True, slots=True)
class Split:
    dim: int
    blocks: int = 1

    def __str__(self) -> str:
        return f"S{self.dim}" if self.blocks == 1 else f"S{self.dim}/{self.blocks}"


@dataclass(frozen=True, slots=True)
class Whole:
    """A placement other than a split; the three instances are REPLICATED, PARTIAL and SHARED."""

    token: Literal["R", "P", "H"]

    def __str__(self) -> str:
        return self.token


Placement = Split | Whole
REPLICATED = Whole("R")
PARTIAL = Whole("P")
SHARED = Whole("H")


def parse_placement(token: str) -> Placement:
    """The inverse of `str(placement)`; ValueError for anything else."""
    for whole in (REPLICATED, PARTIAL, SHARED):
        if token == whole.token:
            return whole
    if token[:1] == "S":
        dim, _, blocks = token[1:].partition("/")
        if dim.isdecimal() and (blocks == "" or blocks.isdecimal()):
            return Split(int(dim), int(blocks or 1))
    raise ValueError(f"not a placement: {token!r}; expected R, P, H, S<dim> or S<dim>/<blocks>")


Action = Literal["", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "slice", "pad", "mask"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a change of placement does, forward and backward. "slice", "pad" and "mask" are local and move no bytes.

    "pad": the slice in its place, zeros elsewhere (split -> summand of the whole).
    "mask": the value on rank 0 of the axis, zeros elsewhere (whole -> summand of the whole), so that the sum is exact.
    """

    forward: Action
    backward: Action


@cache
def conversion(have: Placement, want: Placement) -> Conversion:
    """The communication that turns `have` into `want`; defined for every pair of placements of one tensor.

    The backward column follows from duality: it takes a gradient placed as `want`'s to one placed as `have`'s.
    """
    if have == want:
        return Conversion("", "")
    if isinstance(have, Split) and isinstance(want, Split):
        return Conversion("all_to_all", "all_to_all")
    if isinstance(have, Split):
        return {
            REPLICATED: Conversion("all_gather", "slice"),
            SHARED: Conversion("all_gather", "reduce_scatter"),
            PARTIAL: Conversion("pad", "slice"),
        }[want]
    if isinstance(want, Split):
        return {
            REPLICATED: Conversion("slice", "all_gather"),
            PARTIAL: Conversion("reduce_scatter", "all_gather"),
            SHARED: Conversion("slice", "pad"),
        }[have]
    return {
        (REPLICATED, SHARED): Conversion("", "all_reduce"),
        (REPLICATED, PARTIAL): Conversion("mask", ""),
        (PARTIAL, REPLICATED): Conversion("all_reduce", ""),
        (PARTIAL, SHARED): Conversion("all_reduce", "all_reduce"),
        (SHARED, REPLICATED): Conversion("", "mask"),
        (SHARED, PARTIAL): Conversion("mask", "mask"),
    }[(have, want)]
