"""What a search says about the plans that it considered: each one's prediction, and why it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cost.types import StageCost
from ..plan import Candidate, Plan, Prediction
from ..report.words import gib, plan_in_words
from ..schedule.step_time import step_time_s
from ..simulate import simulate
from .pricing import Piece, StagePrices
from .problem import Problem, Shape
from .stages import StageSearch

# Rows of the table: enough for each way to use 8 devices, few enough to read.
MAX_CANDIDATES = 12
MAX_RUNNERS_UP = 3
MAX_TOO_LARGE = 3
# Stages x microbatches up to which a whole program is walked for its figures.
MAX_WALKED = 512
# Forward and backward of the microbatches, with the communication inside the stages.
WORK = "work"


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was priced exactly, with where its step time goes (seconds, mean over stages)."""

    plan: Plan
    shape: Shape
    step_time_s: float
    peak_memory_bytes: int
    parts_s: dict[str, float]

    @classmethod
    def of(cls, problem: Problem, search: StageSearch, pieces: tuple[Piece, ...]) -> Tried:
        shape, costs = search.shape, search.costs(pieces)
        seconds = step_time_s(shape.pipeline, shape.microbatches, shape.schedule, costs)
        peak_bytes = max(search.priced(s, piece).peak_bytes for s, piece in enumerate(pieces))
        return cls(search.plan(pieces), shape, seconds, peak_bytes, _parts(search, pieces, costs, seconds))

    def simulated(self, problem: Problem) -> Tried:
        """The same, with the figures of the simulator itself; of a long program the closed forms' are those, to rounding."""
        if self.shape.pipeline * self.shape.microbatches > MAX_WALKED:
            return self
        line = simulate(problem.graph, self.plan, problem.cluster, model=problem.costs)
        assert abs(line.step_time_s - self.step_time_s) <= 1e-6 * line.step_time_s, (line.step_time_s, self.step_time_s)
        return replace(self, step_time_s=line.step_time_s, peak_memory_bytes=max(line.peak_memory_bytes.values()))


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A shape that does not fit: it needs at least least_bytes; with `search`, exactly what `search.smallest` says."""

    least_bytes: float
    shape: Shape
    search: StageSearch | None = None

    def smallest(self, problem: Problem, prices: StagePrices) -> tuple[StageSearch, tuple[Piece, ...], int]:
        """Its smallest plan over all chains of layouts: the search, the pieces, and the bytes of its fullest rank."""
        searches = [self.search] if self.search else []
        if not searches:
            chains = problem.chains.of(problem, self.shape)
            searches = [StageSearch(problem, self.shape, chain, prices) for chain in chains]
        return min(((search, *search.smallest()) for search in searches), key=lambda found: found[2])


def _parts(
    search: StageSearch, pieces: Sequence[Piece], costs: Sequence[StageCost], step_time_s: float
) -> dict[str, float]:
    count, num_stages = search.shape.microbatches, len(costs)
    plain = [search.price(s, replace(piece, recompute="none")) for s, piece in enumerate(pieces)]
    work = sum(
        count * (min(c.forward_s, p.forward_s) + min(c.backward_s, p.backward_s))
        for c, p in zip(costs, plain, strict=True)
    )
    total = sum(count * (c.forward_s + c.backward_s) for c in costs)
    reduction = sum(max(0.0, c.reduce_s - c.reduce_overlap_s) + c.reduce_model_s for c in costs)
    optimizer = sum(c.optimizer_s for c in costs)
    parts = {
        WORK: work,
        "recomputation": total - work,
        "gradient reduction": reduction,
        "optimizer": optimizer,
    }
    parts = {name: seconds / num_stages for name, seconds in parts.items()}
    return {**parts, "bubbles": max(0.0, step_time_s - sum(parts.values()))}


def conclude(
    problem: Problem,
    prices: StagePrices,
    best: Tried,
    tried: Sequence[Tried],
    tight: Sequence[TooLarge],
    open_bound_s: float,
) -> Plan:
    """The best plan with its prediction and the table of candidates: fastest first, then those that do not fit."""
    chosen = best.simulated(problem)
    tried = [chosen if one is best else one for one in tried]
    best = chosen
    rows = {plan_in_words(one.plan): one for one in sorted(tried, key=lambda one: -one.step_time_s)}
    cut_short = problem.budget.cut_short
    kept = [_candidate(one, best, open_bound_s, cut_short) for one in _choose(list(rows.values()), best)]
    fits = {one.shape.group for one in tried}
    lost_tried = [_smallest(problem, prices, one) for one in _nearest(tight) if one.shape.group not in fits]
    # Layouts that were not looked at, because they are no faster than the best plan, may fit where others did not.
    lost_tried = [one for one in lost_tried if one.peak_memory_bytes > problem.memory_limit_bytes]
    lost = [_lacking(problem, one) for one in lost_tried]
    bound_s = min(open_bound_s, best.step_time_s)
    prediction = Prediction(best.step_time_s, best.peak_memory_bytes, bound_s if bound_s > 0 else None)
    problem.kept.extend(
        replace(one.plan, prediction=Prediction(one.step_time_s, one.peak_memory_bytes))
        for one in (*_choose(list(rows.values()), best), *lost_tried)
        if one is not best
    )
    return replace(best.plan, prediction=prediction, candidates=(*kept, *lost))


class NothingFits(ValueError):
    """No plan of a search's space fits in memory. smallest: the one that lacks least, with its prediction."""

    def __init__(self, message: str, smallest: Plan) -> None:
        # Both are arguments, so that it can be pickled: rank 0 plans, and all raise.
        super().__init__(message, smallest)
        self.smallest = smallest

    def __str__(self) -> str:
        return self.args[0]


