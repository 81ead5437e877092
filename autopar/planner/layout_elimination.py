"""The exact layouts of one block for all states of its boundary at once, by eliminating one choice after the other.

A `BlockModel` is a sum of tables, each over few choices: what an option costs by itself, what a conversion costs
between the choice that places a tensor and the one that wants it. What is paid once however many want it (a conversion
with several sinks, a storage with several holders) becomes a choice of its own, the set A that is paid for:

    (1)  sum over q in A of price(have, q)        on (source, A)                                    _add_paid_once
    (2)  0 if the wish of the sink is in A, else infinite        on (A, sink), for each sink

so that an optimal A holds just what is wanted. Eliminating choice v replaces the tables that know v by

    (3)  t(others) = min over v of their sum                                                        Elimination.table

and remembers the minimiser, in an order that keeps the tables small (`_order`). What is left in the end is a table over the
boundary's choices. A transformer's layer, of some 60 choices, never needs a table of more than a few
hundred thousand entries, because its ops are nearly a chain.

Reference: U. Bertele and F. Brioschi, "Nonserial Dynamic Programming", 1972; R. Dechter, "Bucket elimination",
Artificial Intelligence 113, 1999.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .layout_costs import storage
from .layout_model import BlockModel, Choice, Flow, Keep

# Entries of one table, above which the integer program is the better way.
MAX_TABLE = 4_000_000
# A table above which other orders are looked for, and how many.
LARGE_TABLE, MAX_ORDERS = 1_000_000, 16
# Sets of placements that may be paid for, per tensor.
MAX_SETS = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """A table over variables `scope`: seconds and bytes, one axis per variable. Infinite seconds forbid."""

    scope: tuple[int, ...]
    seconds: np.ndarray
    size_bytes: np.ndarray | None = None


class TooWide(Exception):
    """The block's choices hang together too much for tables."""


@dataclass(frozen=True, slots=True)
class Order:
    """Variables in the order of their elimination, and the entries of the largest table on the way."""

    variables: tuple[int, ...]
    largest: int


