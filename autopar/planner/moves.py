"""Moves: changes to a sketch that take load off what bounds it, by kind, the ones that price least first.

    schedule      another order of the same work, with more stages per group where it wants them: against bubbles
    store         ZeRO level and its group, for all groups or for the bottleneck: against memory, or its traffic
    microbatches  twice or half as many: bubbles and memory against efficiency and traffic
    cuts          blocks go from the bottleneck to the groups that wait most, one at a time or balanced anew
    axes          two model axes in the place of one, or a second one with ranks taken from data (planner/two_axes.py)

What a move leads to is judged exactly; these functions only propose. Each yields distinct sketches in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..cost.model import CostModel
from ..schedule.orders import SCHEDULES, Schedule, schedule_named
from .judge import Judge, Judged
from .problem import Problem, Shape
from .sketch import Sketch, Team, changed
from .two_axes import AxisPairs

# Stages per group that are tried for schedules that run any number.
MOST_VIRTUAL = 6
# Forwards and backwards beyond which the step time of a schedule without a recurrence takes too long to compute.
MOST_UNITS = 12_000
# Up to so many stages all cuts are tried both ways.
FEW_STAGES = 8
# Groups that a bottleneck's blocks are offered to.
TARGETS = 3

Move = Callable[["Moves", Sketch, Judged], Iterator[Sketch]]


class Moves:
    """The moves that the constraints of a problem leave."""

    def __init__(self, problem: Problem, judge: Judge) -> None:
        self.problem, self._judge = problem, judge
        self._weights: dict[tuple, list[float]] = {}
        self._pairs = AxisPairs(problem)

    # -- schedule

    def schedules(self, now: Sketch, judged: Judged) -> Iterator[Sketch]:
        yield from self.orders(now)

    def orders(self, now: Sketch) -> Iterator[Sketch]:
        """The sketch under the other schedules, or under the one that is pinned; without a flush only if it is."""
        groups, num_blocks = len(now.teams), now.stops[-1]
        if groups == 1:
            return
        for name, chosen in SCHEDULES.items():
            if not self.problem.constraints.may_have(chosen):
                continue
            microbatches = self._microbatches_under(chosen, now)
            if microbatches is None:
                continue
            for virtual in laps_of(chosen):
                if groups * virtual > num_blocks or (name, virtual) == (now.schedule, now.virtual):
                    continue
                if virtual > 1 and 2 * groups * virtual * now.microbatches > MOST_UNITS:
                    continue
                stops = now.stops
                if virtual != now.virtual:
                    stops = self.balanced_stops(now, name, groups * virtual)
                other = replace(now, schedule=name, stops=stops, microbatches=microbatches)
                if not chosen.may_shard and any(team.zero for team in now.teams):
                    if self.problem.constraints.zero:
                        continue
                    other = other.with_teams(zero=0)
                yield other

    def _microbatches_under(self, chosen: Schedule, now: Sketch) -> int | None:
        """As many as there are, where the schedule wants others as few as it may have; None if the batch has no such."""
        counts = (
            (now.microbatches,) if chosen.flushes else (now.microbatches, *range(1, self.problem.graph.batch_size + 1))
        )
        return next((count for count in counts if self._may_have(chosen, now, count)), None)

    def _may_have(self, chosen: Schedule, now: Sketch, count: int) -> bool:
        """Whether the sketch can have so many microbatches under a schedule."""
        if count != now.microbatches:
            rows, pinned = self.problem.graph.batch_size, self.problem.constraints.microbatches
            if pinned is not None or (count > 1 and self.problem.time_conflict):
                return False
            if any(team.shares or rows % (count * team.data) for team in now.teams):
                return False
        try:
            chosen.check_microbatches(len(now.teams), count)
        except ValueError:
            return False
        return True

    # -- storage over the data axis

    def store(self, now: Sketch, judged: Judged) -> Iterator[Sketch]:
        if not SCHEDULES[now.schedule].may_shard:
            return
        pinned = self.problem.constraints.zero
        levels = (0, 1, 2, 3) if pinned is None else (pinned,)
        worst = judged.bottleneck
        for level in levels:
            for group in self._groups(now.teams[worst], level):
                everywhere = now.with_teams(zero=level, zero_group=group)
                if everywhere.key != now.key:
                    yield everywhere
                teams = list(now.teams)
                teams[worst] = changed(teams[worst], zero=level, zero_group=group)
                alone = replace(now, teams=tuple(teams))
                if len(teams) > 1 and alone.key != now.key and not self.problem.graph.shared_parameters:
                    yield alone

    def _groups(self, team: Team, level: int) -> Iterator[int]:
        """All data ranks, and those of one host where these are fewer."""
        yield 0
        if level and team.data > 1:
            line = team.ranks[:: team.tensor]
            host = self.problem.cluster.host
            inside = next((i for i, rank in enumerate(line) if host(rank) != host(line[0])), len(line))
            if 2 <= inside < team.data and team.data % inside == 0:
                yield inside

    # -- microbatches

    def microbatches(self, now: Sketch, judged: Judged) -> Iterator[Sketch]:
        count, chosen = now.microbatches, SCHEDULES[now.schedule]
        for other in (count * 2, count // 2 if count % 2 == 0 else 0):
            if other and self._may_have(chosen, now, other):
                yield replace(now, microbatches=other)

    # -- cuts

    def cuts(self, now: Sketch, judged: Judged) -> Iterator[Sketch]:
        seen = {now.stops}
        for stops in self._shifted(now, judged):
            sizes = [stop - start for start, stop in zip((0, *stops), stops, strict=False)]
            if stops not in seen and min(sizes) > 0:
                seen.add(stops)
                yield replace(now, stops=stops)

    def _shifted(self, now: Sketch, judged: Judged) -> Iterator[tuple[int, ...]]:
        """One block from a stage of the bottleneck, through the stages between, to one of a group that waits; where there
        are few stages every cut by one block too; and all cuts anew."""
        chosen = SCHEDULES[now.schedule]
        groups = len(now.teams)
        home = [chosen.group_of(s, groups) for s in range(len(now.stops))]
        worst = judged.bottleneck
        least = sorted((g for g in range(groups) if g != worst), key=judged.busy_s)[:TARGETS]
        for source in judged.members[worst]:
            near = sorted((s for s, g in enumerate(home) if g in least), key=lambda s: (abs(s - source), s))
            for target in near[: 2 * TARGETS]:
                low, high, shift = (target, source, 1) if target < source else (source, target, -1)
                yield tuple(stop + (shift if low <= s < high else 0) for s, stop in enumerate(now.stops))
        if len(now.stops) <= FEW_STAGES:
            for cut in range(len(now.stops) - 1):
                for shift in (1, -1):
                    yield tuple(stop + (shift if s == cut else 0) for s, stop in enumerate(now.stops))
        yield self.balanced_stops(now, now.schedule, len(now.stops))

    def balanced_stops(self, now: Sketch, schedule: str, num_stages: int) -> tuple[int, ...]:
        """Where so many stages end whose slowest is as fast as can be, each on the group that the schedule runs it on."""
        chosen, weights = schedule_named(schedule), [self.block_s(now, team) for team in now.teams]
        if all(one is weights[0] for one in weights):
            return balanced(weights[0], num_stages)
        groups = len(now.teams)
        return balanced_over([weights[chosen.group_of(s, groups)] for s in range(num_stages)])

    def block_s(self, now: Sketch, team: Team) -> list[float]:
        """Forward and backward of every block on a group, as a stage of its own."""
        graph = self.problem.graph
        num_blocks = len(graph.blocks)
        # On equal devices all groups of one mesh are alike.
        ranks = team.ranks if self.problem.cluster.hosts else len(team.ranks)
        key = (id(team.rows), team.data, team.axes, team.shares, now.microbatches, ranks)
        if key not in self._weights:
            known: dict[tuple, float] = {}
            found = []
            for block in graph.blocks:
                kind = (block.kind, *(row[block.index] for row in team.rows.index))
                if kind not in known:
                    edges = sorted({0, block.index, block.index + 1, num_blocks} - {0})
                    alone = replace(now, stops=tuple(edges), teams=(team,) * len(edges), schedule="1f1b")
                    cost = self._judge.cost(alone.plan(graph), edges.index(block.index + 1))
                    known[kind] = cost.forward_s + cost.backward_s
                found.append(known[kind])
            self._weights[key] = found
        return self._weights[key]

    # -- model axes

    def axes(self, now: Sketch, judged: Judged) -> Iterator[Sketch]:
        team, pinned = now.teams[0], self.problem.constraints
        alike = all((t.data, t.axes, t.shares) == (team.data, team.axes, ()) for t in now.teams)
        # Made-up costs have no prices of ops, from which layouts follow; roles say what axes there are.
        if pinned.roles or not alike or len(team.axes) != 1 or not isinstance(self.problem.costs, CostModel):
            return
        meshes = [(team.data, a, team.tensor // a) for a in range(2, team.tensor // 2 + 1) if team.tensor % a == 0]
        if team.data % 2 == 0 and pinned.data is None and pinned.tensor is None:
            meshes.append((team.data // 2, 2, team.tensor))
        for data, outer, inner in meshes:
            if data == 1 and pinned.zero:
                continue
            shape = Shape(len(now.teams), data, outer * inner, now.microbatches, now.schedule, team.zero)
            for rows in self._pairs.of(shape, outer, inner):
                yield now.with_teams(data=data, axes=(outer, inner), rows=rows)


def laps_of(chosen: Schedule) -> Iterator[int]:
    """Stages per group that are tried under a schedule."""
    yield from (chosen.virtual,) if chosen.virtual else range(2, MOST_VIRTUAL + 1)


def balanced(weights: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Ends of `num_parts` runs, none empty, whose heaviest weighs least."""
    return balanced_over([weights] * num_parts)


