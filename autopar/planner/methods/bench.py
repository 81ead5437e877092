"""What every published method stands on: prices of pieces, plans from pieces, and a judge that keeps the best.

The methods judge by their authors' own objective while they search. What they then offer is simulated here, so that
all answer to one cost model; an offer that `Plan.validate` refuses is dropped.

A method asks `spent` in its loops, and `over` in steps that take long before they give a plan. Prices are asked for in
every such step, so `cost` looks at the clock too.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from ...cost.types import StageCost
from ...plan import Candidate, Plan, Prediction, Recompute, Stage, same_recompute, tensor_axes
from ...report.words import gib, plan_in_words
from ...schedule.orders import schedule_named
from ...schedule.residency import residency
from ...schedule.step_time import step_time_s
from ...simulate import simulate
from ..candidates import MAX_WALKED
from ..pricing import Piece, StagePrices
from ..problem import Chain, Costs, Problem, Shape
from ..rivals import Rivals

# Rows of the table of candidates that a method's plan carries.
MAX_CANDIDATES = 8
# Shapes that are tried when nothing fits that a method finds.
MAX_FALL_BACKS = 12


@dataclass(frozen=True, slots=True)
class Part:
    """One stage as a method decides it; `ranks` in row-major order of (data, tensor).

    recompute: one choice per block, or () for none. shares: rows per data rank, () where equal.
    """

    start: int
    stop: int
    ranks: tuple[int, ...]
    data: int
    tensor: int = 1
    recompute: tuple[Recompute, ...] = ()
    zero: int = 0
    shares: tuple[int, ...] = ()


class Spent(Exception):
    """The search's time is over, and it has a plan. Ends the `with` block of a `Bench`, if nothing does before."""


