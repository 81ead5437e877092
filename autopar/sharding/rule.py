"""What a rule says about one op: which index of which tensor is which named dim, and what may be done along it.

A *named dim* of an op is an index space that all its tensors share. It lies in a tensor in one of three ways:
as a dim of its own, as a factor of a dim that is a product, or (in views) spread over several consecutive dims, which
together are its digits, outermost first. To split a named dim of size N "at O" among n ranks is to view it as
(O, n, N / (O n)) and to give rank r the part [:, r]; O = 1 is the ordinary contiguous split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..graph import Shape
from .notation import Dims
from .placement import PARTIAL, REPLICATED, SHARED, Placement, Split
from .strategy import Strategy
from .window import Window


@dataclass(frozen=True, slots=True)
class Special:
    """The local algorithm that a split along some named dim needs.

    output: placement of the outputs that lack the dim, where it is not PARTIAL (SHARED: where a
        gradient flows, else REPLICATED).
    work: factor on the share of the op's compute. collective_bytes: see `Strategy`. exchanged_bytes: the same of
        tensors of which each rank exchanges its part only. collectives: see `Strategy`.
    meets: why rows of the batch meet there, where the algorithm communicates over data and so cannot run in time; "" where
        it needs no more than its place.
    window: where neighbours' borders are fetched ("halo"), what of them; the dim then has a length of its own in each
        tensor, and its size is what these have in common. row_bytes: of the input at one place along the dim.
    composes: whether other axes may split other dims by the same algorithm.
    """

    name: str
    output: Placement = PARTIAL
    work: float = 1.0
    collective_bytes: int = 0
    exchanged_bytes: int = 0
    collectives: int = 1
    meets: str = ""
    window: Window | None = None
    row_bytes: int = 0
    composes: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """Several names split at once, by a special algorithm.

    names: per tensor (inputs, then outputs) the name that is split in it; None where it is whole.
    free: one of the names, which may be split at any outer count; the others are split in one piece per rank.
    """

    key: str
    names: tuple[str | None, ...]
    special: Special
    free: str = ""


@dataclass(frozen=True)
class Rule:
    """How an op may be run in parallel. Tensors are numbered as in `Op.inputs` and `Op.outputs`.

    inputs, outputs: the named factors of every dim of every tensor.
    shapes: of the inputs, then of the outputs. sizes: of the named dims.
    splits: names that may be split, in the order in which strategies list them.
    sums: names of `splits` that the op sums over: outputs that lack them become PARTIAL. An output that lacks a name
        outside `sums` forbids the split.
    specials: by name, where a split needs a local algorithm of its own.
    together: splits of several names at once.
    batch_only: names of `splits` that only the batch axis may split.
    blocked: why a name that is not in `splits` cannot be split (for error messages).
    additive: inputs that are added to the result, hence PARTIAL wherever the output becomes PARTIAL.
    counts: by name, inputs that count elements along it, hence PARTIAL where it is split.
    linear: groups of inputs in which the op is jointly linear (a pending sum in all of them passes through).
    flops: floating point operations of the whole op, forward, at the global shape.
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    shapes: tuple[Shape, ...]
    sizes: Mapping[str, int]
    splits: tuple[str, ...] = ()
    sums: frozenset[str] = frozenset()
    specials: Mapping[str, Special] = field(default_factory=dict)
    together: tuple[Together, ...] = ()
    batch_only: frozenset[str] = frozenset()
    blocked: Mapping[str, str] = field(default_factory=dict)
    additive: frozenset[int] = frozenset()
    counts: Mapping[str, frozenset[int]] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    flops: int = 0

    @property
    def tensors(self) -> tuple[tuple[Dims, Shape], ...]:
        return tuple(zip(self.inputs + self.outputs, self.shapes, strict=True))