def balanced_over(weights: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Ends of one run per row, none empty, whose heaviest weighs least: bisection over what a run may weigh.

    weights: [part][item], what an item weighs in that part.
    """
    low, high = max(map(min, zip(*weights, strict=True))), max(map(sum, weights))
    best = _filled(weights, high)
    for _ in range(40):
        middle = (low + high) / 2
        found = _filled(weights, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None
    return best


def _filled(weights: Sequence[Sequence[float]], most: float) -> tuple[int, ...] | None:
    """Runs filled from the back, so that what is left over makes the first ones light; None if they do not hold all."""
    part, held_s, size = len(weights) - 1, 0.0, 0
    stops = [len(weights[0])]
    for i in range(len(weights[0]) - 1, -1, -1):
        if size and (held_s + weights[part][i] > most * (1 + 1e-12) or i + 1 <= part):
            if part == 0:
                return None
            stops.append(i + 1)
            part, held_s, size = part - 1, 0.0, 0
        if weights[part][i] > most * (1 + 1e-12):
            return None
        held_s, size = held_s + weights[part][i], size + 1
    return tuple(reversed(stops))


# Those that solve for layouts, which takes a few tenths of a second, come last.
DEAR: tuple[Move, ...] = (Moves.axes,)
CHEAP: tuple[Move, ...] = (Moves.schedules, Moves.store, Moves.microbatches, Moves.cuts)
