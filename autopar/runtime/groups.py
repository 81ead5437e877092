"""Process groups from a plan: where this rank stands in each of its stages, and whom it talks to.

A mesh has a group per line of each axis. A boundary between two stages has one group per direction, of all ranks of
both, because on NCCL the messages of one group keep one order: so activations and gradients do not wait for each other,
and a plan needs as many of these groups as it has boundaries, however many pairs of ranks talk across them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's place in the (data, model) mesh of one stage: its axes, and the axis of all ranks of the stage.

    hybrid: the data axis as (copies, shards) where ZeRO shards over fewer than all data ranks, else None.
    """

    data: Axis
    tensor: Axis
    all_of_stage: Axis
    hybrid: tuple[Axis, Axis] | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.data, self.tensor, self.all_of_stage, *(self.hybrid or ())


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place in the plan.

    meshes: by each stage that this rank runs, in order; lines of the same ranks share their group.
    boundaries: by (sending stage, receiving stage), the group of all ranks of both, if this rank is one of them.
    """

    plan: Plan
    rank: int
    meshes: dict[int, Mesh]
    boundaries: dict[tuple[int, int], dist.ProcessGroup]
    _made: list[dist.ProcessGroup] = field(default_factory=list, repr=False)

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

    @property
    def hybrid(self) -> tuple[Axis, Axis] | None:
        return self.meshes[self.stage].hybrid

    def abandon(self) -> None:
        """Let go of every group after a failure; gloo closes a group's connections with the last reference to it."""
        for mesh in self.meshes.values():
            for axis in mesh.axes:
                axis.group = None
        self.boundaries.clear()
        self._made.clear()

    def destroy(self) -> None:
        """Close the groups of a plan that has been left for another. All ranks of the world must call it, after the last
        communication of that plan; nothing of it may be used again."""
        dist.barrier()
        for group in self._made:
            dist.destroy_process_group(group)
        self.abandon()


def build_groups(plan: Plan) -> Groups:
    """Create every group of `plan`. All ranks of the world must call it, with the same plan.

    Every rank takes part in making every group, in one order. Groups made by their members alone
    (`use_local_synchronization`) hang on gloo as soon as two members have made different numbers of groups before, as
    the middle and the end of a pipeline have.
    """
    rank = dist.get_rank()
    made: list[dist.ProcessGroup] = []
    known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def group_of(ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Lines of different axes and stages may have the same ranks; one rank alone has nobody to talk to."""
        key = tuple(ranks)
        if len(key) == 1:
            return None
        if key not in known:
            group = dist.new_group(list(key))
            known[key] = group if rank in key else None
            if rank in key:
                made.append(group)
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
            hybrid = (axes["copies"], axes["shards"]) if "copies" in axes else None
            meshes[index] = Mesh(axes["data"], axes["tensor"], axes["stage"], hybrid)
    boundaries: dict[tuple[int, int], dist.ProcessGroup] = {}
    for first, second in neighbours(plan):
        members = sorted({*plan.stages[first].ranks, *plan.stages[second].ranks})
        for direction in ((first, second), (second, first)):
            group = dist.new_group(members)
            if rank in members:
                boundaries[direction] = group
                made.append(group)
    return Groups(plan, rank, meshes, boundaries, made)


def neighbours(plan: Plan) -> Iterator[tuple[int, int]]:
    """Consecutive stages with a message to exchange: all but those that lie on one and the same rank."""
    for first in range(len(plan.stages) - 1):
        if len({*plan.stages[first].ranks, *plan.stages[first + 1].ranks}) > 1:
            yield first, first + 1


def _mesh_lines(stage: Stage) -> dict[str, list[list[int]]]:
    """The ranks of every line of each axis, in the axis's order."""
    grid = [list(stage.ranks[d * stage.tensor : (d + 1) * stage.tensor]) for d in range(stage.data)]
    columns = [list(column) for column in zip(*grid, strict=True)]
    lines = {"data": columns, "tensor": grid, "stage": [list(stage.ranks)]}
    if 0 < stage.zero_group < stage.data:
        # Each data axis in runs of ranks that hold one copy together, and the ranks at one place of these runs.
        size = stage.zero_group
        runs = [[column[i : i + size] for i in range(0, stage.data, size)] for column in columns]
        lines["shards"] = [run for of_column in runs for run in of_column]
        lines["copies"] = [list(line) for of_column in runs for line in zip(*of_column, strict=True)]
    return lines
