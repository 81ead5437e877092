"""What stages cost whose ranks differ: the slowest counts, memory is each rank's own, equal devices cost what they did."""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import asdict, replace

import pytest
from models import build_llama
from plan_cases import random_shares, unequal_plan

from autopar import capture
from autopar.cluster.hosts import common, seen_by
from autopar.cluster.spec import Cluster
from autopar.cost.collectives import collective_s
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.planner.chains import LayoutChains
from autopar.planner.problem import Constraints, Problem
from autopar.sharding.rows import stage_parts
from autopar.simulate import simulate

FAST, SLOW = Cluster.preset("a100-80gb", 1, 2), Cluster.preset("v100-16gb", 1, 2)
MIXED = Cluster.join(FAST, SLOW)


@functools.cache
def graph_of_llama() -> Graph:
    return capture(*build_llama())


def split_in_two(cluster: Cluster) -> Cluster:
    """The same cluster, written as two runs of equal hosts."""
    (run,) = cluster.runs
    runs = (replace(run, count=1), replace(run, count=run.count - 1))
    return Cluster(*common(runs), cluster.source, cluster.software, 0, 1.0, runs)


def random_plan(seed: int) -> Plan:
    draw = random.Random(seed)
    while True:
        meshes = [(draw.choice([1, 2, 4]), draw.choice([1, 2])) for _ in range(draw.randint(1, 3))]
        if sum(data * tensor for data, tensor in meshes) == 8:
            break
    rows = 8 // (microbatches := draw.choice([1, 2]))
    shares = [random_shares(rows, data, draw) if data > 1 and draw.random() < 0.5 else () for data, _ in meshes]
    return unequal_plan(
        graph_of_llama(), meshes, microbatches, shares=shares, seed=seed, zero=draw.choice([0, 1, 3]),
        recompute=draw.choice(["none", "full"]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_equal_devices_cost_the_same_however_they_are_written(seed: int) -> None:
    """But for the order of sums; also where the plan has uneven shares, whose fullest rank counts."""
    graph, plan, cluster = graph_of_llama(), random_plan(seed), Cluster.preset("a100-40gb", 4, 2)
    one, two = CostModel(graph, cluster), CostModel(graph, split_in_two(cluster))
    for index, stage in enumerate(plan.stages):
        assert asdict(two.stage(plan, index)) == pytest.approx(asdict(one.stage(plan, index)), rel=1e-12)
        fullest = stage.ranks[stage.shares.index(max(stage.shares)) * stage.tensor] if stage.shares else stage.ranks[0]
        assert asdict(two.of_rank(plan, index, fullest)) == pytest.approx(asdict(one.stage(plan, index)), rel=1e-12)
    equal_s = simulate(graph, plan, cluster).step_time_s
    assert simulate(graph, plan, split_in_two(cluster)).step_time_s == pytest.approx(equal_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_a_stage_is_as_slow_as_its_slowest_rank_alone(seed: int) -> None:
    """Each rank against a model in which all devices are its own."""
    graph, plan = graph_of_llama(), random_plan(seed)
    cluster = Cluster.join(FAST, SLOW, Cluster.preset("t4-16gb", 1, 2), FAST)
    costs = CostModel(graph, cluster)
    alone = {rank: CostModel(graph, seen_by(cluster, cluster.device_of(rank))) for rank in range(8)}
    for index, stage in enumerate(plan.stages):
        cost = costs.stage(plan, index)
        own = [costs.of_rank(plan, index, rank) for rank in stage.ranks]
        assert cost.forward_s == max(one.forward_s for one in own)
        assert cost.backward_s == max(one.backward_s for one in own)
        assert cost.activation_bytes == max(one.activation_bytes for one in own)
        for rank, one in zip(stage.ranks, own, strict=True):
            # As one of the ranks of its kind with most rows; fewer rows are never dearer.
            as_if = alone[rank].of_rank(plan, index, rank)
            assert as_if.forward_s <= one.forward_s * (1 + 1e-9) and as_if.activation_bytes <= one.activation_bytes


def test_time_is_a_function_of_a_ranks_rows() -> None:
    """A device at half the rate takes twice as long for as many rows, and less for fewer."""
    graph = graph_of_llama()
    fast = Cluster.preset("cpu", 1, 1)
    slow = replace(
        fast,
        device=replace(
            fast.device,
            kind="half a cpu",
            flops_per_s={"float32": 48e9},
            memory_bytes_per_s=12.8e9,
            launch_s=2 * fast.device.launch_s,
            backward_launch_s=2 * fast.device.backward_launch_s,
        ),
    )
    cluster = Cluster.join(fast, slow)
    costs, seconds = CostModel(graph, cluster), {}
    for shares in ((1, 1), (3, 1), (1, 3)):
        plan = unequal_plan(graph, [(2, 1)], 1, shares=[tuple(8 // sum(shares) * share for share in shares)])
        ranks = [costs.of_rank(plan, 0, rank) for rank in range(2)]
        seconds[shares] = [one.forward_s + one.backward_s for one in ranks]
        whole = costs.stage(plan, 0)
        assert whole.forward_s == max(one.forward_s for one in ranks)
    assert seconds[1, 1][1] == pytest.approx(2 * seconds[1, 1][0], rel=0.01)
    assert seconds[3, 1][0] > seconds[1, 1][0] and seconds[3, 1][1] < seconds[1, 1][1]
    assert max(seconds[3, 1]) < max(seconds[1, 1]) < max(seconds[1, 3])


def test_memory_is_held_against_each_ranks_own() -> None:
    graph = graph_of_llama()
    plan = unequal_plan(graph, [(4, 1)], 1, shares=[(3, 3, 1, 1)])
    costs = CostModel(graph, MIXED)
    peaks = simulate(graph, plan, MIXED, costs).peak_memory_bytes
    assert peaks[0] == peaks[1] > peaks[2] == peaks[3]
    problem = Problem(graph, MIXED, costs, LayoutChains())
    limits = [problem.memory_limit_of(rank) for rank in range(4)]
    assert limits == [int(MIXED.device_of(rank).memory_bytes * 0.9) for rank in range(4)] and limits[0] > limits[2]
    assert problem.memory_limit_bytes == min(limits)
    assert problem.excess_bytes({0: limits[0] - 5, 1: limits[1], 2: 7, 3: limits[3] + 2}) == 2
    pinned = replace(problem, constraints=Constraints(memory_limit_bytes=100))
    assert pinned.excess_bytes(dict.fromkeys(range(4), 40)) == -60


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "send"])
def test_collectives_take_the_slowest_link_that_they_cross(kind: str) -> None:
    runs = [Cluster.preset(name, 2, 4) for name in ("a100-80gb", "t4-16gb", "v100-16gb")]
    cluster = Cluster.join(*runs)
    for size in (1e3, 1e6, 1e9):
        for group, equal in ((0, runs[0]), (1, runs[1]), (2, runs[2])):
            first = 8 * group
            for local in ((0, 1), (0, 4), (0, 1, 4, 5)):
                if kind == "send" and len(local) > 2:
                    continue
                ranks = tuple(first + rank for rank in local)
                same = replace(cluster, hosts=())
                expected = collective_s(replace(equal, device=same.device), kind, size, local)
                assert collective_s(cluster, kind, size, ranks) == pytest.approx(expected, rel=1e-12)
        for a, b in itertools.combinations(range(3), 2):
            across = collective_s(cluster, kind, size, (8 * a, 8 * b))
            alone = [collective_s(cluster, kind, size, (8 * group, 8 * group + 4)) for group in (a, b)]
            assert across == pytest.approx(max(alone))


def test_a_boundary_between_kinds_takes_the_slower_port() -> None:
    graph = graph_of_llama()
    cluster = Cluster.join(Cluster.preset("a100-80gb", 1, 2), Cluster.preset("t4-16gb", 1, 2))
    plan = unequal_plan(graph, [(2, 1), (2, 1)], 2)
    costs = CostModel(graph, cluster)
    size = costs.stage(plan, 0).boundary_bytes
    device = [costs.of_rank(plan, 0, 0), costs.of_rank(plan, 1, 2)]
    assert device[0].send_s == costs.stage(plan, 0).send_s > 0
    slow = Cluster.preset("t4-16gb", 2, 2)
    assert device[0].send_s >= size / slow.inter.bandwidth_bytes_per_s


@pytest.mark.parametrize("seed", range(8))
def test_parts_of_a_data_rank(seed: int) -> None:
    draw = random.Random(seed)
    (data, _), rows = (draw.randint(2, 4), 1), 8
    shares = random_shares(rows, data, draw)
    stage = unequal_plan(graph_of_llama(), [(data, 1)], 1, shares=[shares]).stages[0]
    parts = [stage_parts(stage, 1, rank) for rank in range(data)]
    assert math.isclose(sum(1 / part for part in parts), 1.0)
    assert [rows / part for part in parts] == [pytest.approx(share) for share in shares]
    assert stage_parts(stage, 1) == min(parts)
