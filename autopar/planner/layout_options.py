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
from dataclasses import dataclass, field

from ..graph import Block, Graph, Op
from ..sharding.placement import REPLICATED, Placement, Split
from .layout_costs import LayoutCosts
from .layout_model import BlockModel, block_model, rest_candidates
from .layout_program import BlockProgram, Infeasible, Selection
from .layouts import BlockSolution, solution

State = tuple[Placement, ...]

# States of one boundary that are tried at most. One crossing tensor has about 4; models with several crossing tensors
# keep all candidates for the largest of them and replicate the rest.
MAX_STATES = 64


@dataclass(frozen=True)
class _Kind:
    """One integer program, the block it was built from, and what it has been asked so far."""

    block: Block
    model: BlockModel
    program: BlockProgram
    shared_parameters: tuple[str, ...]
    selections: dict[tuple, Selection | None] = field(default_factory=dict)
    solutions: dict[Selection, BlockSolution] = field(default_factory=dict)


class LayoutOptions:
    """Solutions for all blocks of `graph` on a model axis of `degree` ranks, under one set of prices."""

    def __init__(self, graph: Graph, degree: int, costs: LayoutCosts) -> None:
        self.graph, self.degree, self.costs = graph, degree, costs
        self._states = [self._boundary_states(i) for i in range(len(graph.blocks) + 1)]
        self._signatures = [self._signature(block) for block in graph.blocks]
        self._kinds: dict[tuple, _Kind] = {}

    def states(self, boundary: int) -> tuple[State, ...]:
        """The states of the cut in front of block `boundary` (behind the last block for len(blocks)) that are tried.

        Each crossing tensor is replicated or split as the ops next to the cut can produce or want it.
        """
        return self._states[boundary]

    def objective_s(
        self,
        index: int,
        inputs: State | None,
        outputs: State | None,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> float:
        """The least objective of block `index`; infinite where every layout needs a forbidden conversion.

        inputs, outputs: states of its two boundaries; None leaves a state free, which gives a lower bound for every
        state of it.
        """
        _, found = self._select(index, inputs, outputs, shared_parameters, memory_weight)
        return math.inf if found is None else found.objective_s

    def solution(
        self,
        index: int,
        inputs: State,
        outputs: State,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> BlockSolution:
        """The layout behind `objective_s`, which must be finite, held against its price."""
        kind, found = self._select(index, inputs, outputs, shared_parameters, memory_weight)
        assert found is not None, f"block {index} cannot go from {inputs} to {outputs}"
        if found not in kind.solutions:
            block, shared = kind.block, kind.shared_parameters
            kind.solutions[found] = solution(
                self.graph, block, self.degree, self.costs, kind.model, found, memory_weight, shared
            )
        return kind.solutions[found]

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
        """Integer programs solved so far."""
        return sum(len(kind.selections) for kind in self._kinds.values())

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

    def _select(
        self,
        index: int,
        inputs: State | None,
        outputs: State | None,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> tuple[_Kind, Selection | None]:
        parameters = self.graph.blocks[index].parameters
        key = (self._signatures[index], tuple(shared_parameters.get(name) for name in parameters))
        if key not in self._kinds:
            shared = {name: shared_parameters[name] for name in parameters if name in shared_parameters}
            self._kinds[key] = self._build(index, shared)
        kind, question = self._kinds[key], (inputs, outputs, memory_weight)
        if question not in kind.selections:
            kind.selections[question] = self._solve(kind, inputs, outputs, memory_weight)
        return kind, kind.selections[question]

    def _build(self, index: int, shared: dict[str, Placement]) -> _Kind:
        block = self.graph.blocks[index]
        alike = [b for b, s in zip(self.graph.blocks, self._signatures, strict=True) if s == self._signatures[index]]
        inputs, outputs = (
            [list(dict.fromkeys(column)) for column in zip(*itertools.chain(*boundaries), strict=True)]
            for boundaries in ([self._states[b.index] for b in alike], [self._states[b.index + 1] for b in alike])
        )
        model = block_model(self.graph, block, self.costs, inputs, outputs, shared)
        return _Kind(block, model, BlockProgram(model), tuple(shared))

    def _solve(self, kind: _Kind, inputs: State | None, outputs: State | None, weight: float) -> Selection | None:
        fixed = {}
        for role, names, state in (("input", kind.block.inputs, inputs), ("output", kind.block.outputs, outputs)):
            if state is not None:
                for name, placement in zip(names, state, strict=True):
                    choice = kind.model.index[role, name]
                    fixed[choice] = kind.model.choices[choice].options.index(placement)
        try:
            return kind.program.solve(weight, fixed=fixed)
        except Infeasible:
            return None


def layout_options(graph: Graph, degree: int, costs: LayoutCosts) -> LayoutOptions:
    """Nothing is solved yet: `LayoutOptions.solution` solves on demand and remembers."""
    if degree < 1:
        raise ValueError(f"degree {degree}: a model axis has at least one rank")
    return LayoutOptions(graph, degree, costs)
