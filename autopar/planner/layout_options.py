"""Optimal layouts of every kind of block, by how its inputs arrive and its outputs leave; solved when first asked for.

A boundary is the cut in front of a block (boundary i lies before block i); its state is one placement per tensor that
crosses it. Blocks of one kind share one integer program and its solutions, position by position. What else tells two
blocks apart is part of the key: which of their tensors take gradients, and the placements of parameters that other
blocks use as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..graph import Block, Graph, Op
from ..sharding.placement import REPLICATED, Placement, Split
from .layout_costs import LayoutCosts
from .layout_model import BlockModel, block_model, rest_candidates
from .layout_program import BlockProgram, Infeasible
from .layouts import BlockSolution, solution

State = tuple[Placement, ...]

# States of one boundary that are tried at most. One crossing tensor has about 4; models with several crossing tensors
# keep all candidates for the largest of them and replicate the rest.
MAX_STATES = 64


@dataclass(frozen=True)
class _Kind:
    """One integer program: the block it was built from, and where its boundary choices are."""

    block: Block
    model: BlockModel
    program: BlockProgram
    shared_parameters: tuple[str, ...]


class LayoutOptions:
    """Solutions for all blocks of `graph` on a model axis of `degree` ranks, under one set of prices."""

    def __init__(self, graph: Graph, degree: int, costs: LayoutCosts) -> None:
        self.graph, self.degree, self.costs = graph, degree, costs
        self._states = [self._boundary_states(i) for i in range(len(graph.blocks) + 1)]
        self._signatures = [self._signature(block) for block in graph.blocks]
        self._kinds: dict[tuple, _Kind] = {}
        self._solved: dict[tuple, BlockSolution | None] = {}

    def states(self, boundary: int) -> tuple[State, ...]:
        """The states of the cut in front of block `boundary` (behind the last block for len(blocks)) that are tried.

        Each crossing tensor is replicated or split as the ops next to the cut can produce or want it.
        """
        return self._states[boundary]

    def solution(
        self,
        index: int,
        inputs: State | None,
        outputs: State | None,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> BlockSolution | None:
        """The best layout of block `index`; None where no finite one exists.

        inputs, outputs: states of its two boundaries; None leaves a state free, so that the objective is a lower bound
        for every state.
        """
        key, shared = self._key(index, shared_parameters)
        question = (key, inputs, outputs, memory_weight)
        if question not in self._solved:
            if key not in self._kinds:
                self._kinds[key] = self._build(index, shared)
            self._solved[question] = self._solve(self._kinds[key], inputs, outputs, memory_weight)
        return self._solved[question]

    def candidates(self, parameter: str) -> tuple[Placement, ...]:
        """Placements at rest of `parameter` that its uses in all blocks suggest."""
        wanted: dict[Placement, None] = {}
        for op in self.graph.consumers[parameter]:
            for strategy in self.costs.strategies(op):
                wanted.update(
                    (p, None) for p, name in zip(strategy.inputs, op.inputs, strict=True) if name == parameter
                )
        return rest_candidates(wanted)

    @property
    def num_solved(self) -> int:
        return len(self._solved)

    def _boundary_states(self, boundary: int) -> tuple[State, ...]:
        blocks = self.graph.blocks
        if boundary in (0, len(blocks)):
            crossing = blocks[0].inputs if boundary == 0 else blocks[-1].outputs
            return ((REPLICATED,) * len(crossing),)
        crossing = blocks[boundary].inputs
        assert crossing == blocks[boundary - 1].outputs, f"blocks {boundary - 1} and {boundary} do not meet"
        candidates = {name: self._crossing_candidates(name) for name in crossing}
        room = MAX_STATES
        for name in sorted(crossing, key=lambda n: -self.graph.tensors[n].size_bytes):
            if len(candidates[name]) > room:
                candidates[name] = (REPLICATED,)
            room //= len(candidates[name])
        return tuple(itertools.product(*(candidates[name] for name in crossing)))

    def _crossing_candidates(self, name: str) -> tuple[Placement, ...]:
        found: dict[Placement, None] = {REPLICATED: None}

        def note(op: Op, names: tuple[str, ...], field: str) -> None:
            for strategy in self.costs.strategies(op):
                placements = zip(getattr(strategy, field), names, strict=True)
                found.update((p, None) for p, n in placements if n == name and isinstance(p, Split))

        producer = self.graph.producer[name]
        note(producer, producer.outputs, "outputs")
        for op in self.graph.consumers[name]:
            note(op, op.inputs, "inputs")
        return tuple(found)

    def _signature(self, block: Block) -> tuple:
        """What tells blocks of one kind apart besides their parameters' placements."""
        names = [name for op in self.graph.block_ops(block) for name in (*op.inputs, *op.outputs)]
        gradients = tuple(self.graph.tensors[name].requires_grad for name in names)
        return block.kind, gradients, self.graph.loss in names

    def _key(self, index: int, shared_parameters: Mapping[str, Placement]) -> tuple[tuple, dict[str, Placement]]:
        shared = {n: shared_parameters[n] for n in self.graph.blocks[index].parameters if n in shared_parameters}
        positions = tuple(shared.get(name) for name in self.graph.blocks[index].parameters)
        return (self._signatures[index], positions), shared

    def _build(self, index: int, shared: dict[str, Placement]) -> _Kind:
        block = self.graph.blocks[index]
        alike = [b for b, s in zip(self.graph.blocks, self._signatures, strict=True) if s == self._signatures[index]]
        inputs, outputs = (
            [list(dict.fromkeys(column)) for column in zip(*itertools.chain(*boundaries), strict=True)]
            for boundaries in ([self._states[b.index] for b in alike], [self._states[b.index + 1] for b in alike])
        )
        model = block_model(self.graph, block, self.costs, inputs, outputs, shared)
        return _Kind(block, model, BlockProgram(model), tuple(shared))

    def _solve(self, kind: _Kind, inputs: State | None, outputs: State | None, weight: float) -> BlockSolution | None:
        fixed = {}
        for role, names, state in (("input", kind.block.inputs, inputs), ("output", kind.block.outputs, outputs)):
            for name, placement in zip(names, state if state is not None else (), strict=state is not None):
                choice = kind.model.index[role, name]
                fixed[choice] = kind.model.choices[choice].options.index(placement)
        try:
            found = kind.program.solve(weight, fixed=fixed)
        except Infeasible:
            return None
        return solution(
            self.graph, kind.block, self.degree, self.costs, kind.model, found, weight, kind.shared_parameters
        )


def layout_options(graph: Graph, degree: int, costs: LayoutCosts) -> LayoutOptions:
    """Nothing is solved yet: `LayoutOptions.solution` solves on demand and remembers."""
    if degree < 1:
        raise ValueError(f"degree {degree}: a model axis has at least one rank")
    return LayoutOptions(graph, degree, costs)


def objective(found: BlockSolution | None) -> float:
    """Seconds, infinite for an impossible combination of states."""
    return math.inf if found is None else found.objective_s
