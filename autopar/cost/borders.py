"""What ranks that split space pay besides their share: messages to neighbours, and a copy of the input with its borders.

A rank copies its part of an op's input between the borders that it fetches, and what autograd keeps is that copy. Borders
go both ways at once, as one message in time; in the backward their gradients go the other way. Places outside of the
whole, which only the outermost ranks fill in, are taken to be as wide as a border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..graph import Op, Tensor
from ..sharding.placement import Split
from ..sharding.rules_window import HALO, TAPS
from ..sharding.strategy import Strategy
from .kernels import Kernel


def copies_input(strategies: Sequence[Strategy]) -> bool:
    """Whether the op reads a copy of its first input: between borders, or shifted by taps of a kernel."""
    return any(strategy.special in (HALO, TAPS) for strategy in strategies)


def widening(strategies: Sequence[Strategy], tensor: Tensor) -> float:
    """How many times a rank's part of the op's input `tensor` it holds with the borders of all axes."""
    return math.prod(1 + s.border_bytes * s.degree / tensor.size_bytes for s in strategies if s.border_bytes)


def border_bytes(op: Op, strategies: Sequence[Strategy], axis: int, shards: int) -> float:
    """What one rank fetches along one axis in the forward."""
    others = [s.degree for i, s in enumerate(strategies) if i != axis and isinstance(s.inputs[0], Split)]
    return strategies[axis].border_bytes / shards / math.prod(others)


def copy_kernels(
    strategies: Sequence[Strategy], tensor: Tensor, part_bytes: float
) -> tuple[list[Kernel], list[Kernel]]:
    """(forward, backward) of copying `part_bytes` of the input in between its borders, once per axis, and back."""
    axes = sum(strategy.special in (HALO, TAPS) for strategy in strategies)
    amount = part_bytes * (1 + widening(strategies, tensor))
    kernel = Kernel("copy", amount, amount, "", launches=4)  # the rank's own, two borders, what is filled in
    return [kernel] * axes, [kernel] * axes if tensor.requires_grad else []
