"""Which side ops a stage computes: those of the prologue, once per step, and those of every microbatch."""

from __future__ import annotations

from ..graph import Block, Graph, Op
from ..sharding.batch import batch_layout
from ..sharding.rows import Parts


class SideOps:
    """Answers are remembered."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._order = tuple(op for op in graph.ops if op.name in graph.side_ops)
        self._found: dict[tuple[int, int, Parts], tuple[list[Op], list[Op]]] = {}
        self._reads: dict[int, frozenset[str]] = {}

    def of(self, start: int, stop: int, shards: Parts) -> tuple[list[Op], list[Op]]:
        """(prologue ops, side ops per microbatch) that blocks [start, stop) need."""
        key = (start, stop, shards)
        if key not in self._found:
            read = set().union(*(self._read_by(block) for block in self.graph.blocks[start:stop]))
            whole = set(batch_layout(self.graph, shards.numerator).prologue)
            every = self._ancestors(read, frozenset())
            prologue = self._ancestors({t for op in every for t in op.outputs if t in whole}, frozenset())
            self._found[key] = (prologue, self._ancestors(read - whole, frozenset(whole)))
        return self._found[key]

    def _read_by(self, block: Block) -> frozenset[str]:
        """What a block reads of the side ops."""
        if block.index not in self._reads:
            side, producer = self.graph.side_ops, self.graph.producer
            inputs = (name for op in self.graph.block_ops(block) for name in op.inputs)
            self._reads[block.index] = frozenset(n for n in inputs if n in producer and producer[n].name in side)
        return self._reads[block.index]

    def _ancestors(self, wanted: set[str], stop: frozenset[str]) -> list[Op]:
        """The side ops that lead to `wanted`, not going past `stop`."""
        found: set[str] = set()
        todo = list(wanted)
        while todo:
            op = self.graph.producer.get(todo.pop())
            if op is not None and op.name in self.graph.side_ops and op.name not in found:
                found.add(op.name)
                todo += [name for name in op.inputs if name not in stop]
        return [op for op in self._order if op.name in found]
