"""The notation of rules: named dims, as in einops. "... i, o i, o -> ... o" is a linear layer, "(h d) -> h d" a view.

A tensor's dims are written one after the other. A name is a dim; "1" is a dim of size one that carries no name;
"(a b)" is one dim that is the product of named factors, outermost first; "..." stands for any number of leading dims,
which broadcast against each other from the right. The same name means the same index in every tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ..graph import Shape

Dim = tuple[str, ...]  # the factors whose product the dim is, outermost first; () for a dim that carries no name
Dims = tuple[Dim, ...]

ELLIPSIS: Dim = ("...",)

_TOKEN = re.compile(r"\s*(\.\.\.|[()]|1\b|[A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed rule; `text` is what the user wrote, for errors."""

    text: str
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A pattern held against shapes: the dims of each tensor without ellipses, and the size of each name."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int]


@cache
def parse(pattern: str) -> Pattern:
    """Parse "inputs -> outputs"; ValueError, with the pattern, says what is wrong with it."""
    try:
        left, arrow, right = pattern.partition("->")
        if not arrow:
            raise ValueError("there is no '->'")
        parsed = Pattern(pattern, _tensors(left), _tensors(right))
        known = {name for dims in parsed.inputs + parsed.outputs for dim in dims for name in dim}
        if "..." in known and not any(ELLIPSIS in dims for dims in parsed.outputs):
            raise ValueError("'...' stands in an input and in no output")
        return parsed
    except ValueError as error:
        raise ValueError(f"rule {pattern!r}: {error}") from None


def _tensors(side: str) -> tuple[Dims, ...]:
    return tuple(_dims(tensor) for tensor in side.split(",")) if side.strip() else ()


def _dims(text: str) -> Dims:
    dims: list[Dim] = []
    product: list[str] | None = None
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise ValueError(f"cannot read {text[position:].strip()!r}")
        token, position = match.group(1), match.end()
        if token == "(":
            if product is not None:
                raise ValueError("a '(' inside parentheses")
            product = []
        elif token == ")":
            if product is None:
                raise ValueError("a ')' without '('")
            dims.append(tuple(product))
            product = None
        elif product is not None:
            if token == "...":
                raise ValueError("'...' inside parentheses")
            product += [token] if token != "1" else []
        elif token == "...":
            if ELLIPSIS in dims:
                raise ValueError("'...' twice in one tensor")
            dims.append(ELLIPSIS)
        else:
            dims.append(() if token == "1" else (token,))
    if product is not None:
        raise ValueError("a '(' that is never closed")
    names = [name for dim in dims for name in dim]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{', '.join(sorted(repeated))} stands twice in one tensor")
    return tuple(dims)


def bind(
    pattern: Pattern,
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    given: Mapping[str, int] | None = None,
) -> Bound:
    """Hold a pattern against shapes. Ellipsis dims are named d0, d1, ... from the left of the widest tensor.

    given: sizes of factors that the shapes alone do not fix.
    Fewer tensors than the pattern names are allowed (optional arguments that are absent come last).
    Raises ValueError, with pattern and shapes, when they do not fit.
    """
    try:
        if len(inputs) > len(pattern.inputs) or len(outputs) > len(pattern.outputs):
            raise ValueError(f"it names {len(pattern.inputs)} inputs and {len(pattern.outputs)} outputs")
        sides = [*zip(pattern.inputs, inputs, strict=False), *zip(pattern.outputs, outputs, strict=False)]
        leading = [shape[: len(shape) - len(dims) + 1] for dims, shape in sides if dims[:1] == (ELLIPSIS,)]
        width = max(map(len, leading), default=0)
        sizes: dict[str, int] = dict(given or {})
        expanded = [_expand(dims, shape, width, leading) for dims, shape in sides]
        _solve([(dims, shape) for dims, (_, shape) in zip(expanded, sides, strict=True)], sizes)
    except ValueError as error:
        shapes = ", ".join(map(str, inputs)) + " -> " + ", ".join(map(str, outputs))
        raise ValueError(f"rule {pattern.text!r} does not fit shapes {shapes}: {error}") from None
    return Bound(tuple(expanded[: len(inputs)]), tuple(expanded[len(inputs) :]), sizes)


def _expand(dims: Dims, shape: Shape, width: int, leading: Sequence[Shape]) -> Dims:
    """Replace "..." by names; a leading dim of size 1 that others broadcast carries no name."""
    if dims[:1] != (ELLIPSIS,):
        if ELLIPSIS in dims:
            raise ValueError("'...' is only understood in front")
        if len(dims) != len(shape):
            raise ValueError(f"{len(dims)} dims are named but the shape is {shape}")
        return dims
    count = len(shape) - len(dims) + 1
    if count < 0:
        raise ValueError(f"shape {shape} has too few dims")
    named = []
    for i in range(count):
        place = width - count + i
        widest = max(s[place - (width - len(s))] for s in leading if place >= width - len(s))
        named.append((f"d{place}",) if shape[i] == widest else ())
    return (*named, *dims[1:])


def _solve(tensors: Sequence[tuple[Dims, Shape]], sizes: dict[str, int]) -> None:
    """Fill in `sizes`, first from plain dims, then from products with one unknown factor."""

    def assign(name: str, size: int) -> None:
        if sizes.setdefault(name, size) != size:
            raise ValueError(f"{name} is both {sizes[name]} and {size}")

    pending = []
    for dims, shape in tensors:
        for dim, size in zip(dims, shape, strict=True):
            if len(dim) == 1:
                assign(dim[0], size)
            elif dim:
                pending.append((dim, size))
            elif size != 1:
                raise ValueError(f"a dim written 1 has size {size}")
    while pending:
        rest = []
        for dim, size in pending:
            unknown = [name for name in dim if name not in sizes]
            known = math.prod(sizes[name] for name in dim if name in sizes)
            if len(unknown) > 1:
                rest.append((dim, size))
            elif unknown and known and size % known == 0:
                assign(unknown[0], size // known)
            elif unknown or known != size:
                raise ValueError(f"({' '.join(dim)}) has size {size}")
        if len(rest) == len(pending):
            raise ValueError(f"the factors of ({' '.join(rest[0][0])}) have no known sizes")
        pending = rest
