"""Stages of different meshes on equal devices: which mesh a group of ranks may have, its layouts, and where groups lie.

A mesh is data x tensor ranks, the latter being all of its model axes. Each stage keeps what is pinned: data=, tensor= and the
axes of context= and expert= hold for all of them. A microbatch that does not divide by the data degree is shared out as
evenly as whole rows allow, on meshes without a model axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..cluster.spec import Cluster
from ..plan import Plan, Stage
from .chains import LayoutChains
from .methods.bench import split_rows
from .problem import Chain, Problem, Shape
from .sketch import Rows, Sketch, Team

# Chains found where the batch is cut into so many times more or fewer parts serve as well, where each would take long.
ALIKE = 8


@dataclass(frozen=True, slots=True)
class Mesh:
    """shares: rows of a microbatch per data rank; () where they are equal."""

    data: int
    tensor: int
    shares: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.data * self.tensor


def may_differ(problem: Problem) -> bool:
    """Whether stages may have different meshes at all: more than one, of equal devices."""
    pinned = problem.constraints
    return (
        problem.unequal_stages
        and not problem.cluster.hosts
        and problem.cluster.world_size > 2
        and len(problem.graph.blocks) > 1
        and pinned.pipeline != 1
        and (pinned.data is None or len(list(problem.widths(problem.cluster.world_size))) > 1)
    )


def meshes_of(problem: Problem, size: int, microbatches: int) -> Iterator[Mesh]:
    """The meshes of `size` ranks, most data first."""
    pinned, rows = problem.constraints, problem.graph.batch_size // microbatches
    for tensor in (t for t in problem.widths(size) if size % t == 0):
        data = size // tensor
        if pinned.data not in (None, data):
            continue
        if data > rows or (data > 1 and problem.batch_conflict) or (data == 1 and pinned.zero):
            continue
        if tensor == 1:
            if problem.allows_tensor(1, data):
                yield Mesh(data, 1, split_rows(rows, [1.0] * data) if rows % data else ())
        elif rows % data == 0 and problem.has_axes(tensor, data) and problem.allows_tensor(tensor, data):
            yield Mesh(data, tensor)


@dataclass
class MeshLayouts:
    """The layouts of meshes, each made when first asked for."""

    problem: Problem
    _known: dict[tuple, tuple[Rows, ...]] = field(default_factory=dict)
    # By identity, with the chain itself, so that the identity stays taken.
    _of_chain: dict[int, tuple[Chain, Rows]] = field(default_factory=dict)
    _served: dict[int, list[tuple[int, Rows]]] = field(default_factory=dict)

    def fastest(self, mesh: Mesh, microbatches: int, zero: int) -> Rows:
        """On many devices those of another share of the batch, if they serve. ValueError where nothing is legal."""
        if mesh.tensor == 1:
            return self.all(mesh, microbatches, zero)[0]
        shards, chains = mesh.data * microbatches, self.problem.chains
        if self.problem.is_large and isinstance(chains, LayoutChains):
            for there, rows in self._served.get(mesh.tensor, ()):
                near = max(there, shards) <= ALIKE * min(there, shards)
                if near and chains.serve(self.problem, mesh.tensor, there, shards):
                    return rows
        rows = self._rows(next(iter(chains.of(self.problem, self._shape(mesh, microbatches, zero)))))
        self._served.setdefault(mesh.tensor, []).append((shards, rows))
        return rows

    def keep(self, plan: Plan) -> None:
        """Let the layouts of a plan of one mesh serve others of its tensor degree."""
        sketch = Sketch.of(plan)
        if sketch is not None and sketch.teams[0].axes and has_asked_axes(self.problem, plan.stages[0]):
            team = sketch.teams[0]
            self._served.setdefault(team.tensor, []).append((team.data * plan.microbatches, team.rows))

    def all(self, mesh: Mesh, microbatches: int, zero: int) -> tuple[Rows, ...]:
        """The fastest first."""
        key = (mesh, microbatches, zero) if mesh.tensor > 1 else ()
        if key not in self._known:
            chains = self.problem.chains.of(self.problem, self._shape(mesh, microbatches, zero))
            self._known[key] = tuple(map(self._rows, chains)) if mesh.tensor > 1 else (Rows(),)
        return self._known[key]

    def _shape(self, mesh: Mesh, microbatches: int, zero: int) -> Shape:
        return Shape(2, mesh.data, mesh.tensor, microbatches, "1f1b", zero if mesh.data > 1 else 0)

    def _rows(self, chain: Chain) -> Rows:
        """The same object for the same chain."""
        return self._of_chain.setdefault(id(chain), (chain, Rows(chain.unique, chain.rows())))[1]


def team_of(mesh: Mesh, ranks: Sequence[int], rows: Rows, zero: int) -> Team:
    """ZeRO is off where there is no data axis."""
    return Team(tuple(ranks), mesh.data, rows.axes, rows, zero if mesh.data > 1 else 0, 0, mesh.shares)


def has_asked_axes(problem: Problem, stage: Stage) -> bool:
    """Whether a stage has the model axes that are asked for and no other, as the layouts of `MeshLayouts` do."""
    asked = problem.model_axes(stage.tensor) if stage.tensor > 1 else ()
    return stage.axes == tuple(axis.degree for axis in asked)


def place(cluster: Cluster, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Ranks of groups of these sizes: in the order of the pipeline, or the large ones first where that parts fewer of them
    over hosts."""

    def ranks(order: Sequence[int]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()] * len(sizes)
        ends = itertools.accumulate(sizes[g] for g in order)
        for g, end in zip(order, ends, strict=True):
            found[g] = tuple(range(end - sizes[g], end))
        return found

    def parted(groups: Sequence[tuple[int, ...]]) -> int:
        return sum(cluster.host(g[-1]) - cluster.host(g[0]) for g in groups)

    straight = ranks(range(len(sizes)))
    packed = ranks(sorted(range(len(sizes)), key=lambda g: -sizes[g]))
    return tuple(packed if parted(packed) < parted(straight) else straight)
