"""Aceso: iterative alleviation of the bottleneck, from any plan, by moves that trade one resource for another.

    bottleneck(c)   the stage with most memory if any does not fit, else the slowest               `_Judged.bottleneck`
    resources(c)    its compute, communication and memory, by share; that it waits for others counts too (which is
                    ours: Aceso has microbatches of about the right size to begin with)             `_Judged.needs`
    move            what changes one thing and lowers some resource (MOVES); those that lower the scarcest come first,
                    and ops move to the stage with most idle time x devices x efficiency            `_moves`
    hop             apply a move; accept any gain on the start of the round, else go on from there, up to `MAX_HOPS`
                    moves deep, in the order of the bottleneck then                                 `_alleviate`
    round           from the best found; without a gain, from the best one not yet explored whose time is at most
                    `BACK_OFF` times the best                                                       `_search`

Configurations are remembered, so none is judged twice. After each move recomputation is reset to what memory needs.
The search runs once per number of stages, from an even cut with as much data parallelism as there is.

Reference: Liu et al., "Aceso: Efficient Parallel DNN Training through Iterative Bottleneck Alleviation", EuroSys 2024,
sections 3 and 4.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...cost.types import StageCost
from ...plan import Plan, Recompute, same_recompute
from ...schedule.step_time import step_time_s
from ...simulate import stage_peak_bytes
from ..problem import Problem, Shape
from .bench import Bench, Part

MAX_HOPS = 7
BACK_OFF = 1.2
# Configurations judged per number of stages; the time limit may end it sooner.
MAX_JUDGED = 120

COMPUTE, COMMUNICATION, MEMORY, WAITING = "compute", "communication", "memory", "waiting"


@dataclass(frozen=True, slots=True)
class Config:
    """Where stages end (the last at the number of blocks), the (data, tensor) of each, and the microbatches."""

    stops: tuple[int, ...]
    meshes: tuple[tuple[int, int], ...]
    microbatches: int
    zero: int = 0

    @property
    def edges(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise((0, *self.stops)))


@dataclass(frozen=True)
class _Judged:
    """A configuration with its plan, step time, and per stage cost, peak and busy time."""

    config: Config
    plan: Plan
    time_s: float
    costs: tuple[StageCost, ...]
    peaks_bytes: tuple[int, ...]
    limit_bytes: int

    @property
    def key(self) -> tuple[float, float]:
        """What fits comes before what does not; then by time, or by how much is lacking."""
        over = max(0, max(self.peaks_bytes) - self.limit_bytes)
        return (float(over), self.time_s)

    def busy_s(self, s: int) -> float:
        cost, count = self.costs[s], self.config.microbatches
        return count * (cost.forward_s + cost.backward_s) + max(0.0, cost.reduce_s - cost.reduce_overlap_s)

    @property
    def bottleneck(self) -> int:
        stages = range(len(self.costs))
        if max(self.peaks_bytes) > self.limit_bytes:
            return max(stages, key=lambda s: self.peaks_bytes[s])
        return max(stages, key=self.busy_s)

    def needs(self, s: int) -> list[str]:
        """Resources of a stage, the scarcest first: shares of the step, and of a device's memory."""
        cost, count = self.costs[s], self.config.microbatches
        moved_s = 2 * count * cost.send_s + cost.reduce_s + cost.reduce_model_s
        whole_s = moved_s + count * (cost.forward_s + cost.backward_s)
        step_s = max(self.time_s, whole_s)
        shares = {
            COMPUTE: (whole_s - moved_s) / step_s,
            COMMUNICATION: moved_s / step_s,
            WAITING: 1 - whole_s / step_s,
            MEMORY: 2.0 if self.peaks_bytes[s] > self.limit_bytes else self.peaks_bytes[s] / self.limit_bytes / 2,
        }
        return sorted(shares, key=lambda name: -shares[name])


# What each move takes off the bottleneck stage.
MOVES = {
    "fewer blocks": (COMPUTE, MEMORY, COMMUNICATION),
    "more devices": (COMPUTE, MEMORY),
    "more tensor, less data": (MEMORY, COMMUNICATION),
    "more data, less tensor": (COMMUNICATION, COMPUTE),
    "more microbatches": (MEMORY, WAITING),
    "fewer microbatches": (COMPUTE, COMMUNICATION),
    "shard state": (MEMORY,),
    "replicate state": (COMMUNICATION,),
}


