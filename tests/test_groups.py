"""Process groups of every mesh shape on gloo: that they come about at all, and that each joins the ranks it should."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from loopback import run
from pool import Pool

from autopar.plan import Plan, Stage, tensor_axes
from autopar.runtime.axis import Axis
from autopar.runtime.groups import build_groups

Meshes = tuple[tuple[int, int], ...]
"""(data, tensor) of each stage."""

EQUAL = [
    ((data, tensor),) * pipeline
    for pipeline in (1, 2, 4, 8)
    for data in (1, 2, 4)
    for tensor in (1, 2, 4)
    if pipeline * data * tensor in (2, 4, 8)
]


def unequal(seed: int) -> Meshes:
    """2 to 4 stages of 2 to 8 ranks together."""
    draw = random.Random(seed)
    while True:
        meshes = tuple((draw.randint(1, 3), draw.randint(1, 3)) for _ in range(draw.randint(2, 4)))
        if sum(d * t for d, t in meshes) <= 8:
            return meshes


def plan_of(meshes: Meshes) -> Plan:
    stages, first = [], 0
    for s, (data, tensor) in enumerate(meshes):
        stages.append(Stage(s, s + 1, tuple(range(first, first + data * tensor)), data, tensor_axes(tensor)))
        first += data * tensor
    return Plan("m", "f", first, 8, 1, "1f1b", tuple(stages))


def members(axis: Axis) -> list[int]:
    """The ranks that a collective over the axis really reaches."""
    assert axis.ranks[axis.rank] == dist.get_rank()
    if axis.size == 1:
        assert axis.group is None
        return list(axis.ranks)
    return axis.all_gather(torch.tensor([dist.get_rank()]), 0).tolist()


def lines(meshes: Meshes) -> dict[str, object]:
    """What each group of this rank reaches."""
    groups = build_groups(plan_of(meshes))
    found: dict[str, object] = {
        "data": members(groups.data),
        "tensor": members(groups.tensor),
        "stage": members(groups.all_of_stage),
    }
    for way, group in groups.boundaries.items():
        total = torch.tensor(1 << dist.get_rank())
        dist.all_reduce(total, group=group)
        found[f"{way}"] = total.item()
    groups.destroy()
    assert groups.data.group is None and not groups.boundaries
    return found


def expected(rank: int, meshes: Meshes) -> dict[str, object]:
    plan = plan_of(meshes)
    (stage,) = [s for s, one in enumerate(plan.stages) if rank in one.ranks]
    ranks, (data, tensor) = plan.stages[stage].ranks, meshes[stage]
    d, t = divmod(rank - ranks[0], tensor)
    found: dict[str, object] = {
        "data": [ranks[i * tensor + t] for i in range(data)],
        "tensor": [ranks[d * tensor + i] for i in range(tensor)],
        "stage": list(ranks),
    }
    for first in (stage - 1, stage):
        if 0 <= first < len(meshes) - 1:
            both = sum(1 << r for s in (first, first + 1) for r in plan.stages[s].ranks)
            found |= {f"{(first, first + 1)}": both, f"{(first + 1, first)}": both}
    return found


@pytest.mark.parametrize("meshes", [*EQUAL, *map(unequal, range(4))])
def test_groups_join_the_ranks_of_the_mesh(pool: Pool, meshes: Meshes) -> None:
    num_ranks = plan_of(meshes).world_size
    wanted = [expected(rank, meshes) for rank in range(num_ranks)]
    assert run(lines, num_ranks, meshes) == wanted
    assert pool.run(lines, meshes, world_size=num_ranks, timeout_s=30) == wanted


def count_groups(meshes: Meshes) -> tuple[int, int]:
    """Groups of the process while a plan runs, and after it."""
    groups = build_groups(plan_of(meshes))
    during = len(dist.distributed_c10d._world.pg_map)
    groups.destroy()
    return during, len(dist.distributed_c10d._world.pg_map)


def test_boundaries_need_few_groups_and_none_stay(pool: Pool) -> None:
    """World, stage axis (= data axis) of 4 ranks, and one group per boundary and direction."""
    assert pool.run(count_groups, ((4, 1), (4, 1)), world_size=8, timeout_s=30) == [(4, 1)] * 8
