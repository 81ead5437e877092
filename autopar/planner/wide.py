"""The wide space of small problems, and its optimum.

Wide: every shape of `Problem.shapes` with every schedule that flushes (or the one without, if that is pinned) and as many
stages per group as there are blocks for, ZeRO 0 to 3, and recomputation "none", "selective" or "full" for each stage.
`every_wide_plan` lists it, for the oracle. `search_sketches` finds its best plan without looking at all:

- recomputation makes nothing faster, and a step is a longest path, so a plan whose stages recompute less is no slower.
  Of the choices of one group's stages only the least that fit need a look: those of which none can be lowered.
- the work of the busiest group without recomputation bounds the step time of a way to cut from below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ..plan import Plan, Recompute, same_recompute
from ..schedule.orders import SCHEDULES
from .judge import Judge, Judged
from .problem import Chain, Problem, Shape
from .relief import recompute_choices
from .sketch import Rows, Sketch, Team

# What counts as small.
MAX_DEVICES, MAX_BLOCKS = 8, 6


@dataclass(frozen=True, slots=True)
class WideShape:
    """A shape of any schedule and ZeRO level, with `virtual` stages per group."""

    shape: Shape
    virtual: int

    @property
    def num_stages(self) -> int:
        return self.shape.pipeline * self.virtual


def is_small(problem: Problem) -> bool:
    """Whether the wide space is searched whole; it is one of equal devices."""
    return (
        not problem.cluster.hosts
        and problem.cluster.world_size <= MAX_DEVICES
        and len(problem.graph.blocks) <= MAX_BLOCKS
    )


def wide_shapes(problem: Problem) -> Iterator[WideShape]:
    """All that the constraints allow, those of the exact search first."""
    pinned, num_blocks = problem.constraints, len(problem.graph.blocks)
    seen: set[WideShape] = set()
    for shape in problem.shapes:
        first = WideShape(shape, 1)
        if first not in seen and SCHEDULES[shape.schedule].virtual in (0, 1):
            seen.add(first)
            yield first
    for shape in problem.shapes:
        for name, chosen in SCHEDULES.items():
            if not chosen.flushes or pinned.schedule not in (None, name) or (shape.pipeline == 1 and name != "1f1b"):
                continue
            most = num_blocks // shape.pipeline
            for virtual in (chosen.virtual,) if chosen.virtual else range(2, most + 1):
                for zero in range(4) if shape.data > 1 and chosen.may_shard else range(1):
                    found = WideShape(replace(shape, schedule=name, zero=zero), virtual)
                    if virtual <= most and pinned.zero in (None, zero) and found not in seen:
                        seen.add(found)
                        yield found


def wide_sketches(problem: Problem, wide: WideShape) -> Iterator[Sketch]:
    """Every way to cut, with every chain of layouts."""
    shape, num_blocks = wide.shape, len(problem.graph.blocks)
    for chain in problem.chains.of(problem, shape):
        teams = _teams(shape, chain)
        for cuts in itertools.combinations(range(1, num_blocks), wide.num_stages - 1):
            yield Sketch((*cuts, num_blocks), teams, shape.microbatches, shape.schedule)


def _teams(shape: Shape, chain: Chain) -> tuple[Team, ...]:
    rows, axes = (Rows(chain.unique, chain.rows()), chain.axes) if shape.tensor > 1 else (Rows(), ())
    return tuple(Team(shape.ranks(g), shape.data, axes, rows, shape.zero) for g in range(shape.pipeline))


def all_wide_sketches(problem: Problem) -> Iterator[Sketch]:
    """Those of every shape, one shape after the other."""
    return itertools.chain.from_iterable(wide_sketches(problem, wide) for wide in wide_shapes(problem))


def every_wide_plan(problem: Problem) -> Iterator[Plan]:
    """All plans of the space, whether or not they fit in memory."""
    return every_plan_of(problem, all_wide_sketches(problem))


def every_plan_of(problem: Problem, sketches: Iterable[Sketch]) -> Iterator[Plan]:
    """With every choice of recomputation for each stage, where pins allow the sketch."""
    choices = recompute_choices(problem)
    for sketch in sketches:
        bare = sketch.plan(problem.graph)
        if problem.refusal(bare):
            continue
        for chosen in itertools.product(choices, repeat=len(sketch.stops)):
            yield recomputing(bare, dict(enumerate(chosen)))


def count_wide_plans(problem: Problem) -> int:
    """Plans of the space, chains of layouts apart."""
    return count_plans_of(problem, (wide.num_stages for wide in wide_shapes(problem)))


def count_plans_of(problem: Problem, stage_counts: Iterable[int]) -> int:
    """Ways to cut into so many stages, and to recompute each of them."""
    num_blocks, ways = len(problem.graph.blocks), len(recompute_choices(problem))
    return sum(math.comb(num_blocks - 1, stages - 1) * ways**stages for stages in stage_counts)


def recomputing(plan: Plan, chosen: dict[int, Recompute]) -> Plan:
    stages = list(plan.stages)
    for s, choice in chosen.items():
        stages[s] = replace(stages[s], recompute=same_recompute(choice, stages[s].num_blocks))
    return replace(plan, stages=tuple(stages))


def search_sketches(
    problem: Problem, sketches: Iterable[Sketch], judge: Judge, below_s: float, is_over: Callable[[], bool]
) -> Iterator[tuple[Sketch, Judged]]:
    """Plans that fit, each faster than those before it and than `below_s`; the last one is the optimum of the sketches,
    unless it `is_over` before."""
    for sketch in sketches:
        if is_over():
            return
        bare = sketch.plan(problem.graph)
        if problem.refusal(bare):
            continue
        for judged in least_recomputing(problem, judge, bare, below_s):
            if judged.time_s < below_s:
                below_s = judged.time_s
                yield sketch, judged


def least_recomputing(problem: Problem, judge: Judge, bare: Plan, below_s: float) -> Iterator[Judged]:
    """The plan with every choice of recomputation that may be best."""
    choices = recompute_choices(problem)
    judged = judge(recomputing(bare, dict.fromkeys(range(len(bare.stages)), choices[0])))
    if judged.floor_s >= below_s:
        return
    if judged.fits:
        yield judged
        return
    ways = [_least_of_group(judge, judged, group, choices) for group in range(len(judged.members))]
    for combined in itertools.product(*ways):
        chosen = {s: choice for way in combined for s, choice in way.items()}
        yield judge(recomputing(judged.plan, chosen))


def _least_of_group(
    judge: Judge, judged: Judged, group: int, choices: tuple[Recompute, ...]
) -> list[dict[int, Recompute]]:
    """The choices of the group's stages that fit and of which none can be lowered."""
    members = judged.members[group]
    if judged.peaks_bytes[group] <= judged.limit_bytes:
        return [dict.fromkeys(members, choices[0])]
    costs = {(s, choice): judge.cost(recomputing(judged.plan, {s: choice}), s) for s in members for choice in choices}
    levels = sorted(itertools.product(range(len(choices)), repeat=len(members)), key=lambda level: (sum(level), level))
    least: list[tuple[int, ...]] = []
    for level in levels:
        if any(all(a <= b for a, b in zip(lower, level, strict=True)) for lower in least):
            continue
        mine = [costs[s, choices[i]] for s, i in zip(members, level, strict=True)]
        if judge.peak_bytes(judged.plan, group, mine) <= judged.limit_bytes:
            least.append(level)
    return [dict(zip(members, (choices[i] for i in level), strict=True)) for level in least]
