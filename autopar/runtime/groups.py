"""Process groups from a plan: where this rank stands, and whom it talks to."""

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
class Groups:
    """This rank's place in the plan.

    stage: index of its stage. lines: its axes in the stage's mesh, by the dims of the mesh that they run along: 0 is
    data, i + 1 the model axis i, and several dims together are one axis of all the ranks along them. data, tensor: the
    first dim, all the others; all_of_stage: all dims.
    hybrid: the data axis as (copies, shards) where ZeRO shards over fewer than all data ranks, else None.
    forward, backward: by neighbouring stage, the two-rank group that carries activations (gradients) between this rank
    and its counterpart there; two groups, because on NCCL messages of one group wait for each other.
    """

    plan: Plan
    rank: int
    stage: int
    lines: Mapping[tuple[int, ...], Axis]
    forward: dict[int, dist.ProcessGroup]
    backward: dict[int, dist.ProcessGroup]
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
    found: dict[tuple[int, ...], Axis] = {}
    hybrid: tuple[Axis, Axis] | None = None
    for stage in plan.stages:
        for dims in mesh_dims(stage):
            axis = _axis(_name(stage, dims), rank, mesh_lines(stage, dims))
            found |= {dims: axis} if axis else {}
        if 0 < stage.zero_group < stage.data:
            copies, shards = _hybrid_lines(mesh_lines(stage, (0,)), stage.zero_group)
            pair = (_axis("copies", rank, copies), _axis("shards", rank, shards))
            hybrid = pair if rank in stage.ranks else hybrid
    forward: dict[int, dist.ProcessGroup] = {}
    backward: dict[int, dist.ProcessGroup] = {}
    for first in range(len(plan.stages) - 1):
        for pair in zip(plan.stages[first].ranks, plan.stages[first + 1].ranks, strict=True):
            for made in (forward, backward):
                group = dist.new_group(list(pair))
                if rank in pair:
                    made[first + 1 if rank == pair[0] else first] = group
    return Groups(plan, rank, index, found, forward, backward, hybrid)


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
    return [list(line) for of_column in runs for line in zip(*of_column, strict=True)], sum(runs, [])


def _axis(name: str, rank: int, lines: Sequence[Sequence[int]]) -> Axis | None:
    """Makes the groups of all lines; the axis through this rank, if it is in one of them."""
    found = None
    for ranks in lines:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            found = Axis(name, list(ranks).index(rank), len(ranks), tuple(ranks), group)
    return found
