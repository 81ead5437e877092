"""Interleaved 1F1B (Narayanan et al. 2021, Megatron-LM, section 2.2.2): group g runs stages g, g + P, g + 2P, ...

Microbatches go in rounds. A group runs the forwards of a round stage by stage, all its microbatches on the lowest stage
first, and the backwards likewise from the highest stage down; 1F1B alternates over these two sequences. A bubble costs
1/V of what it costs with one stage per group: (P - 1)(f + b) for forwards f and backwards b of one *small* stage.

The paper's rounds are of P microbatches, and M is a multiple of P. Here M is any number: it is cut into max(1, M // P)
rounds whose sizes differ by one at most, so a multiple of P gives the paper's order.
"""

from __future__ import annotations

from collections.abc import Iterator

from .instructions import Backward, Forward


def interleaved(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Forward | Backward]:
    """Warm-up forwards, then a forward and a backward in turn, then the remaining backwards."""
    forwards = list(_units(group, num_groups, microbatches, virtual, up=True))
    backwards = list(_units(group, num_groups, microbatches, virtual, up=False))
    warmup = _warmup(group, num_groups, microbatches, virtual)
    for stage, m in forwards[:warmup]:
        yield Forward(stage, m)
    for ahead, behind in zip(forwards[warmup:], backwards, strict=False):
        yield Forward(*ahead)
        yield Backward(*behind)
    for stage, m in backwards[len(forwards) - warmup :]:
        yield Backward(stage, m)


def interleaved_forwards(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Forward]:
    """Evaluation."""
    for stage, m in _units(group, num_groups, microbatches, virtual, up=True):
        yield Forward(stage, m)


def interleaved_in_flight(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    """The warm-up, and the one forward that comes before each backward."""
    return min(_warmup(group, num_groups, microbatches, virtual) + 1, microbatches * virtual)


def _warmup(group: int, num_groups: int, microbatches: int, virtual: int) -> int:
    longest = max(map(len, _rounds(num_groups, microbatches)))
    return min((virtual - 1) * longest + 2 * (num_groups - 1 - group), microbatches * virtual)


def _units(group: int, num_groups: int, microbatches: int, virtual: int, up: bool) -> Iterator[tuple[int, int]]:
    """(stage, microbatch) in the order of the group's forwards (up) or backwards."""
    laps = range(virtual) if up else reversed(range(virtual))
    stages = [lap * num_groups + group for lap in laps]
    for members in _rounds(num_groups, microbatches):
        for stage in stages:
            for m in members:
                yield stage, m


def _rounds(num_groups: int, microbatches: int) -> list[range]:
    count = max(1, microbatches // num_groups)
    cuts = [k * microbatches // count for k in range(count + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
