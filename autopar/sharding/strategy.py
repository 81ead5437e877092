"""One way to run an op on one mesh axis: what the rules enumerate, the solver picks from and the runtime executes."""

from __future__ import annotations

from dataclasses import dataclass

from .placement import Placement


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one op runs on an axis of n ranks.

    key: names the choice in a plan file: "-" (the op does not use the axis: everything replicated), "shared"
        (everything whole forward and a summand backward), "partial:<i>" (a pending sum of input i passes through),
        "<dim>" or "<dim>@<blocks>" (a named dim of the op's rule is split).
    inputs: the placement that each tensor argument must have, aligned with `Op.inputs`.
    outputs: the placement that each output has, aligned with `Op.outputs`.
    work: the share of the whole op's compute done by each rank (1/n for a split, 1 for replicated compute).
    special: name of the local algorithm that replaces the op ("vocab_cross_entropy", ...), "" for the op itself.
    collective_bytes: bytes each rank contributes to small all-reduces inside a special algorithm, forward, at the
        global shape.
    collectives: in how many all-reduces these bytes are sent.
    border_bytes: bytes that a rank fetches from its two neighbours in the forward, as many as it gives back in the
        backward, at the global shape of what is not split.
    degree: ranks that the op is split over; 1 where every rank runs the whole op.
    """

    key: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    work: float
    special: str = ""
    collective_bytes: int = 0
    border_bytes: int = 0
    collectives: int = 1
    degree: int = 1