class Elimination:
    """One block's model as tables; `table` answers for one price of memory. Raises `TooWide`.

    kept: the choices whose every joint option is answered for, in the order of the answer's axes.
    orders: remembered orders by structure, which blocks of one kind share under all prices.
    basis: the same block under prices that differ in its parameters alone: the other tables are taken from there.
    """

    def __init__(
        self,
        model: BlockModel,
        kept: Sequence[int],
        orders: dict[Hashable, Order],
        basis: Elimination | None = None,
    ) -> None:
        self.model, self.kept = model, tuple(kept)
        if basis is None:
            self._begin()
        else:
            self.common, self.sizes = basis.common, list(basis.common[0])
            self.factors = list(basis.common[1])
        for index, choice in enumerate(model.choices):
            if choice.role == "parameter":
                self._add_choice(index, choice)
        for flow in model.parameter_flows:
            self._add_flow(flow)
        structure = (tuple(self.sizes), tuple(f.scope for f in self.factors), self.kept)
        if structure not in orders:
            orders[structure] = _order(self.sizes, [f.scope for f in self.factors], self.kept)
        self.order = orders[structure]
        if self.order.largest > MAX_TABLE:
            raise TooWide

    def _begin(self) -> None:
        """All tables but those of parameters."""
        self.sizes = [len(choice.options) for choice in self.model.choices]
        self.factors: list[Factor] = []
        for index, choice in enumerate(self.model.choices):
            if choice.role != "parameter":
                self._add_choice(index, choice)
        for flow in self.model.activation_flows:
            self._add_flow(flow)
        for keep in self.model.keeps:
            self._add_keep(keep)
        self.common = (tuple(self.sizes), tuple(self.factors))

    def _add_choice(self, index: int, choice: Choice) -> None:
        prices = np.array(choice.prices, dtype=float).reshape(len(choice.options), 2)
        self._add((index,), prices[:, 0], prices[:, 1])

    def _add(self, scope: tuple[int, ...], seconds: np.ndarray, size_bytes: np.ndarray | None = None) -> None:
        if size_bytes is not None and not size_bytes.any():
            size_bytes = None
        self.factors.append(Factor(scope, seconds, size_bytes))

    def _add_flow(self, flow: Flow) -> None:
        prices, source = flow.prices, flow.source
        sinks_of: dict = {}
        for number, sink in enumerate(flow.sinks):
            for want in dict.fromkeys(sink.placements):
                sinks_of.setdefault(want, set()).add(number)
        priced = dict.fromkeys(want for _, want in prices)
        common = [want for want in priced if len(sinks_of[want]) > 1]
        nothing = (0.0, 0.0)
        for number, sink in enumerate(flow.sinks):
            own = {want for want in priced if sinks_of[want] == {number}}
            if not own:
                continue
            # Options of a choice often repeat a placement, so distinct pairs are priced once.
            rows = {have: i for i, have in enumerate(dict.fromkeys(source.placements))}
            columns = {want: i for i, want in enumerate(dict.fromkeys(sink.placements))}
            small = np.array(
                [[prices.get((p, q), nothing) if q in own else nothing for q in columns] for p in rows], dtype=float
            )
            pairs = small[[rows[p] for p in source.placements]][:, [columns[q] for q in sink.placements]]
            self._add((source.choice, sink.choice), pairs[:, :, 0], pairs[:, :, 1])
        if common:
            rows = {have: i for i, have in enumerate(dict.fromkeys(source.placements))}
            price = np.array([[prices.get((p, q), nothing) for q in common] for p in rows], dtype=float)
            price = price[[rows[p] for p in source.placements]]
            wishes = [(sink.choice, sink.placements) for sink in flow.sinks]
            self._add_paid_once(source.choice, price, common, wishes)

    def _add_keep(self, keep: Keep) -> None:
        stored = [(use.choice, tuple(map(storage, use.placements))) for use in keep.holders]
        holders_of: dict[str, set[int]] = {}
        for number, (_, names) in enumerate(stored):
            for name in names:
                holders_of.setdefault(name, set()).add(number)
        costly = [name for name in holders_of if keep.memory_bytes[name]]
        for number, (choice, names) in enumerate(stored):
            sizes = np.array([keep.memory_bytes[n] if holders_of[n] == {number} else 0.0 for n in names])
            if sizes.any():
                self._add((choice,), np.zeros(len(names)), sizes)
        common = [name for name in costly if len(holders_of[name]) > 1]
        if common:
            price = np.array([[(0.0, keep.memory_bytes[name]) for name in common]])
            self._add_paid_once(None, price, common, stored)

    def _add_paid_once(
        self, source: int | None, price: np.ndarray, things: Sequence, wishes: Sequence[tuple[int, Sequence]]
    ) -> None:
        """Equations (1) and (2). price: [source option, thing, (seconds, bytes)]; wishes: (choice, thing per option)."""
        most = min(len(things), len(wishes))
        if sum(math.comb(len(things), size) for size in range(most + 1)) > MAX_SETS:
            raise TooWide
        sets = [set(s) for size in range(most + 1) for s in itertools.combinations(range(len(things)), size)]
        variable = len(self.sizes)
        self.sizes.append(len(sets))
        member = np.array([[thing in paid for thing in range(len(things))] for paid in sets])
        # Where a set is empty its sum is zero even if a price that is not in it is infinite.
        seconds = np.where(member[None], price[:, None, :, 0], 0.0).sum(axis=2)
        sizes = np.where(member[None], price[:, None, :, 1], 0.0).sum(axis=2)
        if source is None:
            self._add((variable,), seconds[0], sizes[0])
        else:
            self._add((source, variable), seconds, sizes)
        number = {thing: i for i, thing in enumerate(things)}
        for choice, wanted in wishes:
            asked = [number.get(thing, -1) for thing in wanted]
            allowed = np.concatenate([member, np.ones((len(sets), 1), dtype=bool)], axis=1)[:, asked]
            if not allowed.all():
                self._add((variable, choice), np.where(allowed, 0.0, math.inf))

    def table(self, memory_weight: float) -> Solved:
        """All optima for one price of memory, in seconds per byte."""
        factors: list[list[_Costs]] = [[] for _ in self.sizes]
        for factor in self.factors:
            costs = factor.seconds
            if memory_weight and factor.size_bytes is not None:
                costs = costs + memory_weight * factor.size_bytes
            _know(factors, _Costs(factor.scope, costs))
        constant = 0.0
        picks = []
        for variable in self.order.variables:
            mine = factors[variable]
            scope = tuple(sorted({v for costs in mine for v in costs.scope if v != variable}))
            table = self._sum(mine, (*scope, variable))
            for v in scope:
                factors[v] = [costs for costs in factors[v] if variable not in costs.scope]
            best = table.argmin(axis=-1)
            picks.append((variable, scope, best))
            least = np.take_along_axis(table, best[..., None], -1)[..., 0]
            if scope:
                _know(factors, _Costs(scope, least))
            else:
                constant += float(least)
        left = {id(costs): costs for v in self.kept for costs in factors[v]}
        answer = self._sum(list(left.values()), self.kept)
        return Solved(self, memory_weight, answer + constant, tuple(picks))

    def _sum(self, tables: Sequence[_Costs], scope: tuple[int, ...]) -> np.ndarray:
        """The sum of tables over the axes of `scope`, each in full."""
        place = {v: i for i, v in enumerate(scope)}
        total = np.zeros((1,) * len(scope))
        for costs in sorted(tables, key=lambda one: one.values.size):
            order = sorted(range(len(costs.scope)), key=lambda i: place[costs.scope[i]])
            shape = [1] * len(scope)
            for i in order:
                shape[place[costs.scope[i]]] = costs.values.shape[i]
            total = total + costs.values.transpose(order).reshape(shape)
        return np.broadcast_to(total, [self.sizes[v] for v in scope])


