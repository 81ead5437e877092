"""Bottleneck alleviation on clusters of unequal devices: the moves of planner/alleviate.py, from the best plans of the walks.

Groups keep their devices and meshes; schedules, ZeRO by group, microbatches, cuts, and recomputation block by block are what
moves change. Stages are priced by the devices of their very ranks, and each rank's peak is held against its own device:
what it has above (below) its limit counts as above (below) the least limit of all, so that what fits there fits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..cost.mixed import RankClass, rank_classes
from ..cost.types import StageCost
from ..plan import Plan, Prediction
from ..schedule.orders import schedule_named
from .alleviate import Alleviation
from .judge import Judge, Judged, group_peak_bytes
from .meshes import Mesh, MeshLayouts, has_asked_axes, team_of
from .moves import CHEAP
from .problem import Problem
from .sketch import Sketch

# Process seconds that it takes at most, and plans that it starts from.
LIMIT_S, MAX_STARTS = 1.0, 12


class RanksJudge(Judge):
    """As `Judge`, where devices differ."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._of_ranks: dict[tuple, StageCost] = {}

    def peak_bytes(self, plan: Plan, group: int, costs: list[StageCost]) -> int:
        """The peak of the rank that has least left, counted so that the problem's limit is its own."""
        problem, peaks = self.problem, self._class_peaks(plan, group)
        return max(
            peak + problem.memory_limit_bytes - min(map(problem.memory_limit_of, one.ranks)) for one, peak in peaks
        )

    def prediction(self, judged: Judged) -> Prediction:
        plan = judged.plan
        peaks = (peak for group in range(plan.pipeline) for _, peak in self._class_peaks(plan, group))
        return Prediction(judged.time_s, max(peaks))

    def _class_peaks(self, plan: Plan, group: int) -> list[tuple[RankClass, int]]:
        """The peak of a rank of each class of a group."""
        members = [s for s, stage in enumerate(plan.stages) if stage.ranks == plan.groups[group]]
        return [
            (one, group_peak_bytes(plan, group, [self._cost(plan, s, one.ranks[0]) for s in members]))
            for one in rank_classes(self.problem.cluster, plan.stages[members[0]])
        ]

    def cost(self, plan: Plan, s: int) -> StageCost:
        return self._cost(plan, s, None)

    def _cost(self, plan: Plan, s: int, rank: int | None) -> StageCost:
        stage = plan.stages[s]
        following = plan.stages[s + 1] if s + 1 < len(plan.stages) else None
        layouts = tuple(self.number(plan.layouts[i]) for row in stage.layouts for i in row)
        after = (following.ranks, following.data, following.axes, following.shares) if following else None
        first = all(other.ranks != stage.ranks for other in plan.stages[:s])
        key = (
            stage.start, stage.stop, stage.ranks, stage.data, stage.axes, stage.shares, stage.zero, stage.zero_group,
            stage.recompute, layouts, after, first, plan.microbatches, rank,
        )  # fmt: skip
        if self._shared or key not in self._of_ranks:
            costs = self.problem.costs
            self._of_ranks[key] = costs.stage(plan, s) if rank is None else costs.of_rank(plan, s, rank)
        return self._of_ranks[key]


def alleviated_on_ranks(problem: Problem, plan: Plan, others: Iterable[Plan] = ()) -> Plan | None:
    """A plan faster than `plan`, which has its prediction; None if none was found. others: next best plans, the best first, to
    start from too. Each start is tried with every ZeRO level, of which the walks know two."""
    limit_s = min(LIMIT_S, problem.budget.left_s)
    search = Alleviation(problem, limit_s, CHEAP, RanksJudge(problem))
    found = search.run_from(_starts(problem, [plan, *others][:MAX_STARTS]), plan.prediction.step_time_s)
    return found.judged.plan if found is not None else None


def _starts(problem: Problem, plans: Iterable[Plan]) -> Iterator[Sketch]:
    pinned = problem.constraints.zero
    for plan in plans:
        sketch = sketch_on_ranks(problem, plan)
        if sketch is None:
            continue
        yield sketch
        if pinned is None and schedule_named(plan.schedule).may_shard:
            yield from (sketch.with_teams(zero=zero) for zero in range(4))


def sketch_on_ranks(problem: Problem, plan: Plan) -> Sketch | None:
    """The plan with the fastest layouts of each stage's mesh for all blocks; None where a stage has other model axes than
    are asked for, or a group several stages."""
    if plan.pipeline != len(plan.stages) or not all(has_asked_axes(problem, stage) for stage in plan.stages):
        return None
    layouts, teams = MeshLayouts(problem.as_equal), []
    for stage in plan.stages:
        mesh = Mesh(stage.data, stage.tensor, stage.shares)
        try:
            rows = layouts.fastest(mesh, plan.microbatches, stage.zero)
        except ValueError:  # nothing is legal for so many shares of the batch
            return None
        teams.append(team_of(mesh, stage.ranks, rows, stage.zero))
    return Sketch(tuple(stage.stop for stage in plan.stages), tuple(teams), plan.microbatches, plan.schedule)
