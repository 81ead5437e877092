"""Layouts in the words that engineers use: Megatron, sequence parallel, Ulysses, context and vocabulary parallel.

The names are read off the placements of the chosen strategies. No class or module name is looked at: what is called
attention is what flows into and out of a scaled-dot-product-attention op, what is called MLP are the other products of
an activation with a weight, what is called head is a product that reaches the loss without another one in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..graph import Block, Graph, Op
from ..plan import Layout
from ..sharding.flow import Run, Step, block_flow
from ..sharding.placement import PARTIAL, Placement, Split
from ..sharding.strategy import Strategy

COLUMN_ROW = "column/row parallel"


def describe_layout(graph: Graph, block: Block, layout: Layout, shards: int = 1) -> str:
    """One line on one block, e.g. "tensor 2: column/row parallel attention and MLP (Megatron), sequence split".

    shards: data degree x microbatches of the plan that the layout belongs to.
    """
    return describe_layouts(graph, (block,), (layout,), shards)


def describe_layouts(graph: Graph, blocks: Sequence[Block], layouts: Sequence[Layout], shards: int = 1) -> str:
    """One line on several blocks of one model axis; equal (kind, layout) pairs are looked at once."""
    assert blocks and len(blocks) == len(layouts), (len(blocks), len(layouts))
    facts = _Facts()
    seen: set[tuple[int, Layout]] = set()
    for block, layout in zip(blocks, layouts, strict=True):
        if (block.kind, layout) not in seen:
            seen.add((block.kind, layout))
            _Reader(graph, block_flow(graph, block, (layout,), shards)).collect(facts)
    return f"tensor {layouts[0].degree}: {facts.words()}"


def read_facts(graph: Graph, flows: Iterable[Sequence[Step]], axis: int) -> _Facts:
    """How the parts of the blocks that flow so run on one of their model axes."""
    facts = _Facts()
    for steps in flows:
        _Reader(graph, steps, axis).collect(facts)
    return facts


@dataclass
class _Facts:
    """How each part of the model is run; a Counter of schemes per part, and the parts with their own names."""

    parts: dict[str, Counter] = field(default_factory=dict)
    vocabulary: set[str] = field(default_factory=set)
    residual: Counter = field(default_factory=Counter)
    experts: int = 0

    def words(self) -> str:
        groups: dict[str, list[str]] = {}
        for part, counts in self.parts.items():
            groups.setdefault(_one_scheme(counts), []).append(part)
        if groups.keys() <= {"replicated"}:
            return "everything replicated"
        said = []
        for scheme, parts in groups.items():
            if scheme != "replicated":
                megatron = " (Megatron)" if scheme == COLUMN_ROW and "attention" in parts else ""
                how, _, remark = scheme.partition(": ")
                said.append(f"{how} {_listed(parts)}{f' ({remark})' if remark else megatron}")
        residual = [kind for kind in ("sequence", "space", "batch", "features") if self.residual[kind]]
        repeated = {f"{kind} split" for kind in residual if any(scheme.startswith(kind) for scheme in groups)}
        said += [words for kind in residual if (words := f"{kind} split") not in repeated]
        if self.vocabulary:
            order = [part for part in ("embedding", "loss") if part in self.vocabulary]
            said.append(f"vocabulary-parallel {'/'.join(order)}")
        return ", ".join(said)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _one_scheme(counts: Counter) -> str:
    """The scheme of a part that all blocks agree on; else the most common first. A remark may follow a colon."""
    ranked = [scheme for scheme, _ in counts.most_common()]
    if set(ranked) == {"column parallel", "row parallel"}:  # a column and its row stand in different blocks
        return COLUMN_ROW
    return ranked[0] if len(ranked) == 1 else f"mixed ({', '.join(scheme.partition(': ')[0] for scheme in ranked)})"


class _Reader:
    """Reads one block's steps."""

    def __init__(self, graph: Graph, steps: Sequence[Step], axis: int = 0) -> None:
        self.graph = graph
        self.runs = {step.op.name: (step.op, step.strategies[axis]) for step in steps if isinstance(step, Run)}
        self.handed_on = {graph.tensors[name].shape for block in graph.blocks for name in block.outputs}

    def collect(self, facts: _Facts) -> None:
        attention = [pair for pair in self.runs.values() if _is_attention(pair[0])]
        before = self._products_near([t for op, _ in attention for t in op.inputs], forward=False)
        after = self._products_near([t for op, _ in attention for t in op.outputs], forward=True)
        rest = []
        for op, strategy in self.runs.values():
            if op.target == "autopar.routed_rows":
                facts.experts += strategy.key.partition("@")[0] in ("e", "n+e")
            if op.target.startswith("aten.embedding."):
                facts.parts.setdefault("embedding", Counter())[self._embedding(op, strategy, facts)] += 1
            elif "cross_entropy" in op.target:
                facts.parts.setdefault("loss", Counter())[self._loss(op, strategy, facts)] += 1
            elif self._weight(op) is not None:
                if op.name not in before and op.name not in after:
                    rest.append(op)
            elif self._is_residual(op):
                kind = self._kind(op.outputs[0], strategy.outputs[0])
                if kind:
                    facts.residual[kind] += 1
        for op, strategy in attention:
            facts.parts.setdefault("attention", Counter())[self._attention(op, strategy, before, after)] += 1
        self._collect_products(rest, facts)
        for part in ("embedding", "loss"):
            if part in facts.vocabulary:
                facts.parts.pop(part, None)

    def _collect_products(self, rest: list[Op], facts: _Facts) -> None:
        heads = [op for op in rest if self._reaches_loss(op)]
        groups = {
            "head": heads,
            "MLP": [op for op in rest if op not in heads and len(self._shape(self._weight(op))) == 2],
            "convolutions": [op for op in rest if op not in heads and len(self._shape(self._weight(op))) > 2],
        }
        for part, ops in groups.items():
            if ops:
                kinds = {self._product(op) for op in ops}
                facts.parts.setdefault(part, Counter())[_scheme(kinds)] += 1
        if "loss" in facts.vocabulary and facts.parts.get("head", Counter()).keys() == {"column parallel"}:
            del facts.parts["head"]  # said by "vocabulary-parallel loss"

    def _embedding(self, op: Op, strategy: Strategy, facts: _Facts) -> str:
        table = strategy.inputs[0]
        if table == Split(0):
            facts.vocabulary.add("embedding")
        if isinstance(table, Split):
            return "vocabulary-parallel" if table.dim == 0 else "feature-parallel"
        kind = self._kind(op.outputs[0], strategy.outputs[0])
        return f"{kind}-split" if kind else "replicated"

    def _loss(self, op: Op, strategy: Strategy, facts: _Facts) -> str:
        logits, shape = strategy.inputs[0], self._shape(op.inputs[0])
        if isinstance(logits, Split):
            if logits.dim == (1 if len(shape) > 1 else 0):
                facts.vocabulary.add("loss")
                return "vocabulary-parallel"
            return "row-split"
        return "replicated"

    def _attention(self, op: Op, strategy: Strategy, before: set[str], after: set[str]) -> str:
        """Names attention together with the projections around it."""
        query, key = strategy.inputs[0], strategy.inputs[1]
        rank = len(self._shape(op.inputs[0]))
        first, second = (
            {self._product(self.runs[n][0]) for n in before},
            {self._product(self.runs[n][0]) for n in after},
        )
        if not isinstance(query, Split):
            return "replicated"
        if query.dim == rank - 2 and isinstance(key, Split):
            return "context-parallel: keys and values passed around, ring attention"
        if query.dim == rank - 2:
            return "context-parallel: queries local, keys and values gathered"
        if query.dim < rank - 3:
            return "batch-split"
        if first <= {"column"} and second <= {"row"}:
            return COLUMN_ROW
        if first | second <= {"sequence"}:
            return "sequence-split: heads exchanged by all-to-all, Ulysses"
        assert isinstance(key, Split) or query.dim == rank - 3, (op.name, strategy.key)
        return "head-parallel"

    def _product(self, op: Op) -> str:
        """How a product of an activation with a weight is run."""
        strategy = self.runs[op.name][1]
        weight = strategy.inputs[op.inputs.index(self._weight(op))]
        activations = [(n, p) for n, p in zip(op.inputs, strategy.inputs, strict=True) if not self._is_parameter(n)]
        if isinstance(weight, Split):
            return "row" if strategy.outputs[0] == PARTIAL else "column"
        for name, placement in activations:
            kind = self._kind(name, placement)
            if kind:
                return kind
        return "replicated"

    def _products_near(self, tensors: list[str], forward: bool) -> set[str]:
        """Names of the first products with a weight that are met from `tensors` along or against the data flow."""
        found: set[str] = set()
        pending, seen = list(tensors), set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            producer = self.graph.producer.get(name)
            ops = self.graph.consumers[name] if forward else ((producer,) if producer else ())
            for op in ops:
                if op.name not in self.runs:
                    continue
                if self._weight(op) is not None:
                    found.add(op.name)
                else:
                    pending += op.outputs if forward else op.inputs
        return found

    def _reaches_loss(self, op: Op) -> bool:
        pending, seen = list(op.outputs), set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            for consumer in self.graph.consumers[name]:
                if "cross_entropy" in consumer.target:
                    return True
                if self._weight(consumer) is None:
                    pending += consumer.outputs
        return False

    def _weight(self, op: Op) -> str | None:
        """The parameter of two or more dims that a product takes; None for other ops."""
        if op.target.startswith("aten.embedding."):
            return None
        names = [n for n in op.inputs if self._is_parameter(n) and len(self._shape(n)) > 1]
        others = [n for n in op.inputs if not self._is_parameter(n)]
        return names[0] if names and others and op.target.split(".")[1] in _PRODUCTS else None

    def _is_residual(self, op: Op) -> bool:
        """Whether `op` makes a tensor of the shape that blocks hand on, outside products: the residual stream."""
        moves = op.target.split(".")[1] in _VIEWS
        return len(op.outputs) == 1 and not moves and self._shape(op.outputs[0]) in self.handed_on

    def _is_parameter(self, name: str) -> bool:
        return self.graph.tensors[name].role == "parameter"

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.graph.tensors[name].shape

    def _kind(self, name: str, placement: Placement) -> str:
        """ "batch", "sequence" or "features" by the dim of an activation that is split; "" where none is.

        A split of the inner factor of dim 0 is one of the sequence: rows and positions were merged there.
        """
        if not isinstance(placement, Split):
            return ""
        rank = len(self._shape(name))
        if placement.dim == 0 and (placement.blocks == 1 or rank == 1):
            return "batch"
        if rank > 3:
            return "features" if placement.dim == 1 else "space"
        return "features" if placement.dim == rank - 1 else "sequence"


def _is_attention(op: Op) -> bool:
    return "scaled_dot_product" in op.target


def _scheme(kinds: set[str]) -> str:
    """The name of a group of products, by how each is run."""
    if kinds == {"column", "row"}:
        return COLUMN_ROW
    if len(kinds) == 1:
        kind = next(iter(kinds))
        return {"column": "column parallel", "row": "row parallel", "replicated": "replicated"}.get(
            kind, f"{kind}-split"
        )
    return f"mixed ({', '.join(sorted(kinds))})"


_PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution"}
)
_VIEWS = frozenset({"reshape", "view", "transpose", "permute", "contiguous", "clone", "flatten", "unflatten", "alias"})
