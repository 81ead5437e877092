"""How a view maps dims to dims: groups of consecutive input dims that become groups of consecutive output dims.

Both sides of a group number the same N elements in the same order, so a split of the group at outer count O (see
sharding/rule.py) is a split of whichever dim has its boundary there, on either side. This is what carries a split of
the sequence through the flattening of (batch sequence), and a split of heads into and out of the hidden dim.
"""

from __future__ import annotations

from ..graph import Shape
from .notation import Dims


def view_dims(source: Shape, target: Shape) -> tuple[Dims, Dims]:
    """Named dims of input and output of a view between shapes of equal size: g0, g1, ... by group.

    Groups are as small as the sizes allow. Dims of size 1 join no group (they carry no name), except that equal dims
    of both shapes stay together from the left, and a group of no other dims keeps its 1s.
    """
    ins: list[tuple[str, ...]] = [()] * len(source)
    outs: list[tuple[str, ...]] = [()] * len(target)
    if 0 in source:
        return tuple(ins), tuple(outs)
    i = j = count = 0
    while i < len(source) and j < len(target):
        if source[i] == target[j]:
            ins[i] = outs[j] = (f"g{count}",)
            i, j, count = i + 1, j + 1, count + 1
            continue
        if source[i] == 1:
            i += 1
            continue
        if target[j] == 1:
            j += 1
            continue
        name = f"g{count}"
        count += 1
        a, b = source[i], target[j]
        ins[i] = outs[j] = (name,)
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= source[i]
                ins[i] = (name,)
                i += 1
            else:
                b *= target[j]
                outs[j] = (name,)
                j += 1
    return tuple(ins), tuple(outs)
