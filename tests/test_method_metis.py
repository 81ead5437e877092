"""Metis: its pruned space, layers in proportion to speed, meshes by headroom, and unequal devices."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from method_cases import small_problem

from autopar.planner.methods.bench import split_rows
from autopar.planner.methods.metis import metis
from autopar.planner.methods.metis_space import DeviceType, device_groups, meshes, split_layers, type_orders


@pytest.mark.parametrize(("devices", "stages"), [(8, 1), (8, 3), (12, 4), (16, 5), (64, 8), (64, 23)])
def test_groups_tile_the_devices_within_the_bound(devices, stages):
    rows = device_groups(devices, stages)
    assert len(set(rows)) == len(rows)
    for row in rows:
        assert sum(row) == devices and len(row) == stages
        assert all(size & (size - 1) == 0 and size >= devices / stages * 0.5 for size in row)
    per_multiset = {}
    for row in rows:
        per_multiset.setdefault(tuple(sorted(row)), []).append(row)
    assert all(len(orders) <= 10 for orders in per_multiset.values())


def test_groups_are_all_of_them_where_there_are_few():
    every = {
        row for row in itertools.product((1, 2, 4, 8), repeat=3) if sum(row) == 8 and min(row) >= max(1, 8 / 3 * 0.5)
    }
    assert set(device_groups(8, 3)) == every
    assert device_groups(8, 9) == []
    assert len(device_groups(64, 23, most=10)) < math.comb(23, 9)


def test_device_types_in_every_order():
    types = [DeviceType(name, 4, 1.0, 1.0) for name in "abc"]
    assert len(set(type_orders(types))) == 6


@pytest.mark.parametrize("seed", range(20))
def test_layers_in_proportion_to_speed(seed):
    draw = random.Random(seed)
    num, stages = draw.randrange(2, 9), draw.randrange(1, 4)
    work = [draw.uniform(1, 3) for _ in range(num)]
    speeds = [draw.choice([1.0, 2.0, 4.0]) for _ in range(stages)]
    stops = split_layers(work, speeds)
    if num < stages:
        assert stops is None
        return

    def slowest(found) -> float:
        edges = itertools.pairwise((0, *found))
        return max(sum(work[a:b]) / speed for (a, b), speed in zip(edges, speeds, strict=True))

    best = min(slowest((*cuts, num)) for cuts in itertools.combinations(range(1, num), stages - 1))
    assert slowest(stops) == pytest.approx(best)


def test_a_stage_without_room_hands_layers_on():
    most = [2, 10, 10]
    stops = split_layers([1.0] * 9, [1.0] * 3, lambda s, start, stop: stop - start <= most[s])
    assert stops is not None and stops[0] <= 2 and stops[-1] == 9
    assert split_layers([1.0] * 9, [1.0] * 3, lambda s, start, stop: stop - start <= 2) is None


def test_faster_devices_get_more_and_nobody_waits():
    """Two fast groups and two half as fast: 12 layers fall 4, 4, 2, 2; even stages would wait a third of the time."""
    assert split_layers([1.0] * 12, [2.0, 2.0, 1.0, 1.0]) == (4, 8, 10, 12)
    assert split_rows(10, [2.0, 1.0]) == (7, 3)


def test_meshes_go_from_data_to_tensor_where_memory_is_least():
    """Headroom grows with the tensor degree; the second stage has least."""
    found = list(meshes((4, 4), lambda now: [8.0 + now[0][1], now[1][1]]))
    assert found[0] == ((4, 1), (4, 1))
    assert found[1:3] == [((4, 1), (2, 2)), ((4, 1), (1, 4))]
    assert found[-1] == ((1, 4), (1, 4)) and len(found) == 5


@pytest.mark.parametrize("seed", range(8))
def test_plans_of_captured_graphs_run(seed):
    problem = small_problem(seed, [2, 4, 6, 8][seed % 4], **[{}, {"pipeline": 2}, {"recompute": "full"}][seed % 3])
    plan = metis(problem)
    plan.validate(problem.graph, problem.cluster)
    assert plan.candidates[0].verdict == "chosen"
    if problem.constraints.pipeline:
        assert len(plan.stages) == 2
