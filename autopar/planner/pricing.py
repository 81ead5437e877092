"""Stage costs for the searches: each distinct stage is asked of the cost model once.

A stage's cost depends on what its blocks are (their kinds, in order), not on where they stand; on its degrees, its
share of the batch, recompute and ZeRO; on how its ranks, and those that it sends to, lie on hosts; and, where it
holds a parameter that another stage holds too, on the stage's place in the pipeline. Two stages that agree in all of
these are one entry here. In a 32-layer transformer some hundred entries stand for the tens of thousands of possible
stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..cost.types import StageCost
from ..plan import Plan, Recompute, Stage, same_recompute
from .problem import Chain, Problem, Shape
from .runs import Runs, make_runs


@dataclass(frozen=True, slots=True)
class Piece:
    """The blocks [start, stop) of one stage, and whether it recomputes."""

    start: int
    stop: int
    recompute: Recompute


def assemble(problem: Problem, shape: Shape, chain: Chain, pieces: Sequence[Piece], first: int = 0) -> Plan:
    """The plan of this shape whose stages are `pieces`, which stand from place `first` of the pipeline on."""
    return Plan(
        model=problem.graph.name,
        fingerprint=problem.graph.fingerprint,
        world_size=shape.pipeline * shape.data * shape.tensor,
        batch_size=problem.graph.batch_size,
        microbatches=shape.microbatches,
        schedule=shape.schedule,
        stages=tuple(
            Stage(
                piece.start, piece.stop, shape.ranks(first + s), shape.data, chain.axes if shape.tensor > 1 else (),
                chain.rows(piece.start, piece.stop) if shape.tensor > 1 else (),
                same_recompute(piece.recompute, piece.stop - piece.start), shape.zero,
            )
            for s, piece in enumerate(pieces)
        ),
        layouts=chain.unique,
        precision=problem.graph.precision,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class StagePrices:
    """The cost of every stage that a search may ask about."""

    problem: Problem
    _known: dict[tuple, StageCost] = field(default_factory=dict, repr=False)
    _tables: dict[tuple, Runs] = field(default_factory=dict, repr=False)
    _hosts: dict[tuple, tuple] = field(default_factory=dict, repr=False)
    _runs: dict[tuple, tuple] = field(default_factory=dict, repr=False)

    def cost(self, shape: Shape, chain: Chain, stage: int, piece: Piece) -> StageCost:
        """Per rank and microbatch, as stage number `stage` of a plan of this shape.

        Exact but for `reduce_model_s` of a stage that shares a parameter with a stage that is not its neighbour; the
        simulation of a whole plan, which decides, asks for that plan's own stages.
        """
        run = self._run(piece)
        key = (
            run,
            (shape.data, shape.tensor, shape.microbatches, shape.zero, piece.recompute),
            # equal by identity, and alive as long as this key
            chain if chain.index else None,
            chain.rows(piece.start, piece.stop),
            self._where(shape, stage),
        )
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._ask(shape, chain, stage, piece)
        return found

    def runs(self, shape: Shape, chain: Chain, stage: int, recompute: Recompute) -> Runs:
        """The costs of all runs of blocks that can be stage number `stage`."""
        num_blocks, last = len(self.problem.graph.blocks), shape.pipeline - 1
        key = (
            (shape.pipeline, shape.data, shape.tensor, shape.microbatches, shape.zero, recompute),
            chain if chain.index else None,
            self._where(shape, stage),
            stage == 0,
            stage == last,
        )
        if key not in self._tables:
            starts = range(1) if stage == 0 else range(1, num_blocks)
            stops = range(num_blocks, num_blocks + 1) if stage == last else range(1, num_blocks)
            self._tables[key] = make_runs(
                self._kinds(chain), starts, stops, num_blocks - last,
                lambda start, stop: self.cost(shape, chain, stage, Piece(start, stop, recompute)),
            )  # fmt: skip
        return self._tables[key]

    def _kinds(self, chain: Chain) -> list[tuple]:
        """What tells neighbouring blocks apart: their kind, their layout, and parameters that other blocks use too."""
        blocks = self.problem.graph.blocks
        layouts = list(zip(*chain.rows(), strict=True)) or [()] * len(blocks)
        return [
            (block.kind, layout, tuple(name for name in block.parameters if name in self._shared))
            for block, layout in zip(blocks, layouts, strict=True)
        ]

    def _ask(self, shape: Shape, chain: Chain, stage: int, piece: Piece) -> StageCost:
        """Of a pipeline that has the piece in its place, and as one stage each what comes before and behind it."""
        num_blocks, before = len(self.problem.graph.blocks), int(piece.start > 0)
        pieces = [Piece(0, piece.start, "none")] if before else []
        pieces.append(piece)
        if piece.stop < num_blocks:
            pieces.append(Piece(piece.stop, num_blocks, "none"))
        return self.problem.costs.stage(assemble(self.problem, shape, chain, pieces, stage - before), before)

    def _run(self, piece: Piece) -> tuple:
        """(kinds, shared parameters, starts the model, kind of what follows) of the blocks of a piece."""
        key = (piece.start, piece.stop)
        if key not in self._runs:
            blocks = self.problem.graph.blocks[piece.start : piece.stop]
            shared = tuple(name for block in blocks for name in block.parameters if name in self._shared)
            following = (
                self.problem.graph.blocks[piece.stop].kind if piece.stop < len(self.problem.graph.blocks) else None
            )
            self._runs[key] = (tuple(block.kind for block in blocks), shared, piece.start == 0, following)
        return self._runs[key]

    def _where(self, shape: Shape, stage: int) -> tuple:
        """How the ranks of a stage and of the next one lie on hosts, relative to its first rank."""
        key = (shape.pipeline, shape.data * shape.tensor, shape.spacing, stage)
        if key not in self._hosts:
            ranks = shape.ranks(stage)
            after = shape.ranks(stage + 1) if stage + 1 < shape.pipeline else ()
            base = self.problem.cluster.host(ranks[0])
            self._hosts[key] = (self._host_runs(ranks, base), self._host_runs(after, base))
        return self._hosts[key]

    def _host_runs(self, ranks: Sequence[int], base: int) -> tuple[tuple[int, int], ...]:
        """(host relative to `base`, how many of the ranks in a row lie on it)."""
        return tuple(
            (h - base, len(list(mine))) for h, mine in itertools.groupby(map(self.problem.cluster.host, ranks))
        )

    def of_plan(self, shape: Shape, chain: Chain, pieces: Sequence[Piece]) -> list[StageCost]:
        """The costs of a whole plan's stages, exact also where stages share parameters."""
        if self._shared:
            plan = assemble(self.problem, shape, chain, pieces)
            return [self.problem.costs.stage(plan, s) for s in range(plan.pipeline)]
        return [self.cost(shape, chain, s, piece) for s, piece in enumerate(pieces)]

    @cached_property
    def _shared(self) -> frozenset[str]:
        return frozenset(self.problem.graph.shared_parameters)
