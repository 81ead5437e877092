"""A tensor on several mesh axes at once: how its cuts nest, and how its placement changes, axis by axis.

A tensor lies by one placement per axis, listed outermost axis first (the axis of the batch before the model axes).
Splits of different dims do not meet. Splits of one dim nest: fewer blocks lie outside of more blocks, and of equal
blocks the first axis cuts first, so that the second cuts what the first has left. In *absolute* form every split says
its blocks as seen from the whole tensor: of two axes of 2 ranks that both split dim 0, the second has S0/2. In this form
axes are independent: a collective on one axis leaves the others' parts what they are, as long as the cuts nest before
and after. Hence a change of several placements is a path through states whose cuts nest; `changes` finds the cheapest.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..graph import Shape
from .placement import REPLICATED, Action, Placement, Split, conversion

Places = tuple[Placement, ...]

# Elements that a rank sends, as a share of the whole tensor on the axis (an all-to-all: divided by the ranks).
_TRAFFIC: dict[Action, float] = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True, slots=True)
class Change:
    """One conversion, on one axis or on adjacent axes that change alike and act as one.

    axes: positions among the placements. have, want: the placement on these axes, before and after, where several axes
        are one in the terms of that one axis. have_blocks, want_blocks: blocks of these splits in what other axes leave.
    before, after: the absolute placements on all axes.
    """

    axes: tuple[int, ...]
    have: Placement
    want: Placement
    have_blocks: int
    want_blocks: int
    before: Places
    after: Places


def absolute(places: Sequence[Placement], degrees: Sequence[int]) -> Places:
    """The placements with every split's blocks as seen from the whole tensor."""
    found: list[Placement] = []
    for i, place in enumerate(places):
        if isinstance(place, Split):
            outer = math.prod(n for other, n in zip(places[:i], degrees[:i], strict=True) if other == place)
            place = Split(place.dim, place.blocks * outer)
        found.append(place)
    return tuple(found)


def nests(shape: Shape, state: Places, degrees: Sequence[int]) -> bool:
    """Whether the cuts of an absolute state can be made together."""
    outer: dict[int, int] = {}
    cuts = [(p.blocks, p.dim, n) for p, n in zip(state, degrees, strict=True) if isinstance(p, Split) and n > 1]
    for blocks, dim, degree in sorted(cuts):
        if blocks % outer.get(dim, 1):
            return False
        outer[dim] = blocks * degree
    return all(shape[dim] % size == 0 for dim, size in outer.items())


@lru_cache(maxsize=100_000)
def changes(
    shape: Shape, have: Places, want: Places, degrees: tuple[int, ...], num_batch: int = 1
) -> tuple[Change, ...]:
    """The conversions that take a tensor of `shape` from `have` to `want`, cheapest first by the elements they move.

    have, want: per axis; both must nest. num_batch: how many of the first axes are not communicated on (the batch).
    """
    groups = _groups(have, want, num_batch)
    joint = tuple(math.prod(degrees[i] for i in group) for group in groups)
    start = absolute([have[group[0]] for group in groups], joint)
    goal = absolute([want[group[0]] for group in groups], joint)
    assert nests(shape, start, joint) and nests(shape, goal, joint), (shape, have, want, degrees)
    steps = _cheapest(shape, start, goal, joint, num_batch)
    found = []
    state = start
    for k, place in steps:
        after = (*state[:k], place, *state[k + 1 :])
        blocks = [_blocks_left(p, k, s, joint) for p, s in ((state[k], state), (place, after))]
        spread = [_spread(s, groups, degrees) for s in (state, after)]
        found.append(Change(groups[k], state[k], place, *blocks, *spread))
        state = after
    return tuple(found)


def _groups(have: Places, want: Places, num_batch: int) -> list[tuple[int, ...]]:
    """Axes that change alike act as one; the batch axis stays alone."""
    groups: list[tuple[int, ...]] = []
    for i, pair in enumerate(zip(have, want, strict=True)):
        last = groups[-1][0] if groups else -1
        if i > num_batch and last >= num_batch and pair == (have[last], want[last]) and pair[0] != pair[1]:
            groups[-1] += (i,)
        else:
            groups.append((i,))
    return groups


def _spread(state: Places, groups: Sequence[tuple[int, ...]], degrees: Sequence[int]) -> Places:
    """The absolute placements on all axes where groups of axes act as one."""
    found: list[Placement] = []
    for place, group in zip(state, groups, strict=True):
        found += absolute([place] * len(group), [degrees[i] for i in group])
    return tuple(found)


def _blocks_left(place: Placement, axis: int, state: Places, degrees: Sequence[int]) -> int:
    """Blocks of a split in what the other axes leave of the tensor: those outside of it cut its blocks."""
    if not isinstance(place, Split):
        return 1
    cut = math.prod(
        degrees[j]
        for j, other in enumerate(state)
        if j != axis and isinstance(other, Split) and other.dim == place.dim and other.blocks < place.blocks
    )
    assert place.blocks % cut == 0, (place, state)
    return place.blocks // cut


def _cheapest(
    shape: Shape, start: Places, goal: Places, degrees: tuple[int, ...], num_batch: int
) -> list[tuple[int, Placement]]:
    """(axis, next placement) along the cheapest path of states that nest (Dijkstra)."""
    changed = [k for k in range(len(start)) if start[k] != goal[k]]
    if len(changed) < 2:
        return [(k, goal[k]) for k in changed]
    best = {start: (0.0, 0)}
    came: dict[Places, tuple[Places, int]] = {}
    queue = [(0.0, 0, 0, start)]
    number = 0
    while queue:
        moved, length, _, state = heapq.heappop(queue)
        if state == goal:
            break
        if (moved, length) > best[state]:
            continue
        for k, place in _moves(state, goal, num_batch):
            after = (*state[:k], place, *state[k + 1 :])
            if not nests(shape, after, degrees):
                continue
            cost = (moved + (_traffic(state, k, place, degrees) if k >= num_batch else 0.0), length + 1)
            if after not in best or cost < best[after]:
                best[after] = cost
                came[after] = (state, k)
                number += 1
                heapq.heappush(queue, (*cost, number, after))
    steps = []
    state = goal
    while state != start:
        before, k = came[state]
        steps.append((k, state[k]))
        state = before
    return steps[::-1]


def _moves(state: Places, goal: Places, num_batch: int) -> Iterator[tuple[int, Placement]]:
    for k, (place, wanted) in enumerate(zip(state, goal, strict=True)):
        if place != wanted:
            yield k, wanted
        # A cut may stand in the way of another axis; it is undone first and made again afterwards.
        if isinstance(place, Split) and k >= num_batch and wanted != REPLICATED:
            yield k, REPLICATED


def _traffic(state: Places, k: int, want: Placement, degrees: Sequence[int]) -> float:
    """Elements moved by one conversion, forward and backward, as a share of the tensor."""
    have = state[k]
    whole = 1 / math.prod(
        n for j, (p, n) in enumerate(zip(state, degrees, strict=True)) if j != k and isinstance(p, Split)
    )
    actions = conversion(have, want)
    total = 0.0
    for action in (actions.forward, actions.backward):
        total += _TRAFFIC.get(action, 0.0) * whole / (degrees[k] if _exchanges(have, want, degrees[k]) else 1)
    return total


def _exchanges(have: Placement, want: Placement, degree: int) -> bool:
    """Whether a split becomes another without gathering the whole: other dims, or one inside the other."""
    if not isinstance(have, Split) or not isinstance(want, Split):
        return False
    low, high = sorted((have.blocks, want.blocks))
    return have.dim != want.dim or high % (low * degree) == 0
