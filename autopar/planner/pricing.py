"""Stage costs for the searches: each distinct stage is asked of the cost model once.

A stage's cost depends on what its blocks are (their kinds, in order), not on where they stand; on its degrees, its
share of the batch, recompute and ZeRO; on how its ranks, and those that it sends to, lie on hosts; and, where it
holds a parameter that another stage holds too, on the stage's place in the pipeline. Two stages that agree in all of
these are one entry here. In a 32-layer transformer some hundred entries stand for the tens of thousands of possible
stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..cost.types import StageCost
from ..plan import Plan, Recompute, Stage, same_recompute, tensor_axes
from .problem import Chain, Problem, Shape


@dataclass(frozen=True, slots=True)
class Piece:
    """The blocks [start, stop) of one stage, and whether it recomputes."""

    start: int
    stop: int
    recompute: Recompute


def assemble(problem: Problem, shape: Shape, chain: Chain, pieces: Sequence[Piece]) -> Plan:
    """The plan of this shape whose stages are `pieces`."""
    return Plan(
        model=problem.graph.name,
        fingerprint=problem.graph.fingerprint,
        world_size=shape.pipeline * shape.data * shape.tensor,
        batch_size=problem.graph.batch_size,
        microbatches=shape.microbatches,
        schedule=shape.schedule,
        stages=tuple(
            Stage(
                piece.start, piece.stop, shape.ranks(s), shape.data, tensor_axes(shape.tensor),
                (chain.index[piece.start : piece.stop],) if shape.tensor > 1 else (),
                same_recompute(piece.recompute, piece.stop - piece.start), shape.zero,
            )
            for s, piece in enumerate(pieces)
        ),
        layouts=chain.unique,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class StagePrices:
    """The cost of every stage that a search may ask about."""

    problem: Problem
    _known: dict[tuple, StageCost] = field(default_factory=dict, repr=False)
    _hosts: dict[tuple, tuple] = field(default_factory=dict, repr=False)
    _runs: dict[tuple, tuple] = field(default_factory=dict, repr=False)

    def cost(self, shape: Shape, chain: Chain, stage: int, piece: Piece) -> StageCost:
        """Per rank and microbatch, as stage number `stage` of a plan of this shape.

        Exact but for `reduce_model_s` of a stage that shares a parameter with a middle block whose stage is not known
        from `piece` alone; the simulation of a whole plan, which decides, asks for that plan's own stages.
        """
        run = self._run(piece)
        shared = run[1]
        key = (
            run,
            (shape.data, shape.tensor, shape.microbatches, shape.zero, piece.recompute),
            # equal by identity, and alive as long as this key
            chain if chain.index else None,
            chain.index[piece.start : piece.stop],
            self._where(shape, stage),
            (stage, shape.pipeline) if shared else None,
        )
        found = self._known.get(key)
        if found is None:
            pieces = _surround(piece, stage, shape.pipeline, len(self.problem.graph.blocks))
            found = self.problem.costs.stage(assemble(self.problem, shape, chain, pieces), stage)
            self._known[key] = found
        return found

    def _run(self, piece: Piece) -> tuple:
        """(kinds, shared parameters, starts the model, ends the model) of the blocks of a piece."""
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
        key = (shape.pipeline, shape.data * shape.tensor, stage)
        if key not in self._hosts:
            host, ranks = self.problem.cluster.host, shape.ranks(stage)
            after = shape.ranks(stage + 1) if stage + 1 < shape.pipeline else ()
            self._hosts[key] = (
                tuple(host(r) - host(ranks[0]) for r in ranks),
                tuple(host(r) - host(ranks[0]) for r in after),
            )
        return self._hosts[key]

    def of_plan(self, plan: Plan, shape: Shape, chain: Chain, pieces: Sequence[Piece]) -> list[StageCost]:
        """The costs of a whole plan's stages, exact also where stages share parameters."""
        if self._shared:
            return [self.problem.costs.stage(plan, s) for s in range(plan.pipeline)]
        return [self.cost(shape, chain, s, piece) for s, piece in enumerate(pieces)]

    @cached_property
    def _shared(self) -> frozenset[str]:
        return frozenset(self.problem.graph.shared_parameters)


def _surround(piece: Piece, stage: int, pipeline: int, num_blocks: int) -> list[Piece]:
    """Pieces of a whole plan in which `piece` is stage `stage`: the neighbours are large, the others one block each."""
    before, after = stage, pipeline - stage - 1
    pieces = [Piece(i, i + 1, "none") for i in range(before - 1)]
    if before:
        pieces.append(Piece(before - 1, piece.start, "none"))
    pieces.append(piece)
    if after:
        pieces.append(Piece(piece.stop, num_blocks - after + 1, "none"))
        pieces += [Piece(i, i + 1, "none") for i in range(num_blocks - after + 1, num_blocks)]
    assert all(p.start < p.stop for p in pieces), (
        f"{piece} cannot be stage {stage} of {pipeline} over {num_blocks} blocks"
    )
    return pieces