@dataclass(frozen=True, slots=True)
class _Costs:
    """Seconds, weighted bytes among them, over the options of `scope`."""

    scope: tuple[int, ...]
    values: np.ndarray


def _know(factors: list[list[_Costs]], costs: _Costs) -> None:
    """Let every variable of a table know of it."""
    for v in costs.scope:
        factors[v].append(costs)


@dataclass(frozen=True, slots=True)
class Solved:
    """objective_s[options of the kept choices]: the least objective; `selection` is what attains it."""

    problem: Elimination
    memory_weight: float
    objective_s: np.ndarray
    picks: tuple[tuple[int, tuple[int, ...], np.ndarray], ...]

    def selection(self, options: Mapping[int, int]) -> tuple[int, ...]:
        """The option of every choice of the model, given those of the kept ones."""
        taken = dict(options)
        for variable, scope, best in reversed(self.picks):
            if variable not in taken:
                taken[variable] = int(best[tuple(taken[v] for v in scope)])
        return tuple(taken[c] for c in range(len(self.problem.model.choices)))


def _order(sizes: Sequence[int], scopes: Sequence[tuple[int, ...]], kept: tuple[int, ...]) -> Order:
    """Least table first; where that makes a large one, also least fill first, a few times with the fill read inexactly."""
    near: list[set[int]] = [set() for _ in sizes]
    for scope in scopes:
        for v in scope:
            near[v].update(scope)
    for v, others in enumerate(near):
        others.discard(v)
    best = _eliminated(sizes, near, kept, lambda v, near, entries: entries[v])
    draw, weight = random.Random(0), [math.log(size) for size in sizes]
    for number in range(MAX_ORDERS if best.largest > LARGE_TABLE else 0):
        blur = 0.25 if number else 0.0

        def fill(v: int, near: Sequence[set[int]], entries: Mapping[int, int], blur: float = blur) -> float:
            """How much v's neighbours have yet to come together, by the sizes of those that have not."""
            apart = sum(weight[a] * weight[b] for a in near[v] for b in near[v] if a < b and b not in near[a])
            return apart * (1 + draw.uniform(-blur, blur))

        best = min(best, _eliminated(sizes, near, kept, fill), key=lambda order: order.largest)
    return best


def _eliminated(
    sizes: Sequence[int],
    near: Sequence[set[int]],
    kept: tuple[int, ...],
    cost: Callable[[int, Sequence[set[int]], Mapping[int, int]], float],
) -> Order:
    """The order that takes the variable of least cost each time. near: which share a table with each; entries: of the table
    that its elimination makes."""
    near = [set(others) for others in near]
    left = set(range(len(sizes))) - set(kept)
    entries = {v: sizes[v] * math.prod(sizes[u] for u in near[v]) for v in left}
    costs = {v: cost(v, near, entries) for v in left}
    order, largest = [], 1
    while left:
        v = min(left, key=lambda u: (costs[u], entries[u], u))
        largest = max(largest, entries[v])
        order.append(v)
        left.discard(v)
        for u in near[v]:
            near[u] |= near[v]
            near[u] -= {u, v}
        for u in near[v] & left:
            entries[u] = sizes[u] * math.prod(sizes[w] for w in near[u])
        # Fill also changes for those around: a pair of theirs may have come together.
        for u in left.intersection(near[v].union(*(near[w] for w in near[v]))):
            costs[u] = cost(u, near, entries)
    return Order(tuple(order), largest)
