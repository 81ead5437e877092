"""Layouts from a strategy per op, for methods that decide op by op."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph import Block, Graph
from ...plan import Layout
from ...sharding.placement import REPLICATED, Placement, Split
from ...sharding.strategy import Strategy
from ..problem import Chain


def crossing(graph: Graph, chosen: Mapping[str, Strategy], name: str) -> Placement:
    """How a tensor lies between blocks: as its producer leaves it if that is a split, else whole."""
    op = graph.producer.get(name)
    if op is None or op.name not in chosen or name == graph.loss:
        return REPLICATED
    made = chosen[op.name].outputs[op.outputs.index(name)]
    return made if isinstance(made, Split) else REPLICATED


def at_rest(graph: Graph, chosen: Mapping[str, Strategy], name: str) -> Placement:
    """How a parameter lies at rest: split where all its uses want that one split, else whole."""
    wanted = {
        place
        for op in graph.consumers[name]
        if op.name in chosen
        for other, place in zip(op.inputs, chosen[op.name].inputs, strict=True)
        if other == name
    }
    (only,) = wanted if len(wanted) == 1 else (REPLICATED,)
    return only if isinstance(only, Split) else REPLICATED


def chain_of(graph: Graph, degree: int, chosen: Mapping[str, Strategy]) -> Chain:
    """The layouts of all blocks whose ops take the chosen strategies. chosen: by name, for every main op."""

    def layout(block: Block) -> Layout:
        return Layout(
            degree,
            tuple(chosen[name].key for name in block.ops),
            tuple(str(crossing(graph, chosen, name)) for name in block.inputs),
            tuple(str(crossing(graph, chosen, name)) for name in block.outputs),
            tuple(str(at_rest(graph, chosen, name)) for name in block.parameters),
        )

    return Chain.of([layout(block) for block in graph.blocks])
