"""Tofu: split every op over two workers at the least cost in bytes, exactly; then again within each half, recursively.

An op is described by its indices, "bi,io->bo": every index of its output, and every index that it sums over, is a way
to split it (`ways`; derived from the description, not listed per op). Split along r, with p_T the dim along which
tensor T is stored in two halves, two workers move                                                   `moved_bytes`

    an input with r:      nothing if p_T is r's dim, else size/2          (each lacks half of its half)
    an input without r:   size                                            (each lacks the other half)
    an output with r:     nothing if p_T is r's dim, else size/2
    a sum over r:         size                                            (each sends half of its summand)

`split_two` minimises the sum over the p_T and r by a dynamic program over the ops in order, whose state is the p_T of
the tensors that later ops still need: exact on any graph, and small on the nearly linear ones that coarsening leaves.
`tofu_recursion` halves tensors and ops as chosen and repeats; a step costs once per group of workers.

Reference: Wang, Huang and Li, "Supporting Very Large Models using Automatic Dataflow Graph Partitioning" (Tofu),
EuroSys 2019, sections 4 and 5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Described:
    """indices: one string per input, then the output's. sizes: of each index, of the op's own (local) ranges."""

    inputs: tuple[str, ...]
    output: str
    indices: tuple[str, ...]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, description: str, inputs: Sequence[str], output: str, sizes: Mapping[str, int]) -> Described:
        """From "bi,io->bo"."""
        left, right = description.split("->")
        parts = (*left.split(","), right)
        assert len(parts) == len(inputs) + 1, f"{description!r} with {len(inputs)} inputs"
        return cls(tuple(inputs), output, parts, {name: sizes[name] for name in sorted(set("".join(parts)))})

    def size(self, tensor: int) -> int:
        """Elements of an input, or (the last) of the output, as this op sees it."""
        return math.prod(self.sizes[name] for name in self.indices[tensor])


@dataclass(frozen=True, slots=True)
class Split2:
    """One step: the index of each op, the dim of each tensor, and the elements moved between two workers."""

    ops: tuple[str, ...]
    dims: Mapping[str, int]
    moved: float


def ways(op: Described) -> tuple[str, ...]:
    """The indices that two workers can share out evenly."""
    return tuple(name for name in op.sizes if op.sizes[name] % 2 == 0)


def moved_bytes(op: Described, index: str, dims: Mapping[str, int]) -> float:
    """Elements that the two workers move for one op; dims: where each tensor is halved."""
    total = 0.0
    for i, tensor in enumerate((*op.inputs, op.output)):
        names, size = op.indices[i], op.size(i)
        if index not in names:
            total += size
        elif names.index(index) != dims[tensor]:
            total += size / 2
    return total


def split_two(ops: Sequence[Described]) -> Split2 | None:
    """The cheapest way to halve all ops and tensors; None where something cannot be halved."""
    last_use = {tensor: i for i, op in enumerate(ops) for tensor in (*op.inputs, op.output)}
    states: dict[tuple, tuple[float, tuple[str, ...], dict[str, int]]] = {(): (0.0, (), {})}
    for i, op in enumerate(ops):
        grown: dict[tuple, tuple[float, tuple[str, ...], dict[str, int]]] = {}
        for moved, chosen, dims in states.values():
            new = [t for t in dict.fromkeys((*op.inputs, op.output)) if t not in dims]
            for places in itertools.product(*(_dims(op, tensor) for tensor in new)):
                placed = dims | dict(zip(new, places, strict=True))
                for index in ways(op):
                    total = moved + moved_bytes(op, index, placed)
                    key = tuple(sorted((t, d) for t, d in placed.items() if last_use[t] > i))
                    if key not in grown or total < grown[key][0]:
                        grown[key] = (total, (*chosen, index), placed)
        states = grown
    if not states:
        return None
    moved, chosen, dims = min(states.values(), key=lambda state: state[0])
    return Split2(chosen, dims, moved)


def _dims(op: Described, tensor: str) -> list[int]:
    at = (*op.inputs, op.output).index(tensor)
    return [d for d, name in enumerate(op.indices[at]) if op.sizes[name] % 2 == 0]


def halved(ops: Sequence[Described], split: Split2) -> list[Described]:
    """What each of the two workers has left to do."""
    return [
        replace(op, sizes={n: size // 2 if n == index else size for n, size in op.sizes.items()})
        for op, index in zip(ops, split.ops, strict=True)
    ]


def tofu_recursion(ops: Sequence[Described], workers: int) -> list[Split2] | None:
    """A split per step, for a power of two of workers; `moved` counts all groups of the step. None if impossible.

    ValueError where the workers are no power of two.
    """
    if workers < 1 or workers & (workers - 1):
        raise ValueError(f"{workers} workers; Tofu's recursion halves, so expected a power of two")
    steps, groups = [], 1
    while groups < workers:
        found = split_two(ops)
        if found is None:
            return None
        steps.append(replace(found, moved=found.moved * groups))
        ops = halved(ops, found)
        groups *= 2
    return steps
