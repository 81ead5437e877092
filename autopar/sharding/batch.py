"""The batch axis: data ranks and microbatches together, `shards` chunks of rows. How every op runs on one chunk.

Batch inputs arrive split along dim 0 and parameters shared; everything else follows, op by op, through the same rules
as on a model axis. No communication is possible in time, so only conversions that are local both ways may occur:
a slice of something whole, and a summand's share of something whole. Three things make that enough:

- Values that depend on no batch input (masks, positions) are made only as large as their consumers want: demand
  runs backwards through them after the forward pass.
- Sums over the batch that no parameter enters (the count of targets) are needed whole before the loss divides by
  them. They form the *prologue*: made PARTIAL, summed over all chunks first, and then taken as REPLICATED.

- Rows that are sorted, treated alike and put back (a mixture of experts) may be sorted in each chunk by itself: see
  sharding/order.py.

Where rows of the batch meet and an algorithm of the op communicates (batch norm in training), data ranks may share the
batch and microbatches may not. Where nothing helps (contrastive losses): a `BatchConflict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..graph import Graph, Op
from .analysis import Analysis, analysis
from .order import PLAIN, Disordered, Ordering, follow, reorder, sorts_rows
from .placement import PARTIAL, REPLICATED, SHARED, Placement, Split
from .rule import Rule, name_of, partial_strategy, split_strategy, whole_strategies
from .strategy import Strategy


@dataclass(frozen=True, slots=True)
class BatchConflict:
    """The first op that needs rows of other chunks, and why, as half a sentence."""

    op: str
    reason: str

    def __str__(self) -> str:
        return f"op {self.op}: {self.reason}"


@dataclass(frozen=True)
class BatchLayout:
    """How each op runs on one of `shards` chunks of the batch.

    strategies: by op. placements: by tensor, as produced. prologue: tensors, in topological order, that are produced
    PARTIAL and that all their consumers take REPLICATED, once the runtime has summed them over all chunks.
    conflict: why the batch cannot be cut; the layout may then be used for shards == 1 only.
    meets: the first op whose rows meet by communication over data, which time cannot do: one microbatch only.
    """

    shards: int
    strategies: Mapping[str, Strategy]
    placements: Mapping[str, Placement]
    prologue: tuple[str, ...] = ()
    conflict: BatchConflict | None = None
    meets: BatchConflict | None = None

    @property
    def time_conflict(self) -> BatchConflict | None:
        """Why there can be no more than one microbatch."""
        return self.conflict or self.meets


def batch_layout(graph: Graph, shards: int) -> BatchLayout:
    """The layout of the batch axis; ValueError where `shards` does not divide the batch."""
    if shards < 1 or graph.batch_size % shards:
        raise ValueError(
            f"a batch of {graph.batch_size} rows cannot be cut into {shards} equal parts (data degree x microbatches); "
            f"choose degrees whose product divides {graph.batch_size}, or another batch size"
        )
    found = analysis(graph)
    if shards not in found.batch_layouts:
        found.batch_layouts[shards] = _BatchAxis(found, shards).layout()
    return found.batch_layouts[shards]


class _Meets(Exception):
    """Raised while an op is placed: its argument says why rows meet."""


class _Needed(Exception):
    """Raised while an op is placed: the tensor is a sum over the batch that is needed whole."""


class _BatchAxis:
    def __init__(self, found: Analysis, shards: int) -> None:
        self.found, self.graph, self.shards = found, found.graph, shards
        self.chosen: dict[str, Strategy] = {}
        self.produced: dict[str, Placement] = {}
        self.rows: dict[str, Ordering] = {}
        self.memo: dict[tuple[str, tuple[Placement, ...]], Strategy] = {}
        self.conflict: BatchConflict | None = None
        # What one cut needs whole another does too, or else it starts again all the same.
        known = next(iter(found.batch_layouts.values()), None)
        self.prologue: set[str] = set(known.prologue) if known else set()

    def layout(self) -> BatchLayout:
        while not self._forward():
            pass
        self._demand()
        if self.conflict is None and self.produced[self.graph.loss] != PARTIAL:
            producer = self.graph.producer.get(self.graph.loss)
            reason = f"the loss is not a sum over rows of the batch but {self.produced[self.graph.loss]}"
            self.conflict = BatchConflict(producer.name if producer else self.graph.loss, reason)
        if self.graph.batch_size == 1:
            self.conflict = None  # one row: nothing to cut
        prologue = tuple(t for op in self.graph.ops for t in op.outputs if t in self.prologue)
        return BatchLayout(self.shards, self.chosen, self.produced, prologue, self.conflict, self._meets())

    def _meets(self) -> BatchConflict | None:
        for op in self.graph.ops:
            special = self.found.rule(op).specials.get(self.chosen[op.name].key)
            if special and special.meets:
                return BatchConflict(op.name, special.meets)
        return None

    def _forward(self) -> bool:
        """Place every op in order; False when a tensor turned out to belong to the prologue (start again)."""
        self.conflict = None
        self.rows.clear()
        self.produced = {name: self._leaf(name) for name, t in self.graph.tensors.items() if t.role != "activation"}
        for op in self.graph.ops:
            have = tuple(self._have(t) for t in op.inputs)
            try:
                self.chosen[op.name] = self._ordered(op, have) or self._remembered(op, have)
            except _Needed as needed:
                self.prologue.add(str(needed))
                self.memo.clear()
                return False
            except (_Meets, Disordered) as reason:
                self.conflict = self.conflict or BatchConflict(op.name, str(reason))
                self.chosen[op.name] = whole_strategies(self.found.rule(op), self.found.gradient(op))[-1]
            self.produced.update(zip(op.outputs, self.chosen[op.name].outputs, strict=True))
        return True

    def _remembered(self, op: Op, have: tuple[Placement, ...]) -> Strategy:
        """As `_place` has it for an op of another block that is like this one."""
        key = (self.found.representative[op.name], have)
        if key not in self.memo:
            self.memo[key] = self._place(op, have)
        return self.memo[key]

    def _ordered(self, op: Op, have: tuple[Placement, ...]) -> Strategy | None:
        """The strategy of an op that sorts rows, or meets sorted ones; None for any other."""
        rows = tuple(self.rows.get(t, PLAIN) for t in op.inputs)
        if not sorts_rows(op) and all(r == PLAIN for r in rows):
            return None
        found = reorder(self.graph, op, have, rows, self.shards)
        if found is None:
            strategy = self._remembered(op, have)
            found = strategy, follow(self.graph, op, strategy, have, rows, self.shards)
        strategy, known = found
        self.rows.update(zip(op.outputs, known, strict=True))
        return strategy

    def _leaf(self, name: str) -> Placement:
        tensor = self.graph.tensors[name]
        if tensor.role == "parameter":
            return SHARED if tensor.requires_grad else REPLICATED
        rows = tensor.role == "input" and tensor.shape[:1] == (self.graph.batch_size,)
        return Split(0) if rows else REPLICATED

    def _have(self, tensor: str) -> Placement:
        return REPLICATED if tensor in self.prologue else self.produced[tensor]

    def _place(self, op: Op, have: tuple[Placement, ...]) -> Strategy:
        """The strategy that takes the inputs as they are, or nearly."""
        op_rule, gradient = self.found.rule(op), self.found.gradient(op)
        if any(isinstance(p, Split) for p in have):
            options: Iterable[Strategy] = self._splits(op_rule, gradient, have)
        elif PARTIAL in have:
            pending = {i for i, p in enumerate(have) if p == PARTIAL}
            groups = sorted(op_rule.linear, key=lambda g: len(pending - g))
            options = [partial_strategy(op_rule, g, gradient) for g in groups if g & pending]
        else:
            return whole_strategies(op_rule, gradient)[-1]
        needed: list[str] = []
        for strategy in options:
            wrong = [i for i, (p, q) in enumerate(zip(have, strategy.inputs, strict=True)) if not _is_local(p, q)]
            if not wrong:
                return strategy
            if all(have[i] == PARTIAL and self._is_side(op.inputs[i]) for i in wrong):
                needed.append(op.inputs[wrong[0]])
        for i, placement in enumerate(have):
            if not needed and placement == PARTIAL and self._is_side(op.inputs[i]):
                needed.append(op.inputs[i])
        if needed:
            raise _Needed(needed[0])
        raise _Meets(self._reason(op, op_rule, have))

    def _splits(self, op_rule: Rule, gradient: tuple[bool, ...], have: tuple[Placement, ...]) -> Iterator[Strategy]:
        for i, placement in enumerate(have):
            found = name_of(op_rule, i, placement) if isinstance(placement, Split) else None
            if found and _needs_others(op_rule, found[0]):
                continue
            strategy = found and split_strategy(op_rule, *found, self.shards, gradient)
            if strategy:
                yield strategy

    def _is_side(self, tensor: str) -> bool:
        producer = self.graph.producer.get(tensor)
        return producer is not None and producer.name in self.graph.side_ops

    def _reason(self, op: Op, op_rule: Rule, have: tuple[Placement, ...]) -> str:
        for i, placement in enumerate(have):
            if not isinstance(placement, Split):
                continue
            dims = op_rule.inputs[i]
            names = dims[placement.dim] if placement.dim < len(dims) else ()
            for name in names:
                if name in op_rule.blocked:
                    return f"{op.target} cannot be cut along the batch: {op_rule.blocked[name]}"
            place = f"dim {placement.dim} of {op.inputs[i]}"
            if len(have) > 1 and any(name in op_rule.splits for name in names):
                return f"{op.target} brings rows of the batch ({place}) together with values of other rows"
            return f"{op.target} cannot be cut along the batch, which is {place}"
        summed = next(t for t, p in zip(op.inputs, have, strict=True) if p == PARTIAL)
        return f"{op.target} is not linear, and {summed} is a sum over the whole batch that depends on parameters"

    def _demand(self) -> None:
        """Make what depends on no row only as large as it is wanted, from the consumers backwards."""
        for op in reversed(self.graph.ops):
            strategy = self.chosen[op.name]
            if strategy.key not in ("-", "shared") or len(op.outputs) != 1:
                continue
            output = op.outputs[0]
            wants = {
                want
                for consumer in self.graph.consumers[output]
                for t, want in zip(consumer.inputs, self.chosen[consumer.name].inputs, strict=True)
                if t == output
            }
            want = next(iter(wants), None)
            if len(wants) != 1 or not isinstance(want, Split) or output in self.prologue:
                continue
            op_rule, gradient = self.found.rule(op), self.found.gradient(op)
            found = name_of(op_rule, len(op.inputs), want)
            if found and _needs_others(op_rule, found[0]):
                continue
            smaller = found and split_strategy(op_rule, *found, self.shards, gradient)
            if not smaller or smaller.outputs != (want,):
                continue
            have = [self._have(t) for t in op.inputs]
            if all(_is_local(p, q) for p, q in zip(have, smaller.inputs, strict=True)):
                self.chosen[op.name] = smaller
                self.produced[output] = want


def _needs_others(op_rule: Rule, name: str) -> bool:
    """Whether a split of this dim asks other parts for borders or sums, which may be computed at another time."""
    special = op_rule.specials.get(name)
    return special is not None and special.composes and not special.meets


def _is_local(have: Placement, want: Placement) -> bool:
    """Whether a chunk can convert by itself, both ways. REPLICATED tensors on this axis have no gradient."""
    if have == want:
        return True
    if have == SHARED:
        return True  # a slice, a summand's share, or no gradient asked for
    return have == REPLICATED
