"""Recomputation of as few blocks as memory asks for.

A group of ranks that does not fit has to keep less of a microbatch. For each kind of block of its stages, what a choice
costs (more backward) and frees (activation bytes) follows from pricing the stage with one block of the kind switched. The
useful choices of a kind lie on the lower convex hull of (bytes kept, seconds); a step along the hull of one block is an
upgrade. Upgrades are taken by seconds per byte freed, weighed by how many microbatches the stage holds, and of one kind
the first blocks first, because a block that is computed again at the end of a stage has to come back beside all that the
others keep. The fewest upgrades in this order that fit are found by bisection with exact prices.

Ignored: that blocks differ a little in what they free by where they stand; so the answer is a minimum up to one block of
a kind, and exact where a stage has blocks of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cost.types import StageCost
from ..plan import Plan, Recompute, Stage
from ..schedule.orders import schedule_named
from .judge import Judge, Judged
from .problem import Problem

CHOICES: tuple[Recompute, ...] = ("none", "selective", "full")


def recompute_choices(problem: Problem) -> tuple[Recompute, ...]:
    """What a block may do, the fastest first."""
    pinned = problem.constraints.recompute
    return (pinned,) if pinned else tuple(choice for choice in CHOICES if choice in problem.space.recompute)


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """Block `at` (counted in its stage) of stage `stage` changes to `choice`."""

    ratio: float
    stage: int
    at: int
    choice: Recompute


def with_recompute(stage: Stage, choices: Sequence[Recompute]) -> Stage:
    """The stage with a choice per block."""
    return replace(stage, recompute=() if all(choice == "none" for choice in choices) else tuple(choices))


def kept_recompute(plan: Plan, choice: Recompute) -> Plan:
    """The plan with one choice in all blocks."""
    return replace(plan, stages=tuple(with_recompute(s, (choice,) * s.num_blocks) for s in plan.stages))


class Relief:
    """Fits plans into memory; remembers what was asked about kinds of blocks."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.choices = recompute_choices(judge.problem)
        self._deltas: dict[tuple, tuple[tuple[float, float], ...]] = {}

    def __call__(self, plan: Plan, below_s: float) -> Judged | None:
        """The plan with its recomputation reset to what memory needs; None if it does not fit, or its work alone takes
        `below_s` or more."""
        judged = self.judge(kept_recompute(plan, self.choices[0]))
        if judged.floor_s >= below_s:
            return None
        for group in range(len(judged.members)):
            if judged.peaks_bytes[group] > judged.limit_bytes:
                relieved = self._relieve(judged, group)
                if relieved is None:
                    return None
                judged = relieved
        return judged if judged.floor_s < below_s else None

    def _relieve(self, judged: Judged, group: int) -> Judged | None:
        """The fewest upgrades of a group with which it fits."""
        if len(self.choices) == 1:
            return None
        plan, members = judged.plan, judged.members[group]
        upgrades = self._upgrades(judged, group)
        known: dict[int, tuple[list[Stage], list[StageCost], int]] = {}

        def need(count: int) -> int:
            if count not in known:
                stages = self._upgraded(plan, members, upgrades[:count])
                whole = list(plan.stages)
                for s, stage in zip(members, stages, strict=True):
                    whole[s] = stage
                now = replace(plan, stages=tuple(whole))
                costs = [self.judge.cost(now, s) for s in members]
                known[count] = stages, costs, self.judge.peak_bytes(now, group, costs)
            return known[count][2]

        low, high, limit = 0, len(upgrades), judged.limit_bytes
        if need(high) > limit:
            return None
        # What is freed is nearly linear in the count: start near where the line crosses the limit.
        for step in range(len(upgrades)):
            if high - low <= 1:
                break
            share = (need(low) - limit) / max(1, need(low) - need(high)) if step < 3 else 0.5
            middle = min(high - 1, max(low + 1, round(low + (high - low) * share)))
            low, high = (low, middle) if need(middle) <= limit else (middle, high)
        stages, costs, peak = known[high]
        all_stages, all_costs, peaks = list(plan.stages), list(judged.costs), list(judged.peaks_bytes)
        for s, stage, cost in zip(members, stages, costs, strict=True):
            all_stages[s], all_costs[s] = stage, cost
        peaks[group] = peak
        return replace(
            judged, plan=replace(plan, stages=tuple(all_stages)), costs=tuple(all_costs), peaks_bytes=tuple(peaks)
        )

    def _upgraded(self, plan: Plan, members: Sequence[int], upgrades: Sequence[_Upgrade]) -> list[Stage]:
        choices = {s: list(plan.stages[s].block_recompute) for s in members}
        for one in upgrades:
            choices[one.stage][one.at] = one.choice
        return [with_recompute(plan.stages[s], choices[s]) for s in members]

    def _upgrades(self, judged: Judged, group: int) -> list[_Upgrade]:
        """All of a group's, in the order in which they are worth taking; a block's in the order of its hull."""
        plan, found = judged.plan, []
        chosen = schedule_named(plan.schedule)
        virtual = len(plan.stages) // plan.pipeline
        held = max(1, chosen.in_flight(group, plan.pipeline, plan.microbatches, virtual) / virtual)
        for s in judged.members[group]:
            stage = plan.stages[s]
            blocks = self.judge.problem.graph.blocks[stage.start : stage.stop]
            hulls: dict[tuple, list[tuple[float, Recompute]]] = {}
            layouts = plan.layouts_of(stage)
            for at, block in enumerate(blocks):
                kind = (block.kind, *map(self.judge.number, layouts[at]))
                if kind not in hulls:
                    hulls[kind] = self._hull(self._delta(plan, s, at, kind, judged.costs[s]), held)
                found += [_Upgrade(ratio, s, at, choice) for ratio, choice in hulls[kind]]
        return sorted(found, key=lambda one: (one.ratio, one.at, one.stage))

    def _delta(self, plan: Plan, s: int, at: int, kind: tuple, cost: StageCost) -> tuple[tuple[float, float], ...]:
        """(seconds more, bytes less) of a microbatch for each choice but the first, in one block."""
        stage = plan.stages[s]
        key = (
            kind, stage.data, stage.axes, stage.shares, plan.microbatches, stage.zero, stage.zero_group,
            stage.num_blocks == 1, at == 0, at == stage.num_blocks - 1,
        )  # fmt: skip
        if key not in self._deltas:
            found = []
            for choice in self.choices[1:]:
                choices = list(stage.block_recompute)
                choices[at] = choice
                switched = with_recompute(stage, choices)
                now = self.judge.cost(replace(plan, stages=(*plan.stages[:s], switched, *plan.stages[s + 1 :])), s)
                more_s = now.forward_s + now.backward_s - cost.forward_s - cost.backward_s
                found.append((more_s, float(cost.activation_bytes - now.activation_bytes)))
            self._deltas[key] = tuple(found)
        return self._deltas[key]

    def _hull(self, deltas: tuple[tuple[float, float], ...], held: float) -> list[tuple[float, Recompute]]:
        """(seconds per byte, choice) along the lower convex hull from the first choice on."""
        points = [(0.0, 0.0, self.choices[0])]
        points += [(freed * held, max(0.0, s), c) for (s, freed), c in zip(deltas, self.choices[1:], strict=True)]
        steps, now = [], points[0]
        while True:
            further = [p for p in points if p[0] > now[0]]
            if not further:
                return steps
            best = min(further, key=lambda p: ((p[1] - now[1]) / (p[0] - now[0]), -p[0]))
            steps.append(((best[1] - now[1]) / (best[0] - now[0]), best[2]))
            now = best
