"""Blocks: main ops cut where few tensors are live, so that a model's repeated layers become isomorphic blocks.

Method. In topological order, a cut after main op i is crossed by the live set: activations of main ops up to i that
main ops after i read. Cuts of at most c live tensors divide the ops into segments; each segment gets a symbol, equal
for isomorphic segments. The sequence of symbols is searched for its longest periodic run (period p, at least two
repetitions: maximal stretches of s[i] == s[i + p], vectorised over i, for every p). A period becomes a block; what
stands before and behind is divided the same way, and where nothing repeats, one cut is kept between every two segments
that hold a matrix (a parameter of two or more dims). c grows from 1 to 4 until half of the graph repeats.

What this ignores: the cost of ops. It counts ops, because equal layers have equal counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..graph import Block, Op, Ref, Tensor, map_refs

MAX_CUT = 4  # live tensors that a cut may have
_ENOUGH = 0.5  # share of the ops in repeated blocks at which no wider cuts are tried
_SPLIT_PERIOD = 3  # repetitions inside a period from which on the period is divided again


def arrange(ops: Sequence[Op], side_ops: frozenset[str], tensors: Mapping[str, Tensor], updated: set[str]) -> list[Op]:
    """The same ops, still topological, with main ops that depend on neither batch nor activations next to their reader.

    So a cast or a reshape of a parameter belongs to the block that uses it, wherever the module made it.
    updated: buffers that the step writes, and their views; who reads them stays in its place.
    """
    moving = {t.name for t in tensors.values() if t.role == "input"} | updated
    held: dict[str, Op] = {}
    for op in ops:
        if op.random or moving.intersection(op.inputs):
            moving.update(op.outputs)
        elif op.name not in side_ops:
            held[op.name] = op
    producer = {name: op for op in ops for name in op.outputs}
    order: list[Op] = []

    def place(op: Op) -> None:
        for name in op.inputs:
            maker = producer.get(name)
            if maker is not None and maker.name in held:
                place(held.pop(maker.name))
        order.append(op)

    for op in ops:
        if op.name in moving or op.name in side_ops or moving.intersection(op.outputs):
            place(op)
    return order + [op for op in ops if op.name in held]


def find_blocks(
    ops: Sequence[Op], side_ops: frozenset[str], tensors: Mapping[str, Tensor], loss: str
) -> tuple[Block, ...]:
    """The partition of the main ops into blocks; the last block holds the loss and has no outputs."""
    main = _Main([op for op in ops if op.name not in side_ops], tensors, loss)
    best: list[_Piece] = []
    best_share = -1.0
    for limit in range(1, MAX_CUT + 1):
        pieces = _partition(main, main.segments(0, main.size, limit))
        share = sum(piece.stop - piece.start for piece in pieces if piece.repeats) / main.size
        # Wider cuts must earn their price: more tensors cross every boundary.
        if not best or share > best_share + 0.1 or (best_share == 0 and len(best) == 1 < len(pieces)):
            best, best_share = pieces, share
        if best_share >= _ENOUGH:
            break
    kinds: dict[Any, int] = {}
    blocks = []
    for index, piece in enumerate(best):
        inside = main.ops[piece.start : piece.stop]
        blocks.append(
            Block(
                index=index,
                kind=kinds.setdefault(main.form(piece.start, piece.stop), len(kinds)),
                ops=tuple(op.name for op in inside),
                inputs=main.live[piece.start],
                outputs=main.live[piece.stop],
                parameters=tuple(
                    dict.fromkeys(n for op in inside for n in op.inputs if tensors[n].role == "parameter")
                ),
            )
        )
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Main ops [start, stop); `repeats` where it is one of several isomorphic neighbours."""

    start: int
    stop: int
    repeats: bool = False


class _Main:
    """The main ops by position. A cut at position i stands in front of op i; `live[i]` crosses it, oldest first."""

    def __init__(self, ops: list[Op], tensors: Mapping[str, Tensor], loss: str) -> None:
        self.ops, self.tensors = ops, tensors
        self.size = len(ops)
        made = {name: i for i, op in enumerate(ops) for name in op.outputs}
        last = {name: i for i, op in enumerate(ops) for name in op.inputs if name in made}
        dies: list[list[str]] = [[] for _ in ops]
        for name, i in last.items():
            dies[i].append(name)
        self.live: list[tuple[str, ...]] = [()]
        alive: dict[str, None] = {}
        for i, op in enumerate(ops):
            alive.update((name, None) for name in op.outputs if last.get(name, i) > i)
            for name in dies[i]:
                alive.pop(name, None)
            self.live.append(tuple(alive) if len(alive) <= MAX_CUT else ("",) * len(alive))
        # What comes after the loss stays with it.
        self.end = made[loss]
        interned: dict[Any, int] = {}
        self.skeletons = [interned.setdefault(_skeleton(op, tensors), len(interned)) for op in ops]

    @cached_property
    def matrices(self) -> np.ndarray:
        """matrices[i]: how many of the ops before position i read a parameter of two or more dims."""
        reads = [
            any(self.tensors[n].role == "parameter" and len(self.tensors[n].shape) >= 2 for n in op.inputs)
            for op in self.ops
        ]
        return np.concatenate(([0], np.cumsum(reads)))

    def segments(self, start: int, stop: int, limit: int) -> list[tuple[int, int]]:
        """Ops [start, stop) divided at every cut of at most `limit` live tensors."""
        inside = [i for i in range(start + 1, stop) if 1 <= len(self.live[i]) <= limit and i <= self.end]
        return list(zip([start, *inside], [*inside, stop], strict=True))

    def cut_size(self, position: int) -> tuple[int, int]:
        """Live tensors at a cut, and their bytes."""
        names = self.live[position]
        return len(names), sum(self.tensors[name].size_bytes for name in names)

    def form(self, start: int, stop: int) -> tuple[Any, ...]:
        """Equal for isomorphic runs of ops: tensors numbered by first appearance, the live ones of the cut first."""
        number: dict[str, int] = {}
        for name in self.live[start]:
            number[name] = len(number)
        body = []
        for i in range(start, stop):
            op = self.ops[i]
            reads = tuple(number.setdefault(name, len(number)) for name in op.inputs)
            writes = tuple(number.setdefault(name, len(number)) for name in op.outputs)
            body.append((self.skeletons[i], reads, writes))
        leaves = tuple(number[name] for name in self.live[stop])
        return tuple(_form(self.tensors[name]) for name in self.live[start]), tuple(body), leaves


