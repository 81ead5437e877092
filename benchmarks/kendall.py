"""How far two figures put the same things in one order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def tau_b(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b (Kendall 1945): 1 for one order, -1 for opposite ones, ties counted out; nan where all are tied.

    tau_b = (C - D) / sqrt((C + D + T1) (C + D + T2)), C and D being the concordant and discordant pairs, T1 and T2 those
    tied in the first alone and in the second alone.
    """
    signs = [
        (_sign(b1 - a1), _sign(b2 - a2))
        for (a1, a2), (b1, b2) in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    scale = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    return sum(a * b for a, b in signs) / scale if scale else math.nan


def pairs_apart(first: Sequence[float], second: Sequence[float], apart: float) -> tuple[int, list[tuple[int, int]]]:
    """Of the pairs whose first figures (positive) differ by more than the share `apart` of the smaller: how many they are,
    and those (i, j) that the first puts in this order, the second strictly in the other."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(first)), 2) if first[j] > first[i] * (1 + apart)]
    return len(pairs), [(i, j) for i, j in pairs if second[j] < second[i]]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
