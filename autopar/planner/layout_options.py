"""Optimal layouts of every kind of block, by how its inputs arrive and its outputs leave; solved when first asked for.

A boundary is the cut in front of a block (boundary i lies before block i); its state is one placement per tensor that
crosses it. Blocks of one kind share one model and its solutions, position by position. What else tells two blocks apart
is part of the key: which of their tensors take gradients, and the placements of parameters that other blocks use as
well. Elimination (layout_elimination.py) answers for all states of both boundaries at once; the few blocks that are too
wide for it are integer programs (layout_program.py), one per pair of states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..graph import Block, Graph, Op
from ..sharding.placement import REPLICATED, Placement, Split
from .layout_costs import LayoutCosts
from .layout_elimination import Elimination, Order, Solved, TooWide
from .layout_model import BlockModel, block_model, repriced, rest_candidates
from .layout_program import BlockProgram, Infeasible, Selection
from .layouts import BlockSolution, solution

State = tuple[Placement, ...]

# States of one boundary that are tried at most. One crossing tensor has about 4; models with several crossing tensors
# keep all candidates for the largest of them and replicate the rest.
MAX_STATES = 64


@dataclass
class _Kind:
    """One model of a block, the block it was built from, and what it has been asked so far.

    tables: None where the block is too wide for them; then programs are solved instead.
    """

    block: Block
    model: BlockModel
    shared_parameters: tuple[str, ...]
    tables: Elimination | None
    solved: dict[float, Solved] = field(default_factory=dict)
    program: BlockProgram | None = None
    selections: dict[tuple, Selection | None] = field(default_factory=dict)
    solutions: dict[tuple[tuple[int, ...], float], BlockSolution] = field(default_factory=dict)

    def fixed(self, inputs: State | None, outputs: State | None) -> dict[int, int]:
        """The options of the boundary's choices in these states."""
        found = {}
        for role, names, state in (("input", self.block.inputs, inputs), ("output", self.block.outputs, outputs)):
            for name, placement in zip(names, state or (), strict=state is not None):
                choice = self.model.index[role, name]
                found[choice] = self.model.choices[choice].options.index(placement)
        return found


