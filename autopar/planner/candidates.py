"""What a search says about the plans that it considered: each one's prediction, and why it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cost.types import StageCost
from ..plan import Candidate, Plan, Prediction
from ..report.words import gib, plan_in_words
from ..simulate import simulate
from .pricing import Piece, assemble
from .problem import Problem, Shape
from .stages import StageSearch


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan that was simulated, with where its step time goes (seconds, mean over stages)."""

    plan: Plan
    shape: Shape
    step_time_s: float
    peak_memory_bytes: int
    parts_s: dict[str, float]

    @classmethod
    def of(cls, problem: Problem, search: StageSearch, pieces: tuple[Piece, ...]) -> Tried:
        plan = assemble(problem, search.shape, search.chain, pieces)
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        costs = [problem.costs.stage(plan, s) for s in range(plan.pipeline)]
        peak_bytes = max(line.peak_memory_bytes.values())
        return cls(plan, search.shape, line.step_time_s, peak_bytes, _parts(search, pieces, costs, line.step_time_s))

    @property
    def group(self) -> tuple[int, int, int, int]:
        return (self.shape.pipeline, self.shape.data, self.shape.tensor, self.shape.zero)


def _parts(search: StageSearch, pieces: Sequence[Piece], costs: Sequence[StageCost], step_time_s: float) -> dict[str, float]:
    count, num_stages = search.shape.microbatches, len(costs)
    plain = [search.price(s, replace(piece, recompute="none")) for s, piece in enumerate(pieces)]
    work = sum(count * (min(c.forward_s, p.forward_s) + min(c.backward_s, p.backward_s)) for c, p in zip(costs, plain, strict=True))
    total = sum(count * (c.forward_s + c.backward_s) for c in costs)
    reduction = sum(max(0.0, c.reduce_s - c.reduce_overlap_s) + c.reduce_model_s for c in costs)
    optimizer = sum(c.optimizer_s for c in costs)
    parts = {
        "work inside the stages": work,
        "recomputation": total - work,
        "gradient reduction": reduction,
        "optimizer": optimizer,
    }
    parts = {name: seconds / num_stages for name, seconds in parts.items()}
    return {**parts, "bubbles": max(0.0, step_time_s - sum(parts.values()))}


def conclude(
    problem: Problem, best: Tried, tried: Sequence[Tried], tight: Sequence[StageSearch], bound_s: float, limit: int
) -> Plan:
    """The best plan with its prediction and the table of candidates: fastest first, then those that do not fit."""
    rows: dict[str, Candidate] = {}
    for one in sorted(tried, key=lambda one: one.step_time_s):
        rows.setdefault(_name(one.plan), _candidate(one, best, bound_s))
    gap = limit - min(len(rows), limit)
    lost = sorted((_lacking(problem, search) for search in _one_per_group(tight)), key=lambda c: c.peak_memory_bytes)
    kept = _trim(list(rows.values()), limit) + lost[: max(gap, limit // 4)]
    return replace(best.plan, prediction=Prediction(best.step_time_s, best.peak_memory_bytes), candidates=tuple(kept))


def too_little_memory(problem: Problem, tight: Sequence[StageSearch]) -> ValueError:
    """The error when nothing fits: the smallest plan that was found, and what it lacks."""
    ways = [(search.smallest(), search) for search in tight]
    (pieces, peak_bytes), search = min(ways, key=lambda way: way[0][1])
    limit_bytes = problem.memory_limit_bytes
    name = _name(assemble(problem, search.shape, search.chain, pieces))
    return ValueError(
        f"no plan of {problem.graph.name} on {problem.cluster.world_size} devices fits in {limit_bytes} bytes "
        f"({gib(limit_bytes)}) per device; the smallest found ({name}) needs {peak_bytes} bytes ({gib(peak_bytes)}), "
        f"{peak_bytes - limit_bytes} bytes ({gib(peak_bytes - limit_bytes)}) too many; use more devices or devices with "
        f"more memory, a smaller batch, or fewer constraints ({problem.constraints})"
    )


def _candidate(one: Tried, best: Tried, bound_s: float) -> Candidate:
    verdict = f"{one.step_time_s / best.step_time_s:.2f}x slower: {_reason(one, best)}"
    if one.plan == best.plan:
        short = best.step_time_s / bound_s - 1 if bound_s < best.step_time_s else 0.0
        verdict = "chosen" if short < 5e-4 else f"chosen; not proved optimal, at most {short:.1%} from it"
    return Candidate(_name(one.plan), one.step_time_s, one.peak_memory_bytes, verdict)


def _reason(one: Tried, best: Tried) -> str:
    """The part of the step that grew most against the chosen plan."""
    name = max(one.parts_s, key=lambda part: one.parts_s[part] - best.parts_s[part])
    return f"{name} {one.parts_s[name] / one.step_time_s:.0%}"


def _lacking(problem: Problem, search: StageSearch) -> Candidate:
    pieces, peak_bytes = search.smallest()
    tried = Tried.of(problem, search, pieces)
    lacking = f"needs {gib(peak_bytes - problem.memory_limit_bytes)} more than {gib(problem.memory_limit_bytes)}"
    return Candidate(_name(tried.plan), tried.step_time_s, tried.peak_memory_bytes, lacking)


def _one_per_group(tight: Sequence[StageSearch]) -> list[StageSearch]:
    """Of the shapes that do not fit, per degrees and ZeRO level the one that comes nearest."""
    nearest: dict[tuple, tuple[int, StageSearch]] = {}
    for search in tight:
        group = (search.shape.pipeline, search.shape.data, search.shape.tensor, search.shape.zero)
        peak_bytes = search.smallest()[1]
        if group not in nearest or peak_bytes < nearest[group][0]:
            nearest[group] = (peak_bytes, search)
    return [search for _, search in nearest.values()]


def _trim(rows: list[Candidate], limit: int) -> list[Candidate]:
    """At most `limit` rows: the best of each combination of degrees and ZeRO level, then the runners-up."""
    first = list({_group(row): row for row in reversed(rows)}.values())
    kept = sorted(first, key=lambda row: row.step_time_s)[:limit]
    kept += [row for row in rows if row not in kept][: min(3, limit - len(kept))]
    return sorted(kept, key=lambda row: row.step_time_s)


def _group(row: Candidate) -> tuple[str, ...]:
    words = row.name.split(", ")
    return (words[0], *(word for word in words if word.startswith("zero")))


def _name(plan: Plan) -> str:
    return plan_in_words(plan)
