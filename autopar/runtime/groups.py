"""Process groups from a plan: where this rank stands, and whom it talks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place in the plan.

    stage: index of its stage. data, tensor: its axes in the stage's mesh; all_of_stage: the axis of all its ranks.
    hybrid: the data axis as (copies, shards) where ZeRO shards over fewer than all data ranks, else None.
    forward, backward: by neighbouring stage, the two-rank group that carries activations (gradients) between this rank
    and its counterpart there; two groups, because on NCCL messages of one group wait for each other.
    """

    plan: Plan
    rank: int
    stage: int
    data: Axis
    tensor: Axis
    all_of_stage: Axis
    forward: dict[int, dist.ProcessGroup]
    backward: dict[int, dist.ProcessGroup]
    hybrid: tuple[Axis, Axis] | None = None

    def counterpart(self, stage: int) -> int:
        """The rank with this rank's coordinates in another stage."""
        return self.plan.stages[stage].ranks[self.plan.stages[self.stage].ranks.index(self.rank)]


def build_groups(plan: Plan) -> Groups:
    """Create every group of `plan`. All ranks of the world must call it, with the same plan.

    Every rank takes part in making every group, in one order. Groups made by their members alone
    (`use_local_synchronization`) hang on gloo as soon as two members have made different numbers of groups before, as
    the middle and the end of a pipeline have.
    """
    rank = dist.get_rank()
    stage_of = {r: s for s, stage in enumerate(plan.stages) for r in stage.ranks}
    index = stage_of[rank]
    axes: dict[str, Axis] = {}
    hybrid: tuple[Axis, Axis] | None = None
    for stage in plan.stages:
        rows, columns = _mesh_lines(stage)
        for name, lines in (("data", columns), ("tensor", rows), ("stage", [stage.ranks])):
            axis = _axis(name, rank, lines)
            axes |= {name: axis} if axis else {}
        if 0 < stage.zero_group < stage.data:
            copies, shards = _hybrid_lines(columns, stage.zero_group)
            found = (_axis("copies", rank, copies), _axis("shards", rank, shards))
            hybrid = found if rank in stage.ranks else hybrid
    forward: dict[int, dist.ProcessGroup] = {}
    backward: dict[int, dist.ProcessGroup] = {}
    for first in range(len(plan.stages) - 1):
        for pair in zip(plan.stages[first].ranks, plan.stages[first + 1].ranks, strict=True):
            for made in (forward, backward):
                group = dist.new_group(list(pair))
                if rank in pair:
                    made[first + 1 if rank == pair[0] else first] = group
    return Groups(plan, rank, index, axes["data"], axes["tensor"], axes["stage"], forward, backward, hybrid)


def _mesh_lines(stage: Stage) -> tuple[list[list[int]], list[list[int]]]:
    grid = [list(stage.ranks[d * stage.tensor : (d + 1) * stage.tensor]) for d in range(stage.data)]
    return grid, [list(column) for column in zip(*grid, strict=True)]


def _hybrid_lines(columns: Sequence[Sequence[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each data axis cut into runs of `size` ranks: the ranks at one place of the runs (copies), and the runs."""
    runs = [[column[i : i + size] for i in range(0, len(column), size)] for column in columns]
    return [list(line) for of_column in runs for line in zip(*of_column, strict=True)], sum(runs, [])


def _axis(name: str, rank: int, lines: Sequence[Sequence[int]]) -> Axis | None:
    """Makes the groups of all lines; the axis through this rank, if it is in one of them."""
    found = None
    for ranks in lines:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            found = Axis(name, list(ranks).index(rank), len(ranks), tuple(ranks), group)
    return found
