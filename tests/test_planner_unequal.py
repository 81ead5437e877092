"""`auto` on unequal clusters: equal to trying every plan of its space, never worse than others, proven bounds."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import forked_parity
import pytest
from loopback_plans import parallel_step
from method_cases import half_as_fast, unequal_problem
from models import Loss, build_llama
from torch import nn

from autopar import capture
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.planner.auto import auto
from autopar.planner.methods.metis import metis
from autopar.planner.methods.whale import whale
from autopar.planner.pins import Pins
from autopar.planner.problem import Problem, goes_together
from autopar.planner.search import search
from autopar.planner.unequal_bounds import Bounds
from autopar.planner.unequal_room import START, Room, State
from autopar.planner.unequal_walk import Judge
from autopar.planner.unequal_ways import WayFinder
from autopar.schedule.orders import schedule_named
from autopar.simulate import simulate

CPU = Cluster.preset("cpu", 1, 2)
LINK = replace(CPU.inter, latency_s=1e-5)


def clusters(seed: int) -> list[Cluster]:
    """Up to 8 devices of two or three kinds, fast and slow links, ample and scarce memory."""
    draw = random.Random(seed)
    kinds = []
    for _ in range(draw.choice([2, 2, 3])):
        hosts, width = draw.choice([(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)])
        kind = half_as_fast(CPU, draw.choice([0.05, 0.1, 0.2, 0.3]), memory=draw.choice([3e-5, 6e-5, 1.0]))
        kinds.append(replace(kind, num_hosts=hosts, devices_per_host=width, inter=draw.choice([LINK, CPU.inter])))
    return kinds if sum(kind.world_size for kind in kinds) <= 8 else clusters(seed + 1000)


def pipelines(room: Room, state: State = START) -> Iterator[tuple]:
    """Every way to take all devices, as moves."""
    for move in room.moves(state):
        if room.is_end(move.after):
            yield (move,)
        else:
            for rest in pipelines(room, move.after):
                yield (move, *rest)


def every_plan(problem: Problem, laps: int = 1) -> Iterator[Plan]:
    """All plans of the space. laps: stages of each group of ranks."""
    room, finder, judge = Room(problem.cluster), WayFinder(problem), Judge(problem)
    blocks, rows, pinned = len(problem.graph.blocks), problem.graph.batch_size, problem.constraints
    counts = [pinned.microbatches] if pinned.microbatches else [m for m in range(1, rows + 1) if rows % m == 0]
    schedule = schedule_named(pinned.schedule or "1f1b")
    for count, moves in itertools.product(counts, list(pipelines(room))):
        groups = len(moves)
        if groups * laps > blocks or groups != (pinned.pipeline or groups):
            continue
        if not goes_together(schedule.name, groups, count, 0):
            continue
        ways = [finder.ways(move.kind, move.ranks, count) for move in moves]
        for cuts in itertools.combinations(range(1, blocks), groups * laps - 1):
            edges = list(itertools.pairwise((0, *cuts, blocks)))
            for chosen in itertools.product(*ways):
                group_of = [schedule.group_of(s, groups) for s in range(groups * laps)]
                parts = tuple(
                    (replace(chosen[g].mesh, ranks=moves[g].ranks), *edge, moves[g])
                    for g, edge in zip(group_of, edges, strict=True)
                )
                yield judge.plan(parts, count, schedule.name)


def best_of_all(problem: Problem, laps: int = 1) -> tuple[float, int]:
    """(step time of the best plan that fits, number of plans), by the simulator."""
    best_s, number = math.inf, 0
    judge = Judge(problem)
    for plan in every_plan(problem, laps):
        number += 1
        judge.offer(plan)
    if judge.best is not None:
        line = simulate(problem.graph, judge.best, problem.cluster)
        assert problem.excess_bytes(line.peak_memory_bytes) <= 0
        best_s = line.step_time_s
    return best_s, number


PINS = [
    {"microbatches": 2, "tensor": 1, "zero": 0},
    {"microbatches": 4, "recompute": "none", "zero": 0},
    {"pipeline": 2, "zero": 0, "microbatches": 8},
    {"schedule": "gpipe", "microbatches": 4, "tensor": 1, "zero": 0},
]


@functools.cache
def captured_llama() -> tuple[Graph, nn.Module, dict]:
    module, example, _ = build_llama(layers=2)
    module = Loss(module)
    return capture(module, example), module, example


def check_no_worse(problem: Problem, best_s: float) -> Plan | None:
    """The plan that auto finds, which is what the simulator says and no slower than that; None where there is none."""
    try:
        plan = auto(problem)
    except ValueError as error:
        assert best_s == math.inf and "fits in" in str(error), error
        return None
    plan.validate(problem.graph, problem.cluster)
    line = simulate(problem.graph, plan, problem.cluster)
    assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    assert problem.excess_bytes(line.peak_memory_bytes) <= 0
    assert plan.prediction.peak_memory_bytes == max(line.peak_memory_bytes.values())
    # Plans that it starts from may lie outside the space.
    assert plan.prediction.step_time_s <= best_s * (1 + 1e-9), plan.explain()
    assert plan.candidates[0].verdict == "chosen"
    assert problem.constraints.schedule in (None, plan.schedule)
    return plan


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_trying_every_plan(seed: int) -> None:
    problem = unequal_problem("deep" if seed % 2 else "llama", clusters(seed), **PINS[seed % 4])
    best_s, _ = best_of_all(problem)
    check_no_worse(problem, best_s)


@pytest.mark.parametrize(
    ("seed", "schedule", "pinned"),
    [
        (0, "zb-h2", dict(microbatches=2, tensor=1)), (1, "zb-h1", dict(microbatches=4, recompute="none")),
        (2, "zb-h1", dict(microbatches=8, pipeline=2)), (4, "zb-h2", dict(microbatches=2, tensor=1)),
        (0, "2bw", dict(microbatches=2, tensor=1)), (5, "2bw", dict(microbatches=4, recompute="none", tensor=1)),
        (2, "2bw", dict(microbatches=8, pipeline=2)), (4, "pipedream", dict(tensor=1)),
    ],
)  # fmt: skip
def test_other_schedules_are_walked_too(seed: int, schedule: str, pinned: dict) -> None:
    """With backwards in halves, and without a flush: what bounds 1F1B does not bound these."""
    problem = unequal_problem("deep" if seed % 2 else "llama", clusters(seed), schedule=schedule, **pinned)
    best_s, number = best_of_all(problem)
    assert number > 20 and best_s < math.inf
    assert check_no_worse(problem, best_s) is not None


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v"])
@pytest.mark.parametrize("seed", [0, 2, 4, 5, 7])
def test_several_stages_per_group(seed: int, schedule: str) -> None:
    pinned = {
        2: dict(microbatches=8, pipeline=2), 5: dict(microbatches=4, recompute="none"), 7: dict(microbatches=4, tensor=1)
    }.get(seed, dict(microbatches=2, tensor=1))  # fmt: skip
    problem = unequal_problem("deep" if seed % 2 else "llama", clusters(seed), schedule=schedule, **pinned)
    best_s, number = best_of_all(problem, laps=2)
    assert number
    assert check_no_worse(problem, best_s) is not None or best_s == math.inf


@pytest.mark.parametrize("seed", range(8))
def test_the_walk_alone_finds_it(seed: int, monkeypatch) -> None:
    """Without plans to start from, also where no number of microbatches is given."""
    monkeypatch.setattr("autopar.planner.unequal.MAX_SEEDED", 0)
    pinned = {"tensor": 1, "zero": 0, "recompute": "none"} if seed % 2 else PINS[seed // 2]
    problem = unequal_problem("llama", clusters(seed), **pinned)
    best_s, _ = best_of_all(problem)
    if best_s < math.inf:
        # The other schedule is tried for the best plan of this one.
        assert auto(problem).prediction.step_time_s <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_is_faster_than_the_bounds(seed: int) -> None:
    problem = unequal_problem("llama", clusters(seed), microbatches=4, tensor=1, zero=0)
    room, finder = Room(problem.cluster), WayFinder(problem)
    most = min(len(problem.graph.blocks), problem.cluster.world_size)
    tables = Bounds(problem, room, finder, 4, "1f1b", most)
    best: dict[int, float] = {}
    for plan in every_plan(problem):
        judge = Judge(problem)
        if judge.offer(plan):
            best[len(plan.stages)] = min(best.get(len(plan.stages), math.inf), judge.best_s)
    for stages in range(1, most + 1):
        assert tables.root_s(stages) <= best.get(stages, math.inf) * (1 + 1e-9)
        # Memory is decided stage by stage, so a bound is infinite exactly where nothing fits.
        assert (tables.root_s(stages) == math.inf) == (stages not in best)


@pytest.mark.parametrize("seed", range(10))
def test_every_path_takes_every_device_once(seed: int) -> None:
    room = Room(Cluster.join(*clusters(seed)))
    world_size, orders = room.cluster.world_size, set()
    for moves in pipelines(room):
        taken = [rank for move in moves for rank in move.ranks]
        assert sorted(taken) == list(range(world_size))
        for move in moves:
            assert list(move.ranks) == sorted(move.ranks)
            hosts = {room.cluster.host(rank) for rank in move.ranks}
            if len(hosts) > 1:  # whole hosts
                assert all(
                    set(host) <= set(move.ranks)
                    for kind in room.hosts
                    for host in kind
                    if hosts & {room.cluster.host(host[0])}
                )
        orders.add(tuple(tuple(move.kind) for move in moves))
    assert len(orders) > 1
    states = room.states()
    position = {state: i for i, state in enumerate(states)}
    for state in states:
        assert room.left(state) > 0
        for move in room.moves(state):
            assert room.is_end(move.after) or position[move.after] < position[state]


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 3, 4, 9])
def test_never_worse_than_others(seed: int) -> None:
    """Than Metis, than Whale, and than if all devices were like the slowest, both there and on the real ones."""
    problem = unequal_problem("llama", clusters(seed), microbatches=4, recompute="none")
    plan = auto(problem)
    slowest = auto(problem.as_equal)
    assert plan.prediction.step_time_s <= slowest.prediction.step_time_s * (1 + 1e-9)
    assert plan.prediction.step_time_s <= simulate(problem.graph, slowest, problem.cluster).step_time_s * (1 + 1e-9)
    for method in (metis, whale):
        try:
            other = method(problem)
        except ValueError:  # as where Whale would need more rows than there are
            continue
        line = simulate(problem.graph, other, problem.cluster)
        if problem.excess_bytes(line.peak_memory_bytes) <= 0:
            assert plan.prediction.step_time_s <= line.step_time_s * (1 + 1e-9), method


@pytest.mark.parametrize(
    ("devices", "pinned"), [(5, {}), (6, {"pipeline": 4}), (8, {"pipeline": 3, "microbatches": 2})]
)  # fmt: skip
def test_numbers_of_equal_devices_that_nothing_divides(devices: int, pinned: dict) -> None:
    """Eight rows on five devices, or four stages on six: uneven shares and unlike stages, in parity with the module."""
    graph, module, example = captured_llama()
    cluster = Cluster.preset("cpu", 1, devices)
    plan = search(graph, cluster, progress=False, zero=0, **pinned)
    plan.validate(graph, cluster)
    assert simulate(graph, plan, cluster).step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    assert plan.pipeline == pinned.get("pipeline", plan.pipeline)
    assert max(parallel_step(graph, module, example, plan)) < 1e-5


@pytest.mark.parametrize(
    ("cluster", "pinned"),
    [
        (Cluster.preset("cpu", 1, 5), {}), (Cluster.join(CPU, half_as_fast(replace(CPU, devices_per_host=4))), {}),
        (Cluster.join(CPU, half_as_fast(CPU)), {"schedule": "interleaved"}), (Cluster.preset("cpu", 1, 4), {"schedule": "zb-v"}),
    ],
)  # fmt: skip
def test_plans_that_lost_say_why(cluster: Cluster, pinned: dict) -> None:
    graph, _, _ = captured_llama()
    plan = search(graph, cluster, progress=False, **pinned)
    lost = plan.candidates[1:]
    assert len(lost) >= 5 or pinned
    assert lost and len({row.name for row in plan.candidates}) == len(plan.candidates)
    assert [row.step_time_s for row in lost] == sorted(row.step_time_s for row in lost)
    for row in lost:
        ratio, why = row.verdict.split("x slower: ")
        assert float(ratio) == pytest.approx(row.step_time_s / plan.prediction.step_time_s, abs=0.006)
        assert re.fullmatch(r"each device computes [\d.]+x as long|[a-z() -]+ \d+%|before [a-z, ]+ changed", why), why


NAMED = [
    {"stage": {"*layers.0.*": 0, "*layers.1.*": 1}}, {"stage": {"*layers.0.*": -1}}, {"layout": {"*q_proj": "column"}},
    {"layout": {"*mlp.down_proj": "row"}, "stage": {"*layers.1.*": 1}, "schedule": "zb-h1"},
    {"layout": {"*q_proj": "column"}, "schedule": "interleaved"},
]  # fmt: skip


@pytest.mark.parametrize("pinned", NAMED, ids=str)
def test_what_is_pinned_by_name_is_kept(pinned: dict) -> None:
    graph, _, _ = captured_llama()
    cluster = Cluster.join(CPU, half_as_fast(replace(CPU, devices_per_host=4)))
    plan = search(graph, cluster, progress=False, microbatches=2, **pinned)
    plan.validate(graph, cluster)
    assert not Pins.of(graph, *(tuple(pinned.get(name, {}).items()) for name in ("layout", "stage"))).refusal(plan)
    assert plan.schedule == pinned.get("schedule", plan.schedule)


def test_what_does_not_fit_is_told() -> None:
    problem = unequal_problem("llama", clusters(0), memory_limit_bytes=10, tensor=1, zero=0, microbatches=2)
    with pytest.raises(ValueError, match="fits in 10 bytes"):
        auto(problem)
    two = unequal_problem(
        "llama", [CPU, half_as_fast(replace(CPU, devices_per_host=1))], pipeline=2, memory_limit_bytes=10
    )
    with pytest.raises(ValueError, match="no plan of"):
        auto(two)


@pytest.mark.parametrize(
    "pinned",
    [
        {"pipeline": 2, "microbatches": 2}, {"data": 4, "tensor": 1, "microbatches": 1},
        {"pipeline": 2, "microbatches": 2, "schedule": "zb-h1"}, {"microbatches": 2, "schedule": "zb-v"},
    ],
)  # fmt: skip
def test_what_it_finds_runs_on_ranks(pinned: dict) -> None:
    """On four ranks, emulated: stages of unlike devices, and rows in proportion to speed, in parity with the module."""
    module, example, _ = build_llama(layers=3)
    graph = capture(module, example)
    plan = search(graph, Cluster.join(CPU, half_as_fast(CPU, 3.0)), progress=False, **pinned)
    assert plan.pipeline > 1 or plan.stages[0].shares == (3, 3, 1, 1)
    found = forked_parity.errors(module, example, graph, plan, forked_parity.reference(module, example))
    assert found.within(1e-5, 1e-4), found