def _skeleton(op: Op, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """All of an op but the identity of its tensors."""
    names = (*op.inputs, *op.outputs)
    args = repr([map_refs(value, lambda _: Ref("")) for value in (op.args, op.kwargs)])
    if op.target == "autopar.opaque":
        args = repr((op.module, args))
    forms = tuple(_form(tensors[name]) for name in names)
    saves = tuple(i for i, name in enumerate(names) if name in op.saves)
    return op.target, args, op.returns_sequence, op.random, op.no_grad, forms, saves, op.saved_extra_bytes


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.role, tensor.requires_grad


def _partition(main: _Main, segments: list[tuple[int, int]]) -> list[_Piece]:
    """Periodic runs first, longest before shorter; the rest merged."""
    if not segments:
        return []
    run = _longest_run(main, segments)
    if run is None:
        return _merge(main, segments)
    first, period, count = run
    last = first + period * count
    pieces = _partition(main, segments[:first])
    for i in range(first, last, period):
        pieces += _divide_period(main, segments[i][0], segments[i + period - 1][1])
    return pieces + _partition(main, segments[last:])


def _divide_period(main: _Main, start: int, stop: int) -> list[_Piece]:
    """A period is one block, unless it consists of a repetition itself (five local layers to each global one)."""
    limit = max(len(main.live[start]), 1)
    segments = main.segments(start, stop, limit)
    run = _longest_run(main, segments)
    if run is None or run[2] < _SPLIT_PERIOD:
        return [_Piece(start, stop, True)]
    return [_Piece(piece.start, piece.stop, True) for piece in _partition(main, segments)]


def _longest_run(main: _Main, segments: list[tuple[int, int]]) -> tuple[int, int, int] | None:
    """(first segment, period, count) of the periodic run that covers most ops; None where nothing repeats."""
    interned: dict[Any, int] = {}
    symbols = np.array([interned.setdefault(main.form(*segment), len(interned)) for segment in segments])
    edges = np.array([segments[0][0], *(stop for _, stop in segments)])
    best: tuple[int, int, int] | None = None
    best_ops = 0
    for period in range(1, len(symbols) // 2 + 1):
        equal = np.concatenate(([False], symbols[:-period] == symbols[period:], [False]))
        change = np.flatnonzero(equal[1:] != equal[:-1])
        for begin, end in zip(change[::2].tolist(), change[1::2].tolist(), strict=True):
            count = (end - begin + period) // period
            covered = int(edges[begin + count * period] - edges[begin])
            matrices = main.matrices[edges[begin + period]] - main.matrices[edges[begin]]
            if count >= 2 and matrices and covered > best_ops:
                best, best_ops = (begin, period, end + period), covered
    if best is None:
        return None
    begin, period, end = best

    def badness(first: int) -> tuple[int, int, int, int]:
        return (*main.cut_size(int(edges[first])), -((end - first) // period), first)

    # Any phase of the run may be a block's start: the one with the smallest cut, then the most repetitions.
    phases = [first for first in range(begin, begin + period) if (end - first) // period >= 2]
    first = min((f for f in phases if edges[f] > 0 or f == begin), key=badness)
    return first, period, (end - first) // period


def _merge(main: _Main, segments: list[tuple[int, int]]) -> list[_Piece]:
    """One cut between every two neighbouring segments that hold a matrix: the smallest there."""
    cuts = [segments[0][0]]
    previous: int | None = None
    for i, (start, stop) in enumerate(segments):
        if main.matrices[stop] == main.matrices[start]:
            continue
        if previous is not None:
            between = range(previous + 1, i + 1)
            cuts.append(segments[min(between, key=lambda j: _merge_badness(main, segments, j))][0])
        previous = i
    return [_Piece(a, b) for a, b in zip(cuts, [*cuts[1:], segments[-1][1]], strict=True)]


def _merge_badness(main: _Main, segments: list[tuple[int, int]], index: int) -> tuple[int, int, int]:
    """Small cuts first; of equal ones the last, so that an activation function stays with the layer before it."""
    return (*main.cut_size(segments[index][0]), -index)
