"""What the layout solver asks about prices: one protocol, answered by the cost model or by a test's table."""

from __future__ import annotations

from typing import Protocol

from ..graph import Op
from ..sharding.placement import Placement, Split
from ..sharding.strategy import Strategy

Seconds2 = tuple[float, float]


class LayoutCosts(Protocol):
    """Prices on one model axis, per rank; times for one microbatch, bytes for everything that is held at once.

    All times are (forward, backward). An infinite conversion time forbids that conversion.
    """

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        """The legal ways to run `op` on the axis; at least one, keys distinct."""
        ...

    def op_s(self, op: Op, strategy: Strategy) -> Seconds2:
        """Compute of `op` at `strategy.work`, with the small collectives inside a special algorithm."""
        ...

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> Seconds2:
        """Turning `tensor` from `have` into `want` and its gradient back; 0 where they are equal.

        What happens once per step (the all-reduce of the gradient of a replicated parameter that split ops use) is
        divided by the number of microbatches.
        """
        ...

    def rest_s(self, parameter: str, placement: Placement) -> float:
        """Time per microbatch that follows from the bytes at rest alone: optimizer, gradient reduction over data."""
        ...

    def rest_bytes(self, parameter: str, placement: Placement) -> float:
        """The parameter, its gradient and its optimizer state at rest."""
        ...

    def saved_bytes(self, tensor: str, placement: Placement) -> float:
        """Keeping `tensor` from the forward to the backward, over all microbatches in flight; 0 under recompute."""
        ...

    def saved_extra_bytes(self, op: Op, strategy: Strategy) -> float:
        """What autograd keeps for `op` besides its inputs and outputs (masks, statistics); 0 under recompute."""
        ...

    def input_bytes(self, tensor: str, placement: Placement) -> float:
        """Keeping a block's input until the block is computed again; 0 without recompute."""
        ...


def storage(placement: Placement) -> str:
    """Placements whose forward values are one and the same tensor on each rank share this name.

    A replicated and a shared tensor differ in their gradients only, so saving both keeps one storage.
    """
    if isinstance(placement, Split):
        return str(placement)
    return "partial" if placement.token == "P" else "whole"
