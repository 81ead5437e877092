"""Process groups from a plan: where this rank stands in each of its stages, and whom it talks to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's place in the mesh of one stage.

    lines: its axes, by the dims of the mesh that they run along: 0 is data, i + 1 the model axis i, and several dims
    together are one axis of all the ranks along them. data, tensor: the first dim, all the others; all_of_stage: all dims.
    """

    lines: Mapping[tuple[int, ...], Axis]

    @property
    def data(self) -> Axis:
        return self.lines[0,]

    @property
    def tensor(self) -> Axis:
        dims = max(self.lines, key=len)
        return self.lines[dims[1:] or (1,)]

    @property
    def all_of_stage(self) -> Axis:
        return self.lines[max(self.lines, key=len)]

    @property
    def model(self) -> dict[tuple[int, ...], Axis]:
        """The model axes by their numbers, alone and several as one."""
        return {tuple(i - 1 for i in dims): axis for dims, axis in self.lines.items() if 0 not in dims}


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's place in the plan.

    meshes: by each stage that this rank runs, in order; lines of the same ranks share their group.
    boundaries: by (sending stage, receiving stage), the group of this rank and its counterpart; one per direction,
    because on NCCL messages of one group wait for each other.
    """

    plan: Plan
    rank: int
    meshes: Mapping[int, Mesh]
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
            for axis in mesh.lines.values():
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
        found: dict[tuple[int, ...], Axis] = {}
        for dims in mesh_dims(stage):
            for ranks in mesh_lines(stage, dims):
                group = group_of(ranks)
                if rank in ranks:
                    found[dims] = Axis(_name(stage, dims), ranks.index(rank), len(ranks), tuple(ranks), group)
        if found:
            meshes[index] = Mesh(found)
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


def mesh_dims(stage: Stage) -> Iterator[tuple[int, ...]]:
    """Every choice of dims of the stage's (data, *axes) mesh; a stage without model axes counts as one of degree 1."""
    count = 1 + max(1, len(stage.axes))
    for length in range(1, count + 1):
        yield from itertools.combinations(range(count), length)


def mesh_lines(stage: Stage, dims: Sequence[int]) -> list[list[int]]:
    """The sets of ranks that differ in their coordinates on these dims only, in row-major order."""
    mesh = torch.tensor(stage.ranks).view(stage.data, *(stage.axes or (1,)))
    others = [i for i in range(mesh.dim()) if i not in dims]
    return mesh.permute(*others, *dims).reshape(-1, math.prod(mesh.shape[i] for i in dims)).tolist()


def _name(stage: Stage, dims: tuple[int, ...]) -> str:
    if dims == (0,):
        return "data"
    if 0 in dims:
        return "stage" if len(dims) == 1 + max(1, len(stage.axes)) else "data x " + _name(stage, dims[1:])
    return "tensor" if len(dims) == max(1, len(stage.axes)) else " x ".join(f"tensor{i - 1}" for i in dims)