def nothing_fits(problem: Problem, prices: StagePrices, tight: Sequence[TooLarge]) -> NothingFits:
    """The error that says what the smallest plan that was found lacks."""
    # Bounds come first; a shape whose bound is above a plan already found need not be looked at.
    smallest: tuple[StageSearch, tuple[Piece, ...], int] | None = None
    for one in sorted(tight, key=lambda one: one.least_bytes):
        if smallest is not None and one.least_bytes >= smallest[2]:
            break
        found = one.smallest(problem, prices)
        if smallest is None or found[2] < smallest[2]:
            smallest = found
    assert smallest is not None, "no shape was looked at"
    search, pieces, peak_bytes = smallest
    tried, limit_bytes = Tried.of(problem, search, pieces), problem.memory_limit_bytes
    lacking = _lacking(problem, tried)
    message = (
        f"no plan of {problem.graph.name} on {problem.cluster.world_size} devices fits in {limit_bytes} bytes "
        f"({gib(limit_bytes)}) per device; the smallest found ({lacking.name}) needs {peak_bytes} bytes "
        f"({gib(peak_bytes)}), {peak_bytes - limit_bytes} bytes ({gib(peak_bytes - limit_bytes)}) too many; use more "
        f"devices or devices with more memory, a smaller batch, or fewer constraints ({problem.constraints})"
    )
    prediction = Prediction(tried.step_time_s, peak_bytes)
    return NothingFits(message, replace(tried.plan, prediction=prediction, candidates=(lacking,)))


def _candidate(one: Tried, best: Tried, open_bound_s: float, cut_short: str) -> Candidate:
    verdict = f"{one.step_time_s / best.step_time_s:.2f}x slower: {_reason(one, best)}"
    if one.plan == best.plan:
        verdict = chosen_verdict(best.step_time_s, open_bound_s, cut_short)
    return Candidate(plan_in_words(one.plan), one.step_time_s, one.peak_memory_bytes, verdict)


def chosen_verdict(step_time_s: float, bound_s: float, cut_short: str) -> str:
    """Of the chosen plan. cut_short: what ended the search early, "" if nothing did."""
    short = 1 - min(bound_s / step_time_s, 1.0)
    if short < 5e-4:
        return "chosen"
    why = f" {cut_short}" if cut_short else ""
    return f"chosen; the proof was cut short{why}, no plan is more than {short:.1%} faster"


def _reason(one: Tried, best: Tried) -> str:
    """The part of the step that grew most against the chosen plan."""
    name = max(one.parts_s, key=lambda part: one.parts_s[part] - best.parts_s[part])
    if name == WORK:
        return f"each device works {one.parts_s[WORK] / best.parts_s[WORK]:.2f}x as long"
    return f"{name} {one.parts_s[name] / one.step_time_s:.0%}"


def _smallest(problem: Problem, prices: StagePrices, one: TooLarge) -> Tried:
    search, pieces, _ = one.smallest(problem, prices)
    return Tried.of(problem, search, pieces)


def _lacking(problem: Problem, tried: Tried) -> Candidate:
    lacking = (
        f"needs {gib(tried.peak_memory_bytes - problem.memory_limit_bytes)} more than {gib(problem.memory_limit_bytes)}"
    )
    return Candidate(plan_in_words(tried.plan), tried.step_time_s, tried.peak_memory_bytes, lacking)


def _nearest(tight: Sequence[TooLarge]) -> list[TooLarge]:
    """Of the shapes that do not fit, per degrees and ZeRO level the one that comes nearest; the nearest of these."""
    nearest: dict[tuple, TooLarge] = {}
    for one in sorted(tight, key=lambda one: one.least_bytes):
        nearest.setdefault(one.shape.group, one)
    return list(nearest.values())[:MAX_TOO_LARGE]


def _choose(tried: list[Tried], best: Tried) -> list[Tried]:
    """The best of each combination of degrees and ZeRO level, then runners-up, fastest first."""
    tried = [best, *(one for one in sorted(tried, key=lambda one: one.step_time_s) if one.plan != best.plan)]
    first: dict[tuple, Tried] = {}
    for one in tried:
        first.setdefault(one.shape.group, one)
    kept = list(first.values())[:MAX_CANDIDATES]
    runners_up = [one for one in tried if one not in kept][:MAX_RUNNERS_UP]
    return sorted(kept + runners_up, key=lambda one: one.step_time_s)
