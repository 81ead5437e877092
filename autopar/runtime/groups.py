"""Process groups from a plan: where this rank stands in each of its stages, and whom it talks to.

A mesh has a group per line of each axis. A boundary between two stages has one group per direction, of all ranks of
both, because on NCCL the messages of one group keep one order: so activations and gradients do not wait for each other,
and a plan needs as many of these groups as it has boundaries, however many pairs of ranks talk across them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..plan import Plan, Stage
from .axis import Axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """This rank's place in the (data, *model axes) mesh of one stage.

    lines: its axes, by the dims of the mesh that they run along: 0 is data, i + 1 the model axis i, and several dims
    together are one axis of all the ranks along them. data, tensor: the first dim, all the others; all_of_stage: all.
    hybrid: the data axis as (copies, shards) where ZeRO shards over fewer than all data ranks, else None.
    """

    lines: Mapping[tuple[int, ...], Axis]
    hybrid: tuple[Axis, Axis] | None = None

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
    boundaries: by (sending stage, receiving stage), the group of all ranks of both, if this rank is one of them.
    stage, lines, data, tensor, all_of_stage, model, hybrid: the first stage of this rank, and its mesh.
    """

    plan: Plan
    rank: int
    meshes: dict[int, Mesh]
    boundaries: dict[tuple[int, int], dist.ProcessGroup]
    _made: list[dist.ProcessGroup] = field(default_factory=list, repr=False)

    @property
    def stage(self) -> int:
        return next(iter(self.meshes))

    @property
    def lines(self) -> Mapping[tuple[int, ...], Axis]:
        return self.meshes[self.stage].lines

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

    @property
    def model(self) -> dict[tuple[int, ...], Axis]:
        return self.meshes[self.stage].model

    def abandon(self) -> None:
        """Let go of every group after a failure; gloo closes a group's connections with the last reference to it."""
        for mesh in self.meshes.values():
            for axis in (*mesh.lines.values(), *(mesh.hybrid or ())):
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

    def axis_through(name: str, lines: Sequence[Sequence[int]]) -> Axis | None:
        """Makes the groups of all lines; the axis along the one that holds this rank."""
        found = None
        for ranks in lines:
            group = group_of(ranks)
            if rank in ranks:
                found = Axis(name, list(ranks).index(rank), len(ranks), tuple(ranks), group)
        return found

    meshes: dict[int, Mesh] = {}
    for index, stage in enumerate(plan.stages):
        found: dict[tuple[int, ...], Axis] = {}
        for dims in mesh_dims(stage):
            axis = axis_through(_name(stage, dims), mesh_lines(stage, dims))
            found |= {dims: axis} if axis else {}
        hybrid = None
        if 0 < stage.zero_group < stage.data:
            copies, shards = _hybrid_lines(mesh_lines(stage, (0,)), stage.zero_group)
            hybrid = axis_through("copies", copies), axis_through("shards", shards)
        if found:
            meshes[index] = Mesh(found, hybrid)
    boundaries: dict[tuple[int, int], dist.ProcessGroup] = {}
    for first in range(len(plan.stages) - 1):
        members = sorted({*plan.stages[first].ranks, *plan.stages[first + 1].ranks})
        if plan.stages[first].ranks == plan.stages[first + 1].ranks:
            continue
        for way in ((first, first + 1), (first + 1, first)):
            group = dist.new_group(members)
            if rank in members:
                boundaries[way] = group
                made.append(group)
    return Groups(plan, rank, meshes, boundaries, made)


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


def _hybrid_lines(columns: Sequence[Sequence[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Each data axis cut into runs of `size` ranks: the ranks at one place of the runs (copies), and the runs."""
    runs = [[column[i : i + size] for i in range(0, len(column), size)] for column in columns]
    copies = [list(line) for of_column in runs for line in zip(*of_column, strict=True)]
    return copies, list(itertools.chain.from_iterable(runs))
