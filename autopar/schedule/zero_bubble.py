"""Zero-bubble schedules: a backward in two halves, and the weight halves fill what would be bubbles.

A backward computes gradients of the stage's inputs, which the stage before waits for, and gradients of its weights, which
nobody waits for before the optimizer (Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2). F, I, W: forward,
input half, weight half.

- ZB-H1 (section 3.1): 1F1B in F and I, with each W of stage g put off by g microbatches, so that every stage holds
  activations for at most P microbatches, as many as the first stage of 1F1B. For T_F = T_I = T_W the bubble is
  (P - 1)(T_F + T_I - T_W), a third of 1F1B's.
- ZB-H2 (section 3.2): up to 2P - 1 microbatches have a weight half before them on every stage, so stage g runs
  2 (P - g) - 1 forwards before its first I, and W only when one more F would exceed that bound, or no F is left. For
  T_F = T_I = T_W and M >= 2P - 1 no stage ever waits between its first and its last instruction, for up to twice the
  activations of 1F1B's first stage.
- ZB-V (section 6, and Qi et al. 2024, Pipeline Parallelism with Controllable Memory, section 4): each group runs one
  stage on the way up and one on the way down, so the loss is computed on the group that has the first stage. For
  T_F = T_I = T_W and M >= 2P - 1 no group ever waits between its first and its last instruction, with the activations
  of 1F1B's first stage on every group. Group g starts g slots after the first.
"""

from __future__ import annotations

from collections.abc import Iterator

from .instructions import BackwardInput, BackwardWeight, Forward

Half = Forward | BackwardInput | BackwardWeight


def zero_bubble_h1(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Half]:
    """min(P - g, M) forwards, then I and F in turn with each W g microbatches after its I."""
    depth = min(num_groups - group, microbatches)
    for m in range(depth):
        yield Forward(group, m)
    for m in range(microbatches):
        yield BackwardInput(group, m)
        if m >= group:
            yield BackwardWeight(group, m - group)
        if m + depth < microbatches:
            yield Forward(group, m + depth)
    for m in range(max(0, microbatches - group), microbatches):
        yield BackwardWeight(group, m)


def h1_deferred(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    return min(group + 1, microbatches)


def zero_bubble_h2(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Half]:
    """min(2 (P - g) - 1, M) forwards; then an I, a W where 2P - 1 forwards wait for theirs, and an F, in turn."""
    forwards = min(2 * (num_groups - group) - 1, microbatches)
    weights = 0
    for m in range(forwards):
        yield Forward(group, m)
    for m in range(microbatches):
        yield BackwardInput(group, m)
        if forwards == microbatches or forwards - weights == 2 * num_groups - 1:
            yield BackwardWeight(group, weights)
            weights += 1
        if forwards < microbatches:
            yield Forward(group, forwards)
            forwards += 1
    for m in range(weights, microbatches):
        yield BackwardWeight(group, m)


def h2_in_flight(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    return _most(zero_bubble_h2(group, num_groups, microbatches), Forward, BackwardInput)


def h2_deferred(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    return _most(zero_bubble_h2(group, num_groups, microbatches), BackwardInput, BackwardWeight)


def zero_bubble_v(group: int, num_groups: int, microbatches: int, virtual: int = 2) -> Iterator[Half]:
    """The order by hand of the appendix; microbatches beyond M are passed over where M is less than it needs."""
    up, down = group, 2 * num_groups - 1 - group
    full = max(2 * num_groups - 1, microbatches)
    later = num_groups - group
    count = {(kind, stage): 0 for kind in (Forward, BackwardInput, BackwardWeight) for stage in (up, down)}

    def run(*units: tuple[type, int]) -> Iterator[Half]:
        for kind, stage in units:
            m = count[kind, stage]
            count[kind, stage] += 1
            if m < microbatches:
                yield kind(stage, m)

    whole_up, whole_down = (
        [(kind, up) for kind in (BackwardInput, BackwardWeight)],
        [(kind, down) for kind in (BackwardInput, BackwardWeight)],
    )
    for _ in range(2 * later - 1):
        yield from run((Forward, up))
    for _ in range(group):
        yield from run((Forward, down), (Forward, up))
    for _ in range(later):
        yield from run((Forward, down), *whole_down)
    while count[Forward, down] < full:
        if count[Forward, up] < full:
            yield from run((Forward, up))
        yield from run(*whole_up, (Forward, down), *whole_down)
    for _ in range(group):
        yield from run((BackwardInput, up), (BackwardInput, down))
    for _ in range(later):
        yield from run(*whole_up)
    for stage in (down, up):
        while count[BackwardWeight, stage] < full:
            yield from run((BackwardWeight, stage))


def zero_bubble_v_in_flight(group: int, num_groups: int, microbatches: int, virtual: int = 2) -> int:
    return _most(zero_bubble_v(group, num_groups, microbatches), Forward, BackwardInput)


def zero_bubble_v_deferred(group: int, num_groups: int, microbatches: int, virtual: int = 2) -> int:
    return _most(zero_bubble_v(group, num_groups, microbatches), BackwardInput, BackwardWeight)


def v_shaped_forwards(group: int, num_groups: int, microbatches: int, virtual: int = 2) -> Iterator[Forward]:
    """Evaluation: forwards on the way up until the first comes back, then one of each in turn."""
    up, down = group, 2 * num_groups - 1 - group
    ahead = min(2 * (num_groups - group) - 1, microbatches)
    for m in range(ahead):
        yield Forward(up, m)
    for m in range(microbatches):
        yield Forward(down, m)
        if m + ahead < microbatches:
            yield Forward(up, m + ahead)


def _most(order: Iterator[Half], begins: type, ends: type) -> int:
    held = most = 0
    for instruction in order:
        held += isinstance(instruction, begins) - isinstance(instruction, ends)
        most = max(most, held)
    return most
