"""The best layouts of consecutive blocks: a shortest path over the states of the boundaries between them.

With V_b[p, q] the optimum of block b that is entered in state p and left in state q,

    F_start[p] = 0 for the allowed entry states
    F_{b+1}[q] = min_p F_b[p] + V_b[p, q]                                      _shortest_path
    answer     = min over the allowed exit states of F_stop

Elimination gives a whole V at once. Where a block is too wide for it, the V are integer programs, which are solved
lazily: an entry not yet solved is replaced by its lower bound max(V_b[p, *], V_b[*, q]), a program with the other side
left free; the path found on the bounds is then solved block by block, and the search is repeated until every entry on
the best path is exact. As bounds only rise, that path is optimal.

Parameters that several blocks use have one placement at rest in all of them: `chain_layouts` enumerates these outside
(they are few: a tied embedding), and counts their bytes and what follows from them once.

A memory weight makes the Lagrangian of a memory bound; `chain_frontier` finds all efficient (time, memory) pairs that
some weight makes optimal, by the dichotomy of Aneja and Nair (Management Science 25, 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..plan import Layout
from ..sharding.placement import REPLICATED, Placement
from .layout_options import LayoutOptions, State

# Joint placements of shared parameters that are enumerated at most; beyond it they are improved one at a time.
MAX_SHARED = 64


@dataclass(frozen=True, slots=True)
class ChainSolution:
    """Layouts of blocks [start, stop) and the states of their boundaries (one more than blocks).

    time_s: per microbatch and rank, forward and backward; memory_bytes: as `LayoutCosts` counts them.
    exact: no other choice has a lower objective_s = time_s + memory_weight * memory_bytes (false only where more shared
    parameters than can be enumerated were improved one at a time).
    """

    layouts: tuple[Layout, ...]
    boundaries: tuple[State, ...]
    shared_parameters: Mapping[str, Placement]
    time_s: float
    memory_bytes: float
    objective_s: float
    exact: bool


def chain_layouts(
    options: LayoutOptions,
    start: int,
    stop: int,
    entry: State | None = None,
    exit: State | None = None,
    shared_parameters: Mapping[str, Placement] | None = None,
    memory_weight: float = 0.0,
) -> ChainSolution:
    """The best layouts of blocks [start, stop).

    entry, exit: states of boundaries `start` and `stop`; None lets the solver choose among `options.states`.
    shared_parameters: placements at rest that are given; the others are chosen.
    ValueError: an empty or impossible range, a state that is not among the boundary's.
    """
    blocks = options.graph.blocks
    if not 0 <= start < stop <= len(blocks):
        raise ValueError(f"blocks [{start}, {stop}) of {len(blocks)}: expected 0 <= start < stop <= {len(blocks)}")
    for boundary, state in ((start, entry), (stop, exit)):
        if state is not None and state not in options.states(boundary):
            known = ", ".join("(" + " ".join(map(str, s)) + ")" for s in options.states(boundary))
            raise ValueError(f"boundary {boundary} cannot be in state ({' '.join(map(str, state))}); expected {known}")
    given = dict(shared_parameters or {})
    free = [
        name
        for name in options.graph.shared_parameters
        if name not in given and any(name in block.parameters for block in blocks[start:stop])
    ]

    def solve(shared: Mapping[str, Placement]) -> _Path | None:
        return _best_path(options, start, stop, entry, exit, {**given, **shared}, memory_weight)

    candidates = {name: options.candidates(name) for name in free}
    exact = math.prod(map(len, candidates.values())) <= MAX_SHARED
    if exact:
        tried = [solve(dict(zip(free, joint, strict=True))) for joint in itertools.product(*candidates.values())]
        best = min((t for t in tried if t is not None), key=lambda t: t.objective_s, default=None)
    else:
        best = _improve_one_at_a_time(solve, candidates)
    if best is None:
        raise ValueError(f"blocks [{start}, {stop}): every layout needs a conversion of infinite cost")
    return _along(options, start, best, memory_weight, exact)


def chain_table(
    options: LayoutOptions,
    start: int,
    stop: int,
    shared_parameters: Mapping[str, Placement] | None = None,
    memory_weight: float = 0.0,
) -> dict[tuple[State, State], ChainSolution]:
    """`chain_layouts` for every pair of an entry and an exit state: what adjacent stages need in order to agree."""
    pairs = itertools.product(options.states(start), options.states(stop))
    return {
        (entry, exit): chain_layouts(options, start, stop, entry, exit, shared_parameters, memory_weight)
        for entry, exit in pairs
    }


def least_objective(choices: Sequence[LayoutOptions], memory_weight: float) -> float:
    """No layouts of all blocks have less, whichever of `choices` each block has; the options have the same states.

    Blocks that are too wide for tables stand with less than they take, and shared parameters are counted as if they lay
    whole in every block that uses them but one.
    """
    graph, reach = choices[0].graph, np.zeros(1)
    for index in range(len(graph.blocks)):
        tables = [options.table(index, {}, memory_weight) for options in choices]
        if any(table is None for table in tables):
            least_s = min(options.objective_s(index, None, None, {}, memory_weight) for options in choices)
            reach = np.full(len(choices[0].states(index + 1)), reach.min() + least_s)
        else:
            reach = (reach[:, None] + np.minimum.reduce(tables)).min(axis=0)
    twice_s, prices = 0.0, [options.costs for options in choices]
    for name in graph.shared_parameters:
        uses = sum(name in block.parameters for block in graph.blocks)
        rests = [one.rest_s(name, REPLICATED) + memory_weight * one.rest_bytes(name, REPLICATED) for one in prices]
        twice_s += (uses - 1) * max(rests)
    return float(reach.min()) - twice_s


def chain_frontier(
    options: LayoutOptions,
    start: int,
    stop: int,
    entry: State | None = None,
    exit: State | None = None,
    shared_parameters: Mapping[str, Placement] | None = None,
    num_points: int = 6,
    fastest: ChainSolution | None = None,
) -> tuple[ChainSolution, ...]:
    """Efficient (time, memory) pairs from the fastest to the smallest, at most `num_points`.

    These are the pairs on the lower convex hull: those that are optimal for some memory weight. fastest: `chain_layouts` of
    the same, where it is known.
    """

    def at(weight: float) -> ChainSolution:
        return chain_layouts(options, start, stop, entry, exit, shared_parameters, weight)

    fastest = fastest or at(0.0)
    if fastest.memory_bytes == 0 or num_points < 2:
        return (fastest,)
    smallest = at(_heavy(fastest))
    found = {(s.time_s, s.memory_bytes): s for s in (fastest, smallest)}
    gaps = [(fastest, smallest)]
    while gaps and len(found) < num_points:
        gaps.sort(key=lambda pair: pair[0].memory_bytes - pair[1].memory_bytes)
        left, right = gaps.pop()
        saving = left.memory_bytes - right.memory_bytes
        if saving <= 1e-6 * left.memory_bytes or right.time_s <= left.time_s:
            continue
        weight = (right.time_s - left.time_s) / saving
        middle = at(weight)
        if middle.objective_s < (left.time_s + weight * left.memory_bytes) * (1 - 1e-9):
            found[middle.time_s, middle.memory_bytes] = middle
            gaps += [(left, middle), (middle, right)]
    return _efficient(list(found.values()))


def smallest_chain(options: LayoutOptions, start: int, stop: int) -> ChainSolution:
    """The last of `chain_frontier`: the fewest bytes, as far as a byte is worth its time a hundredfold."""
    fastest = chain_layouts(options, start, stop)
    if fastest.memory_bytes == 0:
        return fastest
    return chain_layouts(options, start, stop, memory_weight=_heavy(fastest))


def _heavy(fastest: ChainSolution) -> float:
    """At this weight any saving of memory is worth it that costs less than a hundred times the whole chain."""
    return 100 * max(fastest.time_s, 1e-9) / fastest.memory_bytes


def _efficient(solutions: list[ChainSolution]) -> tuple[ChainSolution, ...]:
    kept: list[ChainSolution] = []
    for candidate in sorted(solutions, key=lambda s: (s.time_s, s.memory_bytes)):
        if not kept or candidate.memory_bytes < kept[-1].memory_bytes:
            kept.append(candidate)
    return tuple(kept)


@dataclass(frozen=True, slots=True)
class _Path:
    """States of the boundaries, one more than blocks, under these placements of shared parameters."""

    boundaries: tuple[State, ...]
    shared: Mapping[str, Placement]
    objective_s: float


def _improve_one_at_a_time(solve, candidates: Mapping[str, tuple[Placement, ...]]) -> _Path | None:
    """Coordinate descent from all replicated; a local optimum."""
    shared = {name: options[0] for name, options in candidates.items()}
    best = solve(shared)
    improved = True
    while improved:
        improved = False
        for name, placements in candidates.items():
            for placement in placements:
                tried = solve({**shared, name: placement})
                if tried is not None and (best is None or tried.objective_s < best.objective_s * (1 - 1e-9)):
                    best, shared, improved = tried, {**shared, name: placement}, True
    return best


def _best_path(
    options: LayoutOptions,
    start: int,
    stop: int,
    entry: State | None,
    exit: State | None,
    shared: dict[str, Placement],
    weight: float,
) -> _Path | None:
    states = [options.states(i) for i in range(start, stop + 1)]
    states[0] = states[0] if entry is None else (entry,)
    states[-1] = states[-1] if exit is None else (exit,)

    def value(b: int, p: State | None, q: State | None) -> float:
        return options.objective_s(b, p, q, shared, weight)

    bounds, exact = [], []
    for b, before, after in zip(range(start, stop), states, states[1:], strict=False):
        whole = options.table(b, shared, weight)
        if whole is not None:
            rows = slice(None) if b > start or entry is None else [options.states(b).index(entry)]
            columns = slice(None) if b + 1 < stop or exit is None else [options.states(b + 1).index(exit)]
            table = whole[rows][:, columns]
            exact.append(np.ones(table.shape, dtype=bool))
        elif len(before) == 1 or len(after) == 1:  # as many programs as bounds would take
            table = np.array([[value(b, p, q) for q in after] for p in before])
            exact.append(np.ones(table.shape, dtype=bool))
        else:
            rows = np.array([value(b, p, None) for p in before])
            columns = np.array([value(b, None, q) for q in after])
            table = np.maximum(rows[:, None], columns[None, :])
            exact.append(np.zeros(table.shape, dtype=bool))
        bounds.append(table)
    while True:
        path = _shortest_path(bounds)
        if path is None:
            return None
        steps = list(zip(path, path[1:], strict=False))
        unsolved = [i for i, step in enumerate(steps) if not exact[i][step]]
        if not unsolved:
            break
        for i in unsolved:
            p, q = steps[i]
            bounds[i][p, q] = value(start + i, states[i][p], states[i + 1][q])
            exact[i][p, q] = True
    blocks_s = sum(float(bounds[i][step]) for i, step in enumerate(steps))
    used = _used(options, start, stop, shared)
    rest_s = sum(options.costs.rest_s(n, p) + weight * options.costs.rest_bytes(n, p) for n, p in used.items())
    return _Path(tuple(states[i][p] for i, p in enumerate(path)), shared, blocks_s + rest_s)


def _used(options: LayoutOptions, start: int, stop: int, shared: Mapping[str, Placement]) -> dict[str, Placement]:
    """Of shared parameters those that the blocks use."""
    inside = {name for block in options.graph.blocks[start:stop] for name in block.parameters}
    return {name: place for name, place in shared.items() if name in inside}


def _along(options: LayoutOptions, start: int, path: _Path, weight: float, exact: bool) -> ChainSolution:
    """The layouts of the blocks along a path."""
    pairs = itertools.pairwise(path.boundaries)
    solved = [options.solution(start + i, p, q, path.shared, weight) for i, (p, q) in enumerate(pairs)]
    used = _used(options, start, start + len(solved), path.shared)
    time_s = sum(s.time_s for s in solved) + sum(options.costs.rest_s(n, p) for n, p in used.items())
    memory_bytes = sum(s.memory_bytes for s in solved) + sum(options.costs.rest_bytes(n, p) for n, p in used.items())
    layouts = tuple(s.layout for s in solved)
    return ChainSolution(layouts, path.boundaries, used, time_s, memory_bytes, time_s + weight * memory_bytes, exact)


def _shortest_path(tables: list[np.ndarray]) -> list[int] | None:
    """One state per boundary, minimising the sum of table entries; None if every path is infinite."""
    reach, came = np.zeros(tables[0].shape[0]), []
    for table in tables:
        total = reach[:, None] + table
        came.append(total.argmin(axis=0))
        reach = total.min(axis=0)
    last = int(reach.argmin())
    if math.isinf(reach[last]):
        return None
    path = [last]
    for step in reversed(came):
        path.append(int(step[path[-1]]))
    return path[::-1]
