"""Process groups from a plan: where this rank stands, and whom it talks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ..graph import Graph
from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place in the plan.

    stage: index of its stage. data, tensor: its axes in the stage's mesh; all_of_stage: the axis of all its ranks.
    forward, backward: by neighbouring stage, the two-rank group that carries activations (gradients) between this rank
    and its counterpart there; two groups, because on NCCL messages of one group wait for each other.
    tied: by parameter name, the group of its holders' counterparts over the stages that use it.
    """

    plan: Plan
    rank: int
    stage: int
    data: Axis
    tensor: Axis
    all_of_stage: Axis
    forward: dict[int, dist.ProcessGroup]
    backward: dict[int, dist.ProcessGroup]
    tied: dict[str, Axis]

    def counterpart(self, stage: int) -> int:
        """The rank with this rank's coordinates in another stage."""
        return self.plan.stages[stage].ranks[self.plan.stages[self.stage].ranks.index(self.rank)]


def build_groups(plan: Plan, graph: Graph) -> Groups:
    """Create every group of `plan`. All ranks of the world must call it, with the same plan."""
    rank = dist.get_rank()
    stage_of = {r: s for s, stage in enumerate(plan.stages) for r in stage.ranks}
    index = stage_of[rank]
    stage = plan.stages[index]
    rows, columns = _mesh_lines(stage)
    data = _axis("data", rank, columns)
    tensor = _axis("tensor", rank, rows)
    all_of_stage = _axis("stage", rank, [stage.ranks])
    position = stage.ranks.index(rank)
    forward: dict[int, dist.ProcessGroup] = {}
    backward: dict[int, dist.ProcessGroup] = {}
    for peer in sorted({index - 1, index + 1} & set(range(len(plan.stages)))):
        pair = sorted((rank, plan.stages[peer].ranks[position]))
        forward[peer] = dist.new_group(pair, use_local_synchronization=True)
        backward[peer] = dist.new_group(pair, use_local_synchronization=True)
    tied = {
        name: _axis(f"tied:{name}", rank, [[plan.stages[s].ranks[position] for s in holders]])
        for name, holders in tied_stages(plan, graph).items()
        if index in holders
    }
    return Groups(plan, rank, index, data, tensor, all_of_stage, forward, backward, tied)


def tied_stages(plan: Plan, graph: Graph) -> dict[str, tuple[int, ...]]:
    """Parameters that more than one stage uses, with those stages in order."""
    found: dict[str, tuple[int, ...]] = {}
    for name in graph.shared_parameters:
        holders = tuple(
            s
            for s, stage in enumerate(plan.stages)
            if any(name in block.parameters for block in graph.blocks[stage.start : stage.stop])
        )
        if len(holders) > 1:
            found[name] = holders
    return found


def _mesh_lines(stage: Stage) -> tuple[list[list[int]], list[list[int]]]:
    grid = [list(stage.ranks[d * stage.tensor : (d + 1) * stage.tensor]) for d in range(stage.data)]
    return grid, [list(column) for column in zip(*grid, strict=True)]


def _axis(name: str, rank: int, lines: Sequence[Sequence[int]]) -> Axis:
    """The axis through this rank; only the ranks of one line create its group."""
    for ranks in lines:
        if rank in ranks:
            group = dist.new_group(list(ranks), use_local_synchronization=True)
            return Axis(name, list(ranks).index(rank), len(ranks), tuple(ranks), group)
    raise AssertionError(f"rank {rank} is in no line of axis {name}")
