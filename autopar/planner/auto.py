"""The default search: best first over shapes, each refined only as far as its lower bound makes it worth.

A shape starts with a floor (planner/floors.py). When it comes up, it gets the fastest layouts and a stage table with
a tighter bound (`StageSearch.root_bound_s`); when that comes up, its cuts are searched. If memory is what holds it
back, layouts that take less memory follow, with the bound that the fastest would have without the limit. The search
ends when the least bound left is no better than the best plan simulated, which is then the optimum of the space.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..cost.model import CostModel
from ..plan import Plan
from ..schedule.orders import schedule_named
from .alleviate import alleviated
from .broad import Broad
from .candidates import MAX_CANDIDATES, NothingFits, TooLarge, Tried, conclude, nothing_fits
from .floors import Floors
from .least_work import with_work_bound
from .mixed import with_unequal_stages
from .pricing import StagePrices
from .problem import Chain, Problem, Shape
from .rewriting import with_rewrites
from .scheduled import scheduled, scheduled_on_ranks
from .stages import TOLERANCE, StageSearch
from .unequal import unequal

# Partial plans looked at per shape before its proof of optimality is left open and the gap reported.
MAX_VISITS = 20_000
# Where the layouts that keep least need so many times the limit, no others of the shape are looked at: what decides is
# the exact memory of stages, of which the layouts count what is kept, not what comes and goes.
HOPELESS = 1.5
# Shapes tried, nearest first, for a row of the table of candidates whose shapes all lost by their floors.
TRIES_PER_CANDIDATE = 1


@dataclass(order=True, slots=True)
class _Entry:
    """A shape with its lower bound, and how far it has been looked at.

    order: ties go to the first come. refined: the bound is the closer of the two floors. chain: layouts that it has, and
    the bound is theirs. search: the stage table of these. chains: the layouts to try next.
    """

    bound_s: float
    order: int
    shape: Shape = field(compare=False)
    refined: bool = field(compare=False, default=False)
    chain: Chain | None = field(compare=False, default=None)
    search: StageSearch | None = field(compare=False, default=None)
    chains: Iterator[Chain] | None = field(compare=False, default=None)


def auto(problem: Problem) -> Plan:
    """The best plan found: the exact search's, or on many devices that of planner/broad.py, changed by
    planner/alleviate.py, rewritten by planner/rewriting.py, and with stages of different meshes (planner/mixed.py) where that
    makes it faster or is what fits. On clusters of unequal devices, and where equal stages cannot use all devices, that of
    planner/unequal.py. ValueError, with the smallest plan found, when none fits."""
    try:
        return with_work_bound(problem, _best(problem))
    finally:
        problem.provers.clear()  # these know the problem, and would keep all of the search alive


def _best(problem: Problem) -> Plan:
    if problem.cluster.hosts:
        return _on_ranks(problem)
    if not problem.has_shapes:
        return _of_unlike_stages(problem)
    start_s = time.process_time()
    try:
        plan = _on_graph(problem)
    except NothingFits as error:
        return _fitting_otherwise(problem, error, time.process_time() - start_s)
    plan = with_rewrites(problem, plan, _on_graph, time.process_time() - start_s)
    return _proved(problem, with_unequal_stages(problem, plan, time.process_time() - start_s))


def _proved(problem: Problem, plan: Plan) -> Plan:
    """The plan with a closer bound, where it is the one that a bound was found for."""
    if plan.prediction.lower_bound_s is None or plan.rewrites or problem.budget.expired():
        return plan
    try:
        for prove in problem.provers:
            plan = prove(plan)
    except KeyboardInterrupt:
        problem.budget.interrupted()
    return plan


def _on_ranks(problem: Problem) -> Plan:
    """The best plan found whose stages have any devices."""
    laps = schedule_named(problem.constraints.schedule or "1f1b").virtual
    return unequal(problem, _best) if laps == 1 else scheduled_on_ranks(problem, _core)


def _of_unlike_stages(problem: Problem) -> Plan:
    """Where no equal stages meet the constraints, as on 5 devices with a batch of 8 rows: stages of any numbers of devices and
    uneven shares of the batch; else the error that says what contradicts what."""
    # Made-up costs price no ranks.
    if problem.unequal_stages and isinstance(problem.costs, CostModel):
        try:
            return _on_ranks(problem)
        except ValueError:  # that of equal stages says more
            pass
    raise AssertionError(f"{problem.shapes} are none")  # these raise the error


def _on_graph(problem: Problem) -> Plan:
    """The best plan of the graph as it is."""
    if problem.constraints.is_scheduled:
        return scheduled(problem, _core)
    start_s = time.process_time()
    plan, others = _core(problem)
    return alleviated(problem, plan, others, time.process_time() - start_s)


def _fitting_otherwise(problem: Problem, error: NothingFits, spent_s: float) -> Plan:
    """Where nothing fits that the exact search can say: what moves reach from its smallest plan, or stages of different meshes;
    else the error."""
    plan = with_unequal_stages(problem, alleviated(problem, error.smallest, [], spent_s), spent_s)
    if plan.prediction.peak_memory_bytes > problem.memory_limit_bytes:
        raise error
    return plan


def _core(problem: Problem) -> tuple[Plan, list[Plan]]:
    """The best plan of the exact search, or on many devices of the broad one, and all that were priced, fastest first."""
    search = Broad(problem) if problem.is_large else _Auto(problem)
    plan = search.run()
    return plan, [one.plan for one in sorted(search.tried, key=lambda one: one.step_time_s)]


def exact_search(problem: Problem) -> Plan:
    """The plan of least simulated step time, of those that this module's search looks at, that fits."""
    return _Auto(problem).run()


