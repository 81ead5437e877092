"""A plan as the moves of planner/alleviate.py see it: where stages end, and what each group of ranks is.

A plan says everything per stage; a move wants to shift a cut or change a schedule and have the rest follow. So a sketch
has the layouts of *all* blocks for every group, and recomputation is not part of it: that follows from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..graph import Graph
from ..plan import Layout, Plan, Stage
from ..schedule.orders import schedule_named


@dataclass(frozen=True, eq=False)
class Rows:
    """Layouts of all blocks of the model on every model axis; index[axis][block] into `unique`."""

    unique: tuple[Layout, ...] = ()
    index: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Sequence[Layout]]) -> Rows:
        order: dict[Layout, int] = {}
        index = tuple(tuple(order.setdefault(layout, len(order)) for layout in row) for row in rows)
        return cls(tuple(order), index)

    @property
    def axes(self) -> tuple[int, ...]:
        """Degrees of the model axes, outermost first."""
        return tuple(self.unique[row[0]].degree for row in self.index)


@dataclass(frozen=True, slots=True)
class Team:
    """A group of ranks: its mesh, the layouts that every block has on it, and how it stores parameters."""

    ranks: tuple[int, ...]
    data: int
    axes: tuple[int, ...]
    rows: Rows
    zero: int = 0
    zero_group: int = 0
    shares: tuple[int, ...] = ()

    @property
    def tensor(self) -> int:
        return len(self.ranks) // self.data


@dataclass(frozen=True, slots=True)
class Sketch:
    """stops: where each stage ends, the last at the number of blocks. Groups are in the order of their first stages."""

    stops: tuple[int, ...]
    teams: tuple[Team, ...]
    microbatches: int
    schedule: str

    @property
    def virtual(self) -> int:
        """Stages per group."""
        return len(self.stops) // len(self.teams)

    @property
    def edges(self) -> list[tuple[int, int]]:
        return list(zip((0, *self.stops), self.stops, strict=False))

    def plan(self, graph: Graph) -> Plan:
        """The plan of this sketch, recomputing nothing."""
        chosen, first = schedule_named(self.schedule), {}
        layouts: list[Layout] = []
        for team in self.teams:
            if id(team.rows) not in first:
                first[id(team.rows)] = len(layouts)
                layouts += team.rows.unique
        stages = []
        for s, (start, stop) in enumerate(self.edges):
            team = self.teams[chosen.group_of(s, len(self.teams))]
            base = first[id(team.rows)]
            rows = tuple(tuple(base + i for i in row[start:stop]) for row in team.rows.index)
            stages.append(
                Stage(
                    start, stop, team.ranks, team.data, team.axes, rows, (), team.zero, team.zero_group, team.shares
                )
            )  # fmt: skip
        return Plan(
            model=graph.name,
            fingerprint=graph.fingerprint,
            world_size=sum(len(team.ranks) for team in self.teams),
            batch_size=graph.batch_size,
            microbatches=self.microbatches,
            schedule=self.schedule,
            stages=tuple(stages),
            layouts=tuple(layouts),
            precision=graph.precision,
        )

    @classmethod
    def of(cls, plan: Plan) -> Sketch | None:
        """The sketch of a plan whose groups have one mesh; None where they differ, because a block that moved would have
        no layout there."""
        first = plan.stages[0]
        if any((s.data, s.axes, s.shares) != (first.data, first.axes, first.shares) for s in plan.stages):
            return None
        columns = [column for stage in plan.stages for column in plan.layouts_of(stage)]
        rows = Rows.of(list(zip(*columns, strict=True)) if first.axes else ())
        by_ranks = {stage.ranks: stage for stage in reversed(plan.stages)}
        teams = tuple(
            Team(ranks, first.data, first.axes, rows, stage.zero, stage.zero_group, first.shares)
            for ranks, stage in ((ranks, by_ranks[ranks]) for ranks in plan.groups)
        )
        return cls(tuple(stage.stop for stage in plan.stages), teams, plan.microbatches, plan.schedule)

    def with_teams(self, **changes: object) -> Sketch:
        """The same change to every team; what needs a data axis only where there is one."""
        return replace(self, teams=tuple(changed(team, **changes) for team in self.teams))

    @property
    def key(self) -> tuple:
        """What tells sketches apart, without comparing layouts."""
        teams = tuple(
            (t.ranks[0], len(t.ranks), t.data, t.axes, id(t.rows), t.zero, t.zero_group, t.shares) for t in self.teams
        )
        return self.stops, teams, self.microbatches, self.schedule


def changed(team: Team, **changes: object) -> Team:
    """The team with other fields; ZeRO stays off where there is no data axis."""
    new = replace(team, **changes)
    if new.data == 1 or new.zero == 0:
        new = replace(new, zero=new.zero if new.data > 1 else 0, zero_group=0)
    return new