def aceso(
    problem: Problem,
    start: Config | None = None,
    shuffle: random.Random | None = None,
    max_judged: int = MAX_JUDGED,
) -> Plan:
    """The best plan found from `start`, or from an even plan for each number of stages.

    shuffle: take the moves in random order instead (to see what the order is worth).
    """
    with Bench(problem, "aceso") as bench:
        shapes = bench.shapes(lambda s: s.zero == 0)
        starts = [start] if start else [_even(bench, shapes, stages) for stages in sorted({s.pipeline for s in shapes})]
        for one in starts:
            if bench.spent:
                break
            _Search(bench, shuffle, max_judged).run(one)
        return bench.best_plan()
    return bench.best_plan()


def _even(bench: Bench, shapes: list[Shape], stages: int) -> Config:
    """Even cuts, the most data parallelism, and about four microbatches per stage."""
    most = max(s.data for s in shapes if s.pipeline == stages)
    some = [s for s in shapes if s.pipeline == stages and s.data == most]
    shape = min(some, key=lambda s: (abs(math.log(s.microbatches / (4 * stages - 3))), s.tensor))
    stops = tuple(bench.num_blocks * (s + 1) // stages for s in range(stages))
    return Config(stops, ((shape.data, shape.tensor),) * stages, shape.microbatches, shape.zero)


@dataclass
class _Search:
    """One search, for one number of stages."""

    bench: Bench
    shuffle: random.Random | None
    max_judged: int
    _seen: dict[Config, _Judged | None] = field(default_factory=dict)
    _explored: set[Config] = field(default_factory=set)

    def __post_init__(self) -> None:
        problem = self.bench.problem
        self._legal = {(s.pipeline, s.data, s.tensor, s.microbatches, s.zero) for s in problem.shapes}

    def run(self, start: Config) -> None:
        now = self._judge(start)
        while now is not None and not self._over():
            self._explored.add(now.config)
            better = self._alleviate(now, now.key, 0)
            now = better or self._unexplored()

    def _over(self) -> bool:
        return len(self._seen) >= self.max_judged or self.bench.spent

    def _unexplored(self) -> _Judged | None:
        known = [one for one in self._seen.values() if one is not None]
        best = min(one.key for one in known)
        left = [one for one in known if one.config not in self._explored]
        near = [one for one in left if one.key[0] <= best[0] and one.key[1] <= BACK_OFF * best[1]]
        return min(near, key=lambda one: one.key, default=None)

    def _alleviate(self, now: _Judged, start: tuple[float, float], depth: int) -> _Judged | None:
        """The first configuration within the hops left that beats `start`."""
        reached = []
        for config in self._moves(now):
            if self._over():
                return None
            if config in self._seen:
                continue
            judged = self._judge(config)
            if judged is None:
                continue
            if judged.key < start:
                return judged
            reached.append(judged)
        if depth + 1 < MAX_HOPS and reached:
            return self._alleviate(min(reached, key=lambda one: one.key), start, depth + 1)
        return None

    # -- moves

    def _moves(self, now: _Judged) -> Iterator[Config]:
        """What the bottleneck's scarcest resource asks for first."""
        stage = now.bottleneck
        rank = {name: i for i, name in enumerate(now.needs(stage))}
        names = sorted(MOVES, key=lambda name: min(rank[resource] for resource in MOVES[name]))
        options = [config for name in names for config in self._apply(name, now, stage)]
        if self.shuffle is not None:
            everywhere = [c for name in MOVES for s in range(len(now.costs)) for c in self._apply(name, now, s)]
            options = self.shuffle.sample(everywhere, len(everywhere))
        yield from dict.fromkeys(options)

    def _apply(self, name: str, now: _Judged, stage: int) -> Iterator[Config]:
        config = now.config
        if name == "fewer blocks":
            yield from self._shifted(now, stage)
        elif name == "more devices":
            yield from self._lent(now, stage)
        elif name.startswith("more tensor"):
            yield from self._remeshed(config, stage, lambda d, t: (d // 2, t * 2) if d % 2 == 0 else None)
        elif name.startswith("more data"):
            yield from self._remeshed(config, stage, lambda d, t: (d * 2, t // 2) if t % 2 == 0 else None)
        elif name == "more microbatches":
            yield replace(config, microbatches=config.microbatches * 2)
        elif name == "fewer microbatches" and config.microbatches % 2 == 0:
            yield replace(config, microbatches=config.microbatches // 2)
        elif name == "shard state":
            yield replace(config, zero=3)
        elif name == "replicate state":
            yield replace(config, zero=0)

    def _shifted(self, now: _Judged, stage: int) -> Iterator[Config]:
        """A quarter of the blocks, then one, from `stage` through its neighbours to the stage that is most idle."""
        config, count = now.config, len(now.costs)
        slowest_s = max(now.busy_s(s) for s in range(count))

        def room(s: int) -> float:
            devices = math.prod(config.meshes[s])
            return (slowest_s - now.busy_s(s)) * devices / max(now.busy_s(s), 1e-12)

        sizes = [stop - start for start, stop in config.edges]
        for target in sorted((s for s in range(count) if s != stage), key=room, reverse=True):
            for blocks in dict.fromkeys((sizes[stage] // 4, 1)):
                if not 1 <= blocks < sizes[stage]:
                    continue
                low, high, shift = (target, stage, blocks) if target < stage else (stage, target, -blocks)
                stops = [stop + (shift if low <= s < high else 0) for s, stop in enumerate(config.stops)]
                yield replace(config, stops=tuple(stops))

    def _lent(self, now: _Judged, stage: int) -> Iterator[Config]:
        """Twice the devices for `stage`, from a stage with twice as many, which keeps half."""
        if not self.bench.unequal:
            return
        meshes = now.config.meshes
        data, tensor = meshes[stage]
        idle = sorted((s for s in range(len(meshes)) if s != stage), key=now.busy_s)
        for other in idle:
            d, t = meshes[other]
            if d * t == 2 * data * tensor:
                for mine in ((2 * data, tensor), (data, 2 * tensor)):
                    for theirs in ((d // 2, t), (d, t // 2)):
                        if math.prod(theirs) * 2 == d * t:
                            changed = {stage: mine, other: theirs}
                            yield replace(
                                now.config, meshes=tuple(changed.get(s, mesh) for s, mesh in enumerate(meshes))
                            )

    def _remeshed(self, config: Config, stage: int, change) -> Iterator[Config]:
        """Another mesh for one stage, and for all."""
        mesh = change(*config.meshes[stage])
        if mesh is None:
            return
        if self.bench.unequal:
            yield replace(config, meshes=tuple(mesh if s == stage else old for s, old in enumerate(config.meshes)))
        if len(set(config.meshes)) == 1:
            yield replace(config, meshes=(mesh,) * len(config.meshes))

    # -- judgement

    def _judge(self, config: Config) -> _Judged | None:
        """Price a configuration, with recomputation in the stages that need it; None if it is no plan."""
        self._seen[config] = None
        if not self._is_legal(config):
            return None
        problem, num = self.bench.problem, len(config.stops)
        choice: list[Recompute] = [problem.recompute_choices[0]] * num
        plan = self._plan(config, choice)
        costs, peaks = self._priced(plan)
        for s in range(num):
            if peaks[s] > problem.memory_limit_bytes:
                choice[s] = problem.recompute_choices[-1]
        if len(set(choice)) > 1 or choice[0] != problem.recompute_choices[0]:
            plan = self._plan(config, choice)
            costs, peaks = self._priced(plan)
        time_s = step_time_s(num, config.microbatches, plan.schedule, costs)
        judged = _Judged(config, plan, time_s, tuple(costs), tuple(peaks), problem.memory_limit_bytes)
        known = [one.key for one in self._seen.values() if one is not None]
        self._seen[config] = judged
        if not known or judged.key < min(known):
            self.bench.offer(plan)
        return judged

    def _is_legal(self, config: Config) -> bool:
        num, problem = len(config.stops), self.bench.problem
        if config.microbatches < 1 or problem.graph.batch_size % config.microbatches:
            return False
        if len(set(config.meshes)) == 1:
            return (num, *config.meshes[0], config.microbatches, config.zero) in self._legal
        rows = problem.graph.batch_size // config.microbatches
        return config.zero == 0 and all(
            rows % data == 0 and (tensor == 1 or problem.splits(tensor, data)) for data, tensor in config.meshes
        )

    def _plan(self, config: Config, choice: list[Recompute]) -> Plan:
        parts, first = [], 0
        for s, (start, stop) in enumerate(config.edges):
            data, tensor = config.meshes[s]
            ranks = tuple(range(first, first + data * tensor))
            first += data * tensor
            parts.append(Part(start, stop, ranks, data, tensor, same_recompute(choice[s], stop - start), config.zero))
        schedule = self.bench.problem.constraints.schedule or "1f1b"
        return self.bench.plan(parts, config.microbatches, schedule)

    def _priced(self, plan: Plan) -> tuple[list[StageCost], list[int]]:
        num = len(plan.stages)
        costs = [self.bench.problem.costs.stage(plan, s) for s in range(num)]
        peaks = [stage_peak_bytes(c, plan.schedule, s, num, plan.microbatches) for s, c in enumerate(costs)]
        return costs, peaks
