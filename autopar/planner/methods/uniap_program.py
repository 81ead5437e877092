"""UniAP's program: cut a chain of layers into stages and choose each layer's strategy, at once.

Given S stages and c microbatches, P_is = 1 where layer i lies on stage s and x_ik = 1 where it takes strategy k,

    p_s = sum_i P_is (sum_k A_ik x_ik) + sum_i P_is P_(i+1)s x_i' R_i x_(i+1)         work and resharding in a stage
    o_s = sum_i P_is P_(i+1)(s+1) x_i' C_i x_(i+1)                                    what crosses behind stage s
    minimise   sum_s p_s + sum_s o_s + (c - 1) max over s of max(p_s, o_s)            `pipeline_s`
    such that  sum_i P_is (sum_k M_iks x_ik) <= memory,  every stage has a layer, stages are contiguous

which is quadratic to the fourth degree. It is linear in z_isk = P_is x_ik and in transport variables e[isk, jtl] on
each pair of neighbours, t = s or s + 1, with marginals sum_tl e = z_isk and sum_sk e = z_jtl (on a chain the e are
then exactly the products, and contiguity follows: no e leads back or skips a stage).             `solve_program`

Reference: Lin et al., "UniAP: Unifying Inter- and Intra-Layer Automatic Parallelism by Mixed Integer Quadratic
Programming", arXiv 2307.16375, section 3. The linearisation is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .milp import Milp


@dataclass(frozen=True, slots=True)
class ChainCosts:
    """work_s[i, k]; inside_s[i][k, l], across_s[i][k, l]: between layer i with k and i + 1 with l, infinite where it
    cannot be; memory_bytes[i, k, s]: as stage s holds it."""

    work_s: np.ndarray
    inside_s: Sequence[np.ndarray]
    across_s: Sequence[np.ndarray]
    memory_bytes: np.ndarray


@dataclass(frozen=True, slots=True)
class Joint:
    """stage and strategy of every layer; the objective, and what no choice is below."""

    stage: tuple[int, ...]
    strategy: tuple[int, ...]
    total_s: float
    bound_s: float


def pipeline_s(costs: ChainCosts, stage: Sequence[int], strategy: Sequence[int], microbatches: int) -> float:
    """The objective of given choices, from the definition."""
    num = max(stage) + 1
    inside, across = [0.0] * num, [0.0] * num
    for i, (s, k) in enumerate(zip(stage, strategy, strict=True)):
        inside[s] += costs.work_s[i, k]
        if i + 1 < len(stage):
            if stage[i + 1] == s:
                inside[s] += costs.inside_s[i][k, strategy[i + 1]]
            else:
                across[s] += costs.across_s[i][k, strategy[i + 1]]
    return sum(inside) + sum(across) + (microbatches - 1) * max(*inside, *across)


def solve_program(
    costs: ChainCosts,
    num_stages: int,
    microbatches: int,
    memory_bytes: float,
    limit_s: float = math.inf,
    is_over: Callable[[], bool] = lambda: False,
) -> Joint | None:
    """The best stages and strategies; None if none fits (or none was found in time).

    limit_s: for the solver. is_over: asked often; once it is true the best so far is the answer.
    """
    num, num_ways = costs.work_s.shape
    milp = Milp()
    slowest = milp.column(microbatches - 1)
    inside, across = _Sums(num_stages), _Sums(num_stages - 1)
    weights: list[dict[int, float]] = [{} for _ in range(num_stages)]
    z: list[dict[int, dict[int, int]]] = []
    for i in range(num):
        z.append({})
        # stages before s need a layer each, and so do those behind
        for s in range(max(0, num_stages - num + i), min(i, num_stages - 1) + 1):
            z[i][s] = {}
            for k in range(num_ways):
                if math.isfinite(costs.work_s[i, k]):
                    z[i][s][k] = column = milp.column(costs.work_s[i, k], 1.0, integer=True)
                    inside.add(s, np.array([column]), np.array([costs.work_s[i, k]]))
                    weights[s][column] = costs.memory_bytes[i, k, s]
        mine = [column for ways in z[i].values() for column in ways.values()]
        if not mine:
            return None
        milp.row(mine, [1.0] * len(mine), 1.0, 1.0)
    for i in range(num - 1):
        if not _join(milp, costs, z, i, inside, across, is_over):
            return None
    for columns, values in (*inside.terms(), *across.terms()):
        milp.row(np.append(slowest, columns), np.append(1.0, -values), 0.0, math.inf)
    for terms in weights:
        if math.isfinite(memory_bytes) and terms:
            milp.row(list(terms), [v / memory_bytes for v in terms.values()], -math.inf, 1.0)
    found = milp.solve(limit_s, is_over=is_over)
    if found is None:
        return None
    stage, strategy = [0] * num, [0] * num
    for i, layer in enumerate(z):
        for s, ways in layer.items():
            for k, column in ways.items():
                if found.values[column] > 0.5:
                    stage[i], strategy[i] = s, k
    total_s = pipeline_s(costs, stage, strategy, microbatches)
    assert total_s <= found.objective * (1 + 1e-4) + 1e-12, (
        f"the program counts {found.objective}, its choice {total_s}"
    )
    return Joint(tuple(stage), tuple(strategy), total_s, min(found.bound, total_s))


class _Sums:
    """One sum of seconds times columns per stage, gathered piece by piece."""

    def __init__(self, num: int) -> None:
        self._parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(num)]

    def add(self, s: int, columns: np.ndarray, values: np.ndarray) -> None:
        self._parts[s].append((columns[values != 0], values[values != 0]))

    def terms(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for parts in self._parts:
            if parts:
                yield np.concatenate([columns for columns, _ in parts]), np.concatenate([values for _, values in parts])


def _join(
    milp: Milp,
    costs: ChainCosts,
    z: Sequence[Mapping[int, Mapping[int, int]]],
    i: int,
    inside: _Sums,
    across: _Sums,
    is_over: Callable[[], bool],
) -> bool:
    """The transport variables between layers i and i + 1, in the objective and in the stages' sums; False if the time was
    over before all were there."""
    # per stage of either layer: (which of its strategies, column)
    leaving: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {s: [] for s in z[i]}
    entering: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {t: [] for t in z[i + 1]}
    for s in z[i]:
        for t, table, sums in ((s, costs.inside_s[i], inside), (s + 1, costs.across_s[i], across)):
            if t not in z[i + 1]:
                continue
            if is_over():
                return False
            cost_s = table[np.ix_(list(z[i][s]), list(z[i + 1][t]))]
            before, after = np.nonzero(np.isfinite(cost_s))
            columns = milp.columns(cost_s[before, after], 1.0)
            leaving[s].append((before, columns))
            entering[t].append((after, columns))
            sums.add(s, columns, cost_s[before, after])
    for ends, layer in ((leaving, z[i]), (entering, z[i + 1])):
        for s, parts in ends.items():
            which = np.concatenate([numbers for numbers, _ in parts]) if parts else np.zeros(0, int)
            columns = np.concatenate([found for _, found in parts]) if parts else np.zeros(0, int)
            order = np.argsort(which, kind="stable")
            edges = np.searchsorted(which[order], np.arange(len(layer[s]) + 1))
            for column, begin, end in zip(layer[s].values(), edges, edges[1:], strict=False):
                values = np.append(1.0, np.full(end - begin, -1.0))
                milp.row(np.append(column, columns[order[begin:end]]), values, 0.0, 0.0)
    return True


def two_steps(
    costs: ChainCosts, num_stages: int, microbatches: int, memory_bytes: float
) -> tuple[tuple[int, ...], tuple[int, ...], float] | None:
    """What searching in two steps gives: the strategies of least work and resharding first, the best cuts after."""
    num, num_ways = costs.work_s.shape
    best, back = costs.work_s[0], []
    for i in range(1, num):
        ways = best[:, None] + costs.inside_s[i - 1]
        back.append(ways.argmin(0))
        best = ways.min(0) + costs.work_s[i]
    strategy = [int(best.argmin())]
    for chosen in reversed(back):
        strategy.insert(0, int(chosen[strategy[0]]))
    found = None
    for cuts in itertools.combinations(range(1, num), num_stages - 1):
        stage = [sum(i >= cut for cut in cuts) for i in range(num)]
        held = [
            sum(costs.memory_bytes[i, strategy[i], s] for i in range(num) if stage[i] == s) for s in range(num_stages)
        ]
        total_s = pipeline_s(costs, stage, strategy, microbatches)
        if max(held) <= memory_bytes and (found is None or total_s < found[2]):
            found = (tuple(stage), tuple(strategy), total_s)
    return found