class LayoutOptions:
    """Solutions for all blocks of `graph` on a model axis of `degree` ranks, under one set of prices."""

    def __init__(
        self,
        graph: Graph,
        degree: int,
        costs: LayoutCosts,
        orders: dict[Hashable, Order] | None = None,
        basis: LayoutOptions | None = None,
    ) -> None:
        self.graph, self.degree, self.costs, self._basis = graph, degree, costs, basis
        self._orders = {} if orders is None else orders
        if basis is None:
            self._states = [self._boundary_states(i) for i in range(len(graph.blocks) + 1)]
            # Boundaries with equal states have one tuple, so that identity tells them apart.
            same = {states: states for states in self._states}
            self._states = [same[states] for states in self._states]
            numbers: dict[tuple, int] = {}
            self._signatures = [numbers.setdefault(self._signature(b), len(numbers)) for b in graph.blocks]
        else:
            self._states, self._signatures = basis._states, basis._signatures
        self._kinds: dict[tuple, _Kind] = {}
        self._tables: dict[tuple, np.ndarray] = {}
        self._rows: dict[tuple, list[_Kind | None]] = {}

    def states(self, boundary: int) -> tuple[State, ...]:
        """The states of the cut in front of block `boundary` (behind the last block for len(blocks)) that are tried.

        Each crossing tensor is replicated or split as the ops next to the cut can produce or want it.
        """
        return self._states[boundary]

    def table(self, index: int, shared_parameters: Mapping[str, Placement], memory_weight: float) -> np.ndarray | None:
        """objective_s[state in front of block `index`, state behind it]; None where only programs can tell.

        Infinite where every layout needs a forbidden conversion.
        """
        kind = self._kind(index, shared_parameters)
        if kind.tables is None:
            return None
        before, after = self._states[index], self._states[index + 1]
        question = (id(kind), memory_weight, id(before), id(after))
        if question not in self._tables:
            all_s = self._solved(kind, memory_weight).objective_s
            rows, columns = (
                [tuple(kind.fixed(*state).values()) for state in states]
                for states in ([(p, None) for p in before], [(None, q) for q in after])
            )
            found = np.array([[all_s[(*row, *column)] for column in columns] for row in rows])
            self._tables[question] = found.reshape(len(before), len(after))
        return self._tables[question]

    def objective_s(
        self,
        index: int,
        inputs: State | None,
        outputs: State | None,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> float:
        """The least objective of block `index`, by its program; infinite where a forbidden conversion is needed.

        inputs, outputs: states of its two boundaries; None leaves a state free, which gives a lower bound for every
        state of it.
        """
        found = self._select(self._kind(index, shared_parameters), inputs, outputs, memory_weight)
        return math.inf if found is None else found.objective_s

    def solution(
        self,
        index: int,
        inputs: State,
        outputs: State,
        shared_parameters: Mapping[str, Placement],
        memory_weight: float,
    ) -> BlockSolution:
        """The layout behind the objective, which must be finite, held against its price."""
        kind = self._kind(index, shared_parameters)
        question = (inputs, outputs, memory_weight)
        if question not in kind.selections and kind.tables is not None:
            kind.selections[question] = self._selection(kind, inputs, outputs, memory_weight)
        found = self._select(kind, inputs, outputs, memory_weight)
        assert found is not None, f"block {index} cannot go from {inputs} to {outputs}"
        known = (found.options, memory_weight)
        if known not in kind.solutions:
            block, shared = kind.block, kind.shared_parameters
            kind.solutions[known] = solution(
                self.graph, block, self.degree, self.costs, kind.model, found, memory_weight, shared
            )
        return kind.solutions[known]

    def least_s(self) -> list[float]:
        """Per block, a time that no layout of it beats, however its neighbours are laid out."""
        return [self._least_s(index) for index in range(len(self.graph.blocks))]

    def _least_s(self, index: int) -> float:
        kind = self._kind(index, {})
        if kind.tables is None:
            return self.objective_s(index, None, None, {}, 0.0)
        return float(self._solved(kind, 0.0).objective_s.min())

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
        """Eliminations and integer programs solved so far."""
        return sum(len(k.solved) if k.tables else len(k.selections) for k in self._kinds.values())

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

    def _kind(self, index: int, shared_parameters: Mapping[str, Placement]) -> _Kind:
        rest = tuple(shared_parameters.items())
        if rest not in self._rows:
            self._rows[rest] = [None] * len(self.graph.blocks)
        row = self._rows[rest]
        if row[index] is None:
            row[index] = self._find_kind(index, shared_parameters)
        return row[index]

    def _find_kind(self, index: int, shared_parameters: Mapping[str, Placement]) -> _Kind:
        shared = {}
        if shared_parameters:
            parameters = self.graph.blocks[index].parameters
            shared = {name: shared_parameters[name] for name in parameters if name in shared_parameters}
        # Not by its parameters' names, which differ within a kind: by where they stand.
        placed = tuple(map(shared.get, self.graph.blocks[index].parameters)) if shared else ()
        key = (self._signatures[index], placed)
        if key not in self._kinds:
            self._kinds[key] = self._build(index, shared)
        return self._kinds[key]

    def _build(self, index: int, shared: dict[str, Placement]) -> _Kind:
        if self._basis is not None:
            common = self._basis._kind(index, shared)
            model = repriced(common.model, self.costs, common.shared_parameters)
            tables = common.tables and self._eliminate(common.block, model, common.tables)
            return _Kind(common.block, model, common.shared_parameters, tables)
        block = self.graph.blocks[index]
        alike = [b for b, s in zip(self.graph.blocks, self._signatures, strict=True) if s == self._signatures[index]]
        inputs, outputs = (
            [list(dict.fromkeys(column)) for column in zip(*itertools.chain(*boundaries), strict=True)]
            for boundaries in (
                {id(states): states for states in (self._states[b.index] for b in alike)}.values(),
                {id(states): states for states in (self._states[b.index + 1] for b in alike)}.values(),
            )
        )
        model = block_model(self.graph, block, self.costs, inputs, outputs, shared)
        return _Kind(block, model, tuple(shared), self._eliminate(block, model, None))

    def _eliminate(self, block: Block, model: BlockModel, basis: Elimination | None) -> Elimination | None:
        boundary = [model.index["input", n] for n in block.inputs] + [model.index["output", n] for n in block.outputs]
        try:
            return Elimination(model, boundary, self._orders, basis)
        except TooWide:
            return None

    def _solved(self, kind: _Kind, weight: float) -> Solved:
        if weight not in kind.solved:
            kind.solved[weight] = kind.tables.table(weight)
        return kind.solved[weight]

    def _selection(self, kind: _Kind, inputs: State, outputs: State, weight: float) -> Selection:
        """The minimiser that elimination remembers."""
        fixed, solved = kind.fixed(inputs, outputs), self._solved(kind, weight)
        options = solved.selection(fixed)
        time_s, memory_bytes = kind.model.price(options)
        objective_s = time_s + weight * memory_bytes
        bound_s = min(objective_s, float(solved.objective_s[tuple(fixed.values())]))
        return Selection(options, time_s, memory_bytes, objective_s, bound_s, True, True)

    def _select(
        self, kind: _Kind, inputs: State | None, outputs: State | None, memory_weight: float
    ) -> Selection | None:
        question = (inputs, outputs, memory_weight)
        if question not in kind.selections:
            kind.program = kind.program or BlockProgram(kind.model)
            try:
                kind.selections[question] = kind.program.solve(memory_weight, fixed=kind.fixed(inputs, outputs))
            except Infeasible:
                kind.selections[question] = None
        return kind.selections[question]


def layout_options(
    graph: Graph,
    degree: int,
    costs: LayoutCosts,
    orders: dict[Hashable, Order] | None = None,
    basis: LayoutOptions | None = None,
) -> LayoutOptions:
    """Nothing is solved yet: `LayoutOptions.solution` solves on demand and remembers.

    orders: orders of elimination that other prices of the same graph have found and this one may reuse.
    basis: options of the same graph and degree under prices that differ in parameters alone.
    """
    if degree < 1:
        raise ValueError(f"degree {degree}: a model axis has at least one rank")
    return LayoutOptions(graph, degree, costs, orders, basis)