def split_of(rule: Rule, index: int, name: str, outer: int) -> Split | None:
    """Where tensor `index` (inputs, then outputs) is cut when `name` is split at `outer`; None where it cannot be.

    The tensor must carry the name. Divisibility by the degree is not looked at: see `divides`.
    """
    dims, shape = rule.tensors[index]
    positions = [i for i, dim in enumerate(dims) if name in dim]
    if len(positions) == 1:
        i = positions[0]
        before = dims[i][: dims[i].index(name)]
        return Split(i, math.prod(rule.sizes[f] for f in before) * outer)
    prefix = 1
    for i in positions:
        if outer % prefix == 0 and prefix <= outer < prefix * shape[i]:
            return Split(i, outer // prefix) if shape[i] % (outer // prefix) == 0 else None
        prefix *= shape[i]
    return None


def name_of(rule: Rule, index: int, split: Split) -> tuple[str, int] | None:
    """The inverse of `split_of`: the name and the outer count that cut tensor `index` as `split` does."""
    dims, shape = rule.tensors[index]
    if split.dim >= len(dims) or shape[split.dim] % split.blocks:
        return None
    prefix = 1
    for name in dims[split.dim]:
        size = rule.sizes[name]
        positions = [i for i, dim in enumerate(dims) if name in dim]
        if len(positions) > 1:
            return name, split.blocks * math.prod(shape[i] for i in positions if i < split.dim)
        last = name == dims[split.dim][-1]
        if prefix <= split.blocks < prefix * size or (last and size == 1 and split.blocks == prefix):
            outer, rest = divmod(split.blocks, prefix)
            return (name, outer) if rest == 0 and size % outer == 0 else None
        prefix *= size
    return None


def carries(dims: Dims, name: str) -> bool:
    return any(name in dim for dim in dims)


def divides(shape: Shape, placements: Sequence[tuple[Placement, int]]) -> bool:
    """Whether all these splits (placement, degree) of a tensor, on different axes, can be made together.

    Splits of one dim must nest: with blocks O1 <= O2, dim = (O1, n1, .., n2, ..) needs O2 to be a multiple of O1 n1
    (equal blocks nest in the order of the axes).
    """
    by_dim: dict[int, list[tuple[int, int]]] = {}
    for placement, degree in placements:
        if isinstance(placement, Split) and degree > 1:
            by_dim.setdefault(placement.dim, []).append((placement.blocks, degree))
    for dim, cuts in by_dim.items():
        outer, previous = 1, 0
        for blocks, degree in sorted(cuts, key=lambda cut: cut[0]):
            outer = outer if blocks == previous else blocks if blocks % outer == 0 else 0
            if outer == 0:
                return False
            previous, outer = blocks, outer * degree
        if shape[dim] % outer:
            return False
    return True


def split_strategy(rule: Rule, name: str, outer: int, degree: int, gradient: Sequence[bool]) -> Strategy | None:
    """The strategy that splits `name` at `outer`, or None where some tensor cannot be cut so.

    gradient: per tensor (inputs, then outputs) whether a gradient flows through it in this op.
    """
    if name not in rule.splits or rule.sizes[name] % (outer * degree):
        return None
    special = rule.specials.get(name)
    if special and special.name and outer > 1:
        return None  # the local algorithms count on a contiguous part
    if special and special.window and special.window.parts(degree) is None:
        return None
    placements: list[Placement] = []
    pending = name in rule.sums and not (special and special.output != PARTIAL)
    for index, (dims, shape) in enumerate(rule.tensors):
        is_input = index < len(rule.inputs)
        if carries(dims, name):
            split = split_of(rule, index, name, outer)
            if split is None or shape[split.dim] % (split.blocks * degree):
                return None
            placements.append(split)
        elif is_input:
            if (pending and index in rule.additive) or index in rule.counts.get(name, ()):
                placements.append(PARTIAL)
            else:
                placements.append(SHARED if gradient[index] else REPLICATED)
        elif name not in rule.sums:
            return None
        else:
            output = special.output if special else PARTIAL
            placements.append(REPLICATED if output == SHARED and not gradient[index] else output)
    count = len(rule.inputs)
    return Strategy(
        key=name if outer == 1 else f"{name}@{outer}",
        inputs=tuple(placements[:count]),
        outputs=tuple(placements[count:]),
        work=min(1.0, (special.work if special else 1.0) / degree),
        special=special.name if special else "",
        collective_bytes=special.collective_bytes if special else 0,
        collectives=special.collectives if special else 1,
        border_bytes=special.window.border(degree) * special.row_bytes if special and special.window else 0,
        degree=degree,
    )


def together_strategy(
    rule: Rule, group: Together, degree: int, gradient: Sequence[bool], outer: int = 1
) -> Strategy | None:
    """The strategy that splits the names of `group`, its free one at `outer`, or None where one does not divide."""
    placements: list[Placement] = []
    for index, name in enumerate(group.names):
        if name is None:
            placements.append(SHARED if gradient[index] else REPLICATED)
            continue
        blocks = outer if name == group.free else 1
        split = split_of(rule, index, name, blocks)
        if (
            split is None
            or rule.sizes[name] % (blocks * degree)
            or rule.shapes[index][split.dim] % (split.blocks * degree)
        ):
            return None
        placements.append(split)
    count, special = len(rule.inputs), group.special
    return Strategy(
        key=group.key if outer == 1 else f"{group.key}@{outer}",
        inputs=tuple(placements[:count]),
        outputs=tuple(placements[count:]),
        work=min(1.0, special.work / degree),
        special=special.name,
        collective_bytes=special.collective_bytes + special.exchanged_bytes // degree,
        degree=degree,
    )


def partial_strategy(rule: Rule, group: frozenset[int], gradient: Sequence[bool]) -> Strategy:
    """The strategy that lets a pending sum of the inputs in `group` through."""
    count = len(rule.inputs)
    inputs = tuple(PARTIAL if i in group else SHARED if gradient[i] else REPLICATED for i in range(count))
    key = "partial" if len(group) == count > 1 else f"partial:{min(group - rule.additive or group)}"
    return Strategy(key, inputs, (PARTIAL,) * len(rule.outputs), 1.0)


def whole_strategies(rule: Rule, gradient: Sequence[bool]) -> tuple[Strategy, ...]:
    """ "-" and, where a gradient flows, "shared"; legal for every op."""
    count = len(rule.inputs)
    whole = Strategy("-", (REPLICATED,) * count, (REPLICATED,) * len(rule.outputs), 1.0)
    if not any(gradient):
        return (whole,)
    placed = tuple(SHARED if flows else REPLICATED for flows in gradient)
    return whole, Strategy("shared", placed[:count], placed[count:], 1.0)