class _Auto:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.prices = StagePrices(problem)
        self.floors = Floors(problem, self.prices)
        self.best: Tried | None = None
        self.tried: list[Tried] = []
        self.tight: list[TooLarge] = []
        self.open_bound_s = math.inf
        self.heap: list[_Entry] = []
        # The bound of the entry that is being advanced: an interrupt leaves it open.
        self._advancing_s = math.inf
        # Per degrees, ZeRO level and schedule, up to how many microbatches nothing can fit: fewer are larger.
        self._hopeless: dict[tuple, int] = {}

    def run(self) -> Plan:
        budget = self.problem.budget
        try:
            self._search()
            if self.best is None and not budget.cut_short:
                raise nothing_fits(self.problem, self.prices, self.tight)
            if not budget.cut_short:
                self.tight += [self._too_large(entry.shape) for entry in self.heap if entry.bound_s == math.inf]
                self._represent(sorted(self.heap))
        except KeyboardInterrupt:
            if self.best is None:
                raise
            budget.interrupted()
        if self.best is None:
            raise budget.no_plan("auto")
        if budget.cut_short:
            # What would only fill the table of candidates is left out.
            self.tight.clear()
            self.open_bound_s = min(self.open_bound_s, self._advancing_s, *(entry.bound_s for entry in self.heap[:1]))
        return conclude(self.problem, self.prices, self.best, self.tried, self.tight, self.open_bound_s)

    def _search(self) -> None:
        shapes = self.problem.shapes
        self.heap = sorted(_Entry(self.floors.time_s(shape), i, shape) for i, shape in enumerate(shapes))
        with self.problem.budget.bar("planning", "shape", len(shapes)) as bar:
            while self.heap and not self._is_beaten(self.heap[0].bound_s):
                if self.problem.budget.expired(has_plan=self.best is not None):
                    return
                entry = heapq.heappop(self.heap)
                self._advancing_s = entry.bound_s
                self._advance(entry)
                self._advancing_s = math.inf
                bar.update(entry.search is None and entry.chain is None and entry.refined)

    def _is_beaten(self, bound_s: float) -> bool:
        return self.best is not None and bound_s >= self.best.step_time_s * (1 - TOLERANCE)

    def _advance(self, entry: _Entry) -> None:
        """Replace an entry by what is known when one more step is taken."""
        if entry.search is not None:
            self._solve(entry.search)
        elif entry.chain is not None:
            self._tabulate(entry)
        elif entry.chains is not None:
            chain = next(entry.chains, None)
            if chain is not None:
                self._with_layouts(entry, chain)
                self._push(replace(entry))
        elif entry.bound_s == math.inf or self._is_hopeless(entry.shape):
            self.tight.append(self._too_large(entry.shape))
        elif not entry.refined:
            self._push(replace(entry, bound_s=max(entry.bound_s, self.floors.refined_s(entry.shape)), refined=True))
        else:
            self._with_layouts(entry, next(iter(self.problem.chains.of(self.problem, entry.shape))))

    def _is_hopeless(self, shape: Shape) -> bool:
        return shape.microbatches <= self._hopeless.get((shape.group, shape.schedule), 0)

    def _push(self, entry: _Entry) -> None:
        heapq.heappush(self.heap, entry)

    def _with_layouts(self, entry: _Entry, chain: Chain) -> None:
        if len(self.problem.model_axes(entry.shape.tensor)) > 1:
            # One axis is laid out given the other, so only the floor holds for all their layouts.
            self.open_bound_s = min(self.open_bound_s, entry.bound_s)
        bound_s = self.floors.chain_s(entry.shape, chain)
        may_fit = bound_s < math.inf
        if may_fit:
            self._push(replace(entry, bound_s=max(entry.bound_s, bound_s), chain=chain))
        else:
            self.tight.append(TooLarge(self.floors.memory_bytes(entry.shape, chain), entry.shape))
        # Where rates fall, what it takes to add gradients depends on all of a stage: another chain may be the fastest.
        if entry.chains is None and (self.floors.rates_fall or not may_fit):
            self._more_chains(entry, entry.bound_s)

    def _tabulate(self, entry: _Entry) -> None:
        """The stage table of a shape with its layouts."""
        search = StageSearch(self.problem, entry.shape, entry.chain, self.prices)
        if search.root_bound_s < math.inf:
            self._push(replace(entry, bound_s=search.root_bound_s, search=search))
        else:
            self.tight.append(TooLarge(search.smallest()[1], entry.shape, search))
        are_open = entry.chains is None and not self.floors.rates_fall
        if are_open and search.free_bound_s < search.root_bound_s * (1 - TOLERANCE):
            self._more_chains(entry, search.free_bound_s)

    def _more_chains(self, entry: _Entry, bound_s: float) -> None:
        """Let layouts that take less memory follow the fastest, which take the time `bound_s` at least too."""
        if entry.shape.tensor == 1:
            return
        smallest = self.problem.chains.smallest(self.problem, entry.shape)
        if not self.floors.may_fit(entry.shape, smallest, HOPELESS * self.problem.memory_limit_bytes):
            kind = (entry.shape.group, entry.shape.schedule)
            self._hopeless[kind] = max(entry.shape.microbatches, self._hopeless.get(kind, 0))
            return
        chains = iter(self.problem.chains.of(self.problem, entry.shape))
        next(chains)
        self._push(_Entry(bound_s, entry.order, entry.shape, True, chains=chains))

    def _too_large(self, shape: Shape) -> TooLarge:
        return TooLarge(self.floors.memory_bytes(shape), shape)

    def _solve(self, search: StageSearch) -> None:
        solution = search.solve(self.best.step_time_s if self.best else math.inf, MAX_VISITS)
        self.open_bound_s = min(self.open_bound_s, solution.open_bound_s)
        # A shape that lost is represented among the candidates by the plan that its bounds point to.
        pieces = solution.pieces or search.first()
        if pieces is None:
            self.tight.append(TooLarge(search.smallest()[1], search.shape, search))
            return
        tried = Tried.of(self.problem, search, pieces)
        self.tried.append(tried)
        if solution.pieces is not None:
            self.best = tried

    def _represent(self, left: list[_Entry]) -> None:
        """Give the nearest of the ways to use the devices that were never searched a simulated plan each."""
        seen = {tried.shape.group for tried in self.tried}
        groups: dict[tuple, list[_Entry]] = {}
        for entry in left:
            if entry.shape.group not in seen and entry.bound_s < math.inf:
                groups.setdefault(entry.shape.group, []).append(entry)
        for entries in list(groups.values())[: MAX_CANDIDATES - len(seen)]:
            # A bound that a search has found says more than a floor.
            entries.sort(key=lambda entry: (entry.search is None, entry.bound_s))
            best: Tried | None = None
            for entry in entries[:TRIES_PER_CANDIDATE]:
                if best is not None and entry.bound_s >= best.step_time_s:
                    break
                search = entry.search or self._fastest(entry.shape)
                pieces = search.first() if search.root_bound_s < math.inf else None
                if pieces is None:
                    self.tight.append(TooLarge(search.smallest()[1], entry.shape, search))
                else:
                    tried = Tried.of(self.problem, search, pieces)
                    best = min(best or tried, tried, key=lambda one: one.step_time_s)
            if best is not None:
                self.tried.append(best)

    def _fastest(self, shape: Shape) -> StageSearch:
        chain = next(iter(self.problem.chains.of(self.problem, shape)))
        return StageSearch(self.problem, shape, chain, self.prices)
