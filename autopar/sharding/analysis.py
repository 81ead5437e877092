"""Everything that the rules say about one graph, each thing worked out once and kept with the graph."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ..graph import Graph, Op
from .candidates import Candidates, find_candidates
from .rule import Rule
from .rules import DEFAULT, RuleTable, make_rule, whole_rule

if TYPE_CHECKING:
    from .batch import BatchLayout
    from .strategy import Strategy


class Analysis:
    """Rules, candidates and strategies of one graph under one rule table. A memo: nothing here changes the graph."""

    def __init__(self, graph: Graph, table: RuleTable = DEFAULT) -> None:
        self.graph = graph
        self.table = table
        # See sharding/strategies.py.
        self.strategies: dict[tuple, tuple[Strategy, ...]] = {}
        self.options: dict[tuple[str, int], tuple[tuple[Strategy, ...], tuple[Strategy, ...]]] = {}
        self.offered: dict[tuple, tuple[Strategy, ...]] = {}
        self.batch_layouts: dict[int, BatchLayout] = {}
        self._rules: dict[str, Rule | None] = {}
        self._whole: dict[str, Rule] = {}
        self._gradients: dict[str, tuple[bool, ...]] = {}

    @cached_property
    def representative(self) -> dict[str, str]:
        """The op of the first block of its kind that stands for each op."""
        found = {op.name: op.name for op in self.graph.ops}
        first: dict[int, tuple[str, ...]] = {}
        for block in self.graph.blocks:
            found.update(zip(block.ops, first.setdefault(block.kind, block.ops), strict=True))
        return found

    @cached_property
    def candidates(self) -> Candidates:
        return find_candidates(self.graph, self.representative, self.rule)

    def known_rule(self, op: Op) -> Rule | None:
        """The rule of an op, None where the table has none."""
        name = self.representative[op.name]
        if name not in self._rules:
            self._rules[name] = make_rule(self.graph, self.graph.op[name], self.table)
        return self._rules[name]

    def rule(self, op: Op) -> Rule:
        """The rule of an op; the conservative one where the table has none."""
        found = self.known_rule(op)
        if found is not None:
            return found
        name = self.representative[op.name]
        if name not in self._whole:
            self._whole[name] = whole_rule(self.graph, self.graph.op[name])
        return self._whole[name]

    def gradient(self, op: Op) -> tuple[bool, ...]:
        """Per tensor of the op (inputs, then outputs): whether a gradient flows through it here."""
        name = self.representative[op.name]
        if name not in self._gradients:
            op, tensors = self.graph.op[name], self.graph.tensors
            flows = not op.no_grad and any(tensors[t].requires_grad for t in op.outputs)
            self._gradients[name] = tuple(flows and tensors[t].requires_grad for t in (*op.inputs, *op.outputs))
        return self._gradients[name]


def analysis(graph: Graph) -> Analysis:
    """The graph's analysis, made at the first call and kept in the instance, as `cached_property` keeps its values."""
    kept = vars(graph)
    if "_analysis" not in kept:
        kept["_analysis"] = Analysis(graph)
    return kept["_analysis"]


def use_rules(graph: Graph, table: RuleTable) -> Graph:
    """Have `graph` analysed under `table` (for rules of a user's own ops); returns the graph."""
    vars(graph)["_analysis"] = Analysis(graph, table)
    return graph


def rule(graph: Graph, op: Op) -> Rule:
    """What may be done in parallel in `op`; for an op that has no rule, the one that keeps it whole."""
    return analysis(graph).rule(op)


def unknown_ops(graph: Graph) -> tuple[Op, ...]:
    """Ops that have no rule and so run whole on the model axes."""
    found = analysis(graph)
    return tuple(op for op in graph.ops if op.outputs and found.known_rule(op) is None)
