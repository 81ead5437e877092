"""Process groups of every mesh shape on gloo: that they come about at all, and that each joins the ranks it should."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from loopback import run
from pool import Pool

from autopar.plan import Plan, Stage, tensor_axes
from autopar.runtime.axis import Axis
from autopar.runtime.groups import build_groups

SHAPES = [
    (pipeline, data, tensor)
    for pipeline in (1, 2, 4, 8)
    for data in (1, 2, 4)
    for tensor in (1, 2, 4)
    if pipeline * data * tensor in (2, 4, 8)
]


def members(axis: Axis) -> list[int]:
    """The ranks that a collective over the axis really reaches."""
    joined = axis.all_gather(torch.tensor([dist.get_rank()]), 0)
    assert axis.ranks[axis.rank] == dist.get_rank()
    return joined.tolist()


def lines(pipeline: int, data: int, tensor: int) -> dict[str, object]:
    """What each group of this rank reaches."""
    size = data * tensor
    stages = tuple(
        Stage(s, s + 1, tuple(range(s * size, (s + 1) * size)), data, tensor_axes(tensor)) for s in range(pipeline)
    )
    plan = Plan("m", "f", pipeline * size, 8, 1, "1f1b", stages)
    groups = build_groups(plan)
    found: dict[str, object] = {
        "data": members(groups.data),
        "tensor": members(groups.tensor),
        "stage": members(groups.all_of_stage),
    }
    heard: dict[str, dict[int, int]] = {"forward": {}, "backward": {}}
    for (source, target), group in sorted(groups.boundaries.items()):
        stage = source + target - groups.stage
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=group)
        assert total.item() - dist.get_rank() == groups.counterpart(stage)
        heard["forward" if source < target else "backward"][stage] = groups.counterpart(stage)
    return found | heard


def expected(rank: int, pipeline: int, data: int, tensor: int) -> dict[str, object]:
    size = data * tensor
    stage, d, t = rank // size, rank % size // tensor, rank % tensor
    neighbours = {s: s * size + rank % size for s in (stage - 1, stage + 1) if 0 <= s < pipeline}
    return {
        "data": [stage * size + i * tensor + t for i in range(data)],
        "tensor": [stage * size + d * tensor + i for i in range(tensor)],
        "stage": list(range(stage * size, (stage + 1) * size)),
        "forward": neighbours,
        "backward": neighbours,
    }


@pytest.mark.parametrize(("pipeline", "data", "tensor"), SHAPES)
def test_groups_join_the_ranks_of_the_mesh(pool: Pool, pipeline: int, data: int, tensor: int) -> None:
    shape = (pipeline, data, tensor)
    num_ranks = pipeline * data * tensor
    wanted = [expected(rank, *shape) for rank in range(num_ranks)]
    assert run(lines, num_ranks, *shape) == wanted
    assert pool.run(lines, *shape, world_size=num_ranks, timeout_s=30) == wanted
