"""Whole plans of any kind, judged exactly and without a walk over their instructions.

A stage's cost depends on what its blocks are, on its mesh and how it is stored, and on how its ranks and the next stage's
lie on hosts; stages that agree in these are priced once (as in planner/pricing.py, for plans of any kind). A plan's step
time is schedule/step_time.py's, its memory schedule/residency.py's; both are the simulator's, to rounding and exactly.
Of schedules without flushes the simulator itself is asked, for its instructions alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..cost.types import StageCost
from ..plan import Layout, Plan, Prediction, Stage
from ..schedule.build import program_for
from ..schedule.orders import schedule_named
from ..schedule.residency import residency
from ..schedule.step_time import exposed_reduce_s, step_time_s
from ..simulate import program_peak_bytes, stream_batch_s
from .problem import Costs, Problem


def plan_time_s(plan: Plan, costs: Sequence[StageCost]) -> float:
    """The step time of a plan whose stages cost that, or what a batch of its stream takes."""
    of_step = step_time_s if schedule_named(plan.schedule).flushes else stream_batch_s
    return of_step(plan.pipeline, plan.microbatches, plan.schedule, costs)


def group_peak_bytes(plan: Plan, group: int, costs: Sequence[StageCost]) -> int:
    """Of one rank of a group whose stages, in ascending order, cost that."""
    if schedule_named(plan.schedule).flushes:
        return residency(plan.schedule, plan.pipeline, plan.microbatches, len(costs), group).peak_bytes(costs)
    program = program_for(plan)
    return program_peak_bytes(program.actions[group], dict(zip(program.stages_of(group), costs, strict=True)))


@dataclass(frozen=True, eq=False)
class Judged:
    """A plan with the costs of its stages and the peak of one rank of each of its groups."""

    plan: Plan
    costs: tuple[StageCost, ...]
    members: tuple[tuple[int, ...], ...]
    peaks_bytes: tuple[int, ...]
    limit_bytes: int

    @cached_property
    def time_s(self) -> float:
        """The simulator's step time."""
        return plan_time_s(self.plan, self.costs)

    @cached_property
    def floor_s(self) -> float:
        """No more than the step time: the work of the busiest group."""
        return max(self.busy_s(group) for group in range(len(self.members)))

    def busy_s(self, group: int) -> float:
        """What a group computes and reduces in a step."""
        mine = [self.costs[s] for s in self.members[group]]
        count, half = self.plan.microbatches, schedule_named(self.plan.schedule).splits_backward
        last_s = max(exposed_reduce_s(cost, half) for cost in mine)
        return last_s + sum(c.prologue_s + count * (c.forward_s + c.backward_s) + c.optimizer_s for c in mine)

    @property
    def over_bytes(self) -> int:
        """What the fullest rank lacks."""
        return max(0, max(self.peaks_bytes) - self.limit_bytes)

    @property
    def fits(self) -> bool:
        return self.over_bytes == 0

    @property
    def bottleneck(self) -> int:
        """The group with most memory if any does not fit, else the busiest."""
        groups = range(len(self.members))
        if not self.fits:
            return max(groups, key=lambda g: self.peaks_bytes[g])
        return max(groups, key=self.busy_s)

    @property
    def waiting_s(self) -> float:
        """How long the busiest group does not compute: what another schedule could save at most."""
        return self.time_s - self.floor_s


class Judge:
    """Prices plans; `num_judged` counts them."""

    def __init__(self, problem: Problem, costs: Costs | None = None) -> None:
        self.problem, self.costs = problem, costs or problem.costs
        self.num_judged = 0
        self._shared = frozenset(problem.graph.shared_parameters)
        self._known: dict[tuple, StageCost] = {}
        self._numbers: dict[Layout, int] = {}
        # By identity, with the layout itself, so that the identity stays taken.
        self._numbered: dict[int, tuple[Layout, int]] = {}
        self._where: dict[tuple, tuple] = {}

    def __call__(self, plan: Plan) -> Judged:
        self.num_judged += 1
        costs = tuple(self.cost(plan, s) for s in range(len(plan.stages)))
        groups = plan.pipeline
        schedule = schedule_named(plan.schedule)
        members: list[list[int]] = [[] for _ in range(groups)]
        for s in range(len(costs)):
            members[schedule.group_of(s, groups)].append(s)
        peaks = tuple(self.peak_bytes(plan, g, [costs[s] for s in mine]) for g, mine in enumerate(members))
        return Judged(plan, costs, tuple(map(tuple, members)), peaks, self.problem.memory_limit_bytes)

    def peak_bytes(self, plan: Plan, group: int, costs: list[StageCost]) -> int:
        """The peak of one rank of a group whose stages cost that."""
        return group_peak_bytes(plan, group, costs)

    def prediction(self, judged: Judged) -> Prediction:
        """What is expected of a plan that it has judged."""
        return Prediction(judged.time_s, max(judged.peaks_bytes))

    def cost(self, plan: Plan, s: int) -> StageCost:
        """The cost model's answer for stage `s`."""
        stage = plan.stages[s]
        blocks = self.problem.graph.blocks[stage.start : stage.stop]
        if self._shared and any(name in self._shared for block in blocks for name in block.parameters):
            # Its place in the pipeline, and the others', matter too.
            return self.costs.stage(plan, s)
        following = plan.stages[s + 1] if s + 1 < len(plan.stages) else None
        key = (
            tuple(block.kind for block in blocks),
            tuple(self.number(plan.layouts[i]) for row in stage.layouts for i in row),
            (stage.data, stage.axes, stage.shares, stage.zero, stage.zero_group, stage.recompute),
            (plan.microbatches, stage.start == 0, all(other.ranks != stage.ranks for other in plan.stages[:s])),
            (following.data, following.axes) if following else None,
            self._hosts(stage, following),
        )
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self.costs.stage(plan, s)
        return found

    def number(self, layout: Layout) -> int:
        """Equal for equal layouts."""
        found = self._numbered.get(id(layout))
        if found is None:
            found = self._numbered[id(layout)] = (layout, self._numbers.setdefault(layout, len(self._numbers)))
        return found[1]

    def _hosts(self, stage: Stage, following: Stage | None) -> tuple:
        """(host relative to the first rank's, ranks in a row on it) of the stage's ranks and the next stage's."""
        after = following.ranks if following else ()
        key = (stage.ranks, after)
        if key not in self._where:
            host = self.problem.cluster.host
            base = host(stage.ranks[0])
            self._where[key] = tuple(
                tuple((h - base, len(list(mine))) for h, mine in itertools.groupby(map(host, ranks)))
                for ranks in (stage.ranks, after)
            )
        return (*self._where[key], after == stage.ranks)