@dataclass
class Bench:
    """One run of one method: `with Bench(problem, "alpa") as bench: ...; return bench.best_plan()`.

    An interrupt (Ctrl-C) ends the `with` block in peace once there is a plan; before, it goes on to the caller. So does
    the end of the time in the middle of a step.
    """

    problem: Problem
    name: str
    _best: Plan | None = None
    _smallest: Plan | None = None
    _offers: dict[Plan, int] = field(default_factory=dict)
    _refusal: str = ""

    def __post_init__(self) -> None:
        self.prices = StagePrices(self.problem.as_equal)
        self._chains: dict[tuple, tuple[Chain, ...]] = {}
        self._predictions: dict[Plan, tuple[float, dict[int, int]]] = {}
        self._bar = self.problem.budget.bar(self.name, " plans")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> bool:
        self._bar.close()
        if kind is KeyboardInterrupt and self._offers:
            self.problem.budget.interrupted()
            return True
        return kind is Spent

    @property
    def spent(self) -> bool:
        """Whether to end the search: its time is over and it has a plan, or it was asked to stop."""
        return self.problem.budget.expired(has_plan=bool(self._offers))

    @property
    def over(self) -> bool:
        """Whether its time is over, plan or none: ends a step that `secure` can replace."""
        return self.problem.budget.expired()

    # -- the space

    @property
    def unequal(self) -> bool:
        """Whether stages may differ in their meshes: not where the constraints ask for one."""
        pinned = self.problem.constraints
        free = all(value is None for value in (pinned.data, pinned.tensor, pinned.pipeline)) and pinned.zero in (
            None,
            0,
        )
        return self.problem.unequal_stages and free and not self.problem.batch_conflict

    @property
    def num_blocks(self) -> int:
        return len(self.problem.graph.blocks)

    @property
    def world_size(self) -> int:
        return self.problem.cluster.world_size

    def shapes(self, *wishes: Callable[[Shape], bool]) -> list[Shape]:
        """The shapes that the constraints allow; of these, wish by wish, those that meet it, if any do.

        1F1B is wished for first of all: none of the methods chooses among synchronous schedules. In a fixed random
        order, so that a search whose time is up has seen all kinds.
        """
        found = list(self.problem.shapes)
        for wish in (lambda shape: shape.schedule == "1f1b", *wishes):
            found = [shape for shape in found if wish(shape)] or found
        random.Random(0).shuffle(found)
        return found

    def chains(self, shape: Shape) -> tuple[Chain, ...]:
        """The fastest layouts of a shape first."""
        key = (shape.data, shape.tensor, shape.microbatches, shape.zero, shape.schedule, shape.pipeline)
        if key not in self._chains:
            self._chains[key] = tuple(self.problem.chains.of(self.problem.as_equal, shape))
        return self._chains[key]

    def fastest(self, shape: Shape) -> Chain:
        """The fastest chain alone."""
        key = (shape.data, shape.tensor, shape.microbatches, shape.zero)
        if key not in self._chains:
            self._chains[key] = (next(iter(self.problem.chains.of(self.problem.as_equal, shape))),)
        return self._chains[key][0]

    # -- prices

    def cost(self, shape: Shape, start: int, stop: int, recompute: Recompute = "none") -> StageCost:
        """Blocks [start, stop) as one stage, with others of the same mesh before and behind where there are blocks.

        `Spent` when the time is over and there is a plan.
        """
        if self.spent:
            raise Spent
        before, behind = start > 0, stop < self.num_blocks
        around = replace(shape, pipeline=1 + before + behind)
        return self.prices.cost(around, self.fastest(shape), int(before), Piece(start, stop, recompute))

    def block_costs(self, shape: Shape, recompute: Recompute = "none") -> list[StageCost]:
        """Each block as a stage of its own."""
        return [self.cost(shape, b, b + 1, recompute) for b in range(self.num_blocks)]

    # -- plans

    def plan(self, parts: Sequence[Part], microbatches: int, schedule: str = "1f1b") -> Plan:
        """The plan of these parts, each with the fastest layouts of its mesh."""
        stages, layouts = [], {}
        for part in parts:
            chain = self.fastest(Shape(len(parts), part.data, part.tensor, microbatches, schedule, part.zero))
            rows = ()
            if part.tensor > 1:
                used = [chain.unique[i] for i in chain.index[part.start : part.stop]]
                rows = (tuple(layouts.setdefault(layout, len(layouts)) for layout in used),)
            kept = part.recompute if any(choice != "none" for choice in part.recompute) else ()
            stages.append(
                Stage(
                    part.start, part.stop, part.ranks, part.data, tensor_axes(part.tensor), rows, kept,
                    part.zero if part.data > 1 else 0, 0, part.shares,
                )
            )  # fmt: skip
        graph = self.problem.graph
        return Plan(
            model=graph.name,
            fingerprint=graph.fingerprint,
            world_size=self.world_size,
            batch_size=graph.batch_size,
            microbatches=microbatches,
            schedule=schedule,
            stages=tuple(stages),
            layouts=tuple(layouts),
        )

    def equal_plan(self, shape: Shape, cuts: Sequence[int], recompute: Sequence[Recompute] | None = None) -> Plan:
        """The plan of a shape whose stages end at `cuts` (the last one is the number of blocks)."""
        edges = list(itertools.pairwise((0, *cuts)))
        choices = recompute or [self.problem.recompute_choices[0]] * len(edges)
        parts = [
            Part(start, stop, shape.ranks(s), shape.data, shape.tensor, same_recompute(choices[s], stop - start), shape.zero)
            for s, (start, stop) in enumerate(edges)
        ]  # fmt: skip
        return self.plan(parts, shape.microbatches, shape.schedule)

    def uniform(self, plan: Plan) -> Plan:
        """The plan with all blocks of a stage recomputed where any is: not every runtime mixes within a stage."""
        return replace(
            plan,
            stages=tuple(
                replace(stage, recompute=same_recompute("full", stage.num_blocks))
                if "full" in stage.recompute
                else stage
                for stage in plan.stages
            ),
        )

    def relieved(self, plan: Plan) -> Plan:
        """The plan with recomputation in the stages that do not fit without, where the constraints allow a choice."""
        if "full" not in self.problem.recompute_choices:
            return plan
        _, peaks_bytes = self._predicted(plan, self.problem.costs)
        stages = tuple(
            replace(stage, recompute=same_recompute("full", stage.num_blocks))
            if self.problem.excess_bytes({rank: peaks_bytes[rank] for rank in stage.ranks}) > 0
            else stage
            for stage in plan.stages
        )
        return replace(plan, stages=stages)

    def fall_back(self, shapes: Sequence[Shape]) -> None:
        """Where nothing that was offered fits: even cuts of the shapes that leave least to a device, recomputing."""
        if self.best is not None or self.problem.budget.expired(has_plan=False):
            return
        smallest = sorted(shapes, key=lambda s: (-s.pipeline * s.tensor, -s.microbatches))
        for i, shape in enumerate(smallest[:MAX_FALL_BACKS]):
            if (i and self.spent) or self._offer_even(shape) < math.inf:
                return

    def secure(self, shape: Shape) -> None:
        """Where the time is over before anything was offered: even cuts of this shape, in the place of what would have been
        found."""
        if not self._offers and self.over:
            self._offer_even(shape)

    def _offer_even(self, shape: Shape) -> float:
        """Offer even cuts of a shape, and the same with recomputation where it needs that."""
        plan = self.equal_plan(shape, [self.num_blocks * (s + 1) // shape.pipeline for s in range(shape.pipeline)])
        return min(self.offer(plan), self.offer(self.relieved(plan)))

    # -- the judge

    def offer(self, plan: Plan | None, costs: Costs | None = None) -> float:
        """Simulate a plan and keep it if it is the best; its step time, infinite where it is refused or does not fit.

        costs: of the plan's own graph, where it rewrites the problem's.
        """
        if plan is None:
            return math.inf
        try:
            plan.validate(self.problem.graph, self.problem.cluster)
        except ValueError as error:
            self._refusal = self._refusal or str(error)
            return math.inf
        pins = self.problem.pins
        refusal = (pins.on(plan.graph_of(pins.graph)) if plan.rewrites else pins).refusal(plan)
        if refusal:
            self._refusal = self._refusal or refusal
            return math.inf
        step_s, peaks_bytes = self._predicted(plan, costs or self.problem.costs)
        plan = replace(plan, prediction=Prediction(step_s, max(peaks_bytes.values())))
        self._bar.update()
        excess_bytes = self._offers[plan] = self.problem.excess_bytes(peaks_bytes)
        if self._smallest is None or excess_bytes < self._offers[self._smallest]:
            self._smallest = plan
        if excess_bytes > 0:
            return math.inf
        if self._best is None or step_s < self._best.prediction.step_time_s:
            self._best = plan
        return step_s

    def _predicted(self, plan: Plan, costs: Costs) -> tuple[float, dict[int, int]]:
        """Step time, and peak bytes by rank: the simulator's; of a long program what says the same without a walk over it."""
        if plan not in self._predictions:
            chosen = schedule_named(plan.schedule)
            if chosen.flushes and chosen.virtual == 1 and plan.pipeline * plan.microbatches > MAX_WALKED:
                self._predictions[plan] = self._predicted_at_once(plan, costs)
            else:
                line = simulate(self.problem.graph, plan, self.problem.cluster, model=costs)
                self._predictions[plan] = line.step_time_s, dict(line.peak_memory_bytes)
        return self._predictions[plan]

    def _predicted_at_once(self, plan: Plan, costs: Costs) -> tuple[float, dict[int, int]]:
        stages = [costs.stage(plan, s) for s in range(len(plan.stages))]
        step_s = step_time_s(plan.pipeline, plan.microbatches, plan.schedule, stages)
        peaks_bytes: dict[int, int] = {}
        for s, ranks in enumerate(plan.groups):
            held = residency(plan.schedule, plan.pipeline, plan.microbatches, 1, s)
            if self.problem.cluster.hosts:
                peaks_bytes |= {rank: held.peak_bytes([costs.of_rank(plan, s, rank)]) for rank in ranks}
            else:
                peaks_bytes |= dict.fromkeys(ranks, held.peak_bytes([stages[s]]))
        return step_s, peaks_bytes

    @property
    def best_s(self) -> float:
        """The step time of the best plan that fits, infinite as long as there is none."""
        return self._best.prediction.step_time_s if self._best else math.inf

    @property
    def best(self) -> Plan | None:
        return self._best

    def best_plan(self) -> Plan:
        """The fastest offer that fits, with the others as its candidates; where none fits, the smallest, which says so.

        ValueError when nothing was offered that the runtime can execute, or the search was stopped before.
        """
        chosen, budget = self._best or self._smallest, self.problem.budget
        if chosen is None and budget.cut_short:
            raise budget.no_plan(self.name)
        if chosen is None:
            why = f"; the first refusal: {self._refusal}" if self._refusal else ""
            raise ValueError(
                f"method={self.name!r} finds no plan of {self.problem.graph.name} on {self.world_size} devices that can "
                f"be run under {self.problem.constraints}{why}; use method='auto'"
            )
        rows = sorted(self._offers, key=lambda plan: (plan is not chosen, plan.prediction.step_time_s))
        self.problem.kept.extend(plan for plan in rows[:MAX_CANDIDATES] if plan is not chosen)
        return replace(chosen, candidates=tuple(self._rows(rows, chosen)))

    def _rows(self, plans: Iterable[Plan], chosen: Plan) -> Iterator[Candidate]:
        seen, rivals = set(), Rivals(self.problem, chosen)
        for plan in plans:
            name = plan_in_words(plan)
            if name in seen or len(seen) >= MAX_CANDIDATES:
                continue
            seen.add(name)
            step_s, peak_bytes = plan.prediction.step_time_s, plan.prediction.peak_memory_bytes
            excess_bytes = self._offers[plan]
            limit = "its devices have" if self.problem.cluster.hosts else gib(self.problem.memory_limit_bytes)
            over = f"needs {gib(excess_bytes)} more than {limit}" if excess_bytes > 0 else ""
            if plan == chosen:
                verdict = "chosen" if not over else f"the smallest of what {self.name} finds, but {over}"
                if self.problem.budget.cut_short:
                    verdict += f"; the search was cut short {self.problem.budget.cut_short}"
            else:
                verdict = over or rivals.verdict(plan)
            yield Candidate(name, step_s, peak_bytes, verdict)


def split_rows(rows: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers that sum to `rows`, in proportion to the weights, each at least 1: largest remainders first.

    ValueError when there are fewer rows than weights.
    """
    if rows < len(weights):
        raise ValueError(f"{rows} rows for {len(weights)} data ranks; expected at least one each")
    total = sum(weights)
    exact = [rows * weight / total for weight in weights]
    found = [max(1, math.floor(share)) for share in exact]
    while sum(found) < rows:
        found[max(range(len(found)), key=lambda i: exact[i] - found[i])] += 1
    while sum(found) > rows:
        found[min((i for i in range(len(found)) if found[i] > 1), key=lambda i: exact[i] - found[i])] -= 1
    return tuple(found)
