"""Process groups from a plan: where this rank stands, and whom it talks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's place in the (data, model) mesh of one stage: its axes, and the axis of all ranks of the stage."""

    data: Axis
    tensor: Axis
    all_of_stage: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.data, self.tensor, self.all_of_stage


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place in the plan.

    meshes: by each stage that this rank runs, in order; lines of the same ranks share their group.
    boundaries: by (sending stage, receiving stage), the group of this rank and its counterpart; one per direction,
    because on NCCL messages of one group wait for each other.
    """

    plan: Plan
    rank: int
    meshes: dict[int, Mesh]
    boundaries: dict[tuple[int, int], dist.ProcessGroup]

    @property
    def stage(self) -> int:
        """The first stage of this rank."""
        return next(iter(self.meshes))

    @property
    def data(self) -> Axis:
        return self.meshes[self.stage].data

    @property
    def tensor(self) -> Axis:
        return self.meshes[self.stage].tensor

    @property
    def all_of_stage(self) -> Axis:
        return self.meshes[self.stage].all_of_stage

    def counterpart(self, stage: int) -> int:
        """The rank with this rank's coordinates in another stage."""
        return self.plan.stages[stage].ranks[self.plan.stages[self.stage].ranks.index(self.rank)]

    def abandon(self) -> None:
        """Let go of every group after a failure; gloo closes a group's connections with the last reference to it."""
        for mesh in self.meshes.values():
            for axis in mesh.axes:
                axis.group = None
        self.boundaries.clear()


def build_groups(plan: Plan) -> Groups:
    """Create every group of `plan`. All ranks of the world must call it, with the same plan.

    Every rank takes part in making every group, in one order. Groups made by their members alone
    (`use_local_synchronization`) hang on gloo as soon as two members have made different numbers of groups before, as
    the middle and the end of a pipeline have.
    """
    rank = dist.get_rank()
    known: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
        """Lines of different axes and stages may have the same ranks."""
        key = tuple(ranks)
        if key not in known:
            known[key] = dist.new_group(list(key))
        return known[key]

    meshes: dict[int, Mesh] = {}
    for index, stage in enumerate(plan.stages):
        axes: dict[str, Axis] = {}
        for name, lines in _mesh_lines(stage).items():
            for ranks in lines:
                group = group_of(ranks)
                if rank in ranks:
                    axes[name] = Axis(name, ranks.index(rank), len(ranks), tuple(ranks), group)
        if axes:
            meshes[index] = Mesh(axes["data"], axes["tensor"], axes["stage"])
    boundaries: dict[tuple[int, int], dist.ProcessGroup] = {}
    for first, (stage, other) in enumerate(zip(plan.stages, plan.stages[1:], strict=False)):
        if stage.ranks == other.ranks:
            continue
        for pair in zip(stage.ranks, other.ranks, strict=True):
            for way in ((first, first + 1), (first + 1, first)):
                group = dist.new_group(list(pair))
                if rank in pair:
                    boundaries[way] = group
    return Groups(plan, rank, meshes, boundaries)


def _mesh_lines(stage: Stage) -> dict[str, list[list[int]]]:
    """The ranks of every line of each axis, in the axis's order."""
    grid = [list(stage.ranks[d * stage.tensor : (d + 1) * stage.tensor]) for d in range(stage.data)]
    return {
        "data": [list(column) for column in zip(*grid, strict=True)],
        "tensor": grid,
        "stage": [list(stage.ranks)],
    }
