"""The inner choice of Piper, for all stages at once, is what a plain loop over the layers of one stage finds."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.planner.methods.piper_swaps import Swaps, least_from_here


def by_hand(layers: list[int], need: float, slower_s: np.ndarray, freed: np.ndarray) -> tuple[float, set[int]]:
    """Least time per byte first; the last one is the cheapest that suffices."""
    swapped: set[int] = set()
    line = sorted((v for v in layers if freed[v] > 0), key=lambda v: slower_s[v] / freed[v])
    for place, v in enumerate(line):
        if freed[v] >= need:
            last = min((u for u in line[place:] if freed[u] >= need), key=lambda u: slower_s[u])
            return sum(slower_s[list(swapped)]) + slower_s[last], swapped | {last}
        swapped.add(v)
        need -= freed[v]
    raise AssertionError("the smallest choices do not fit")


@pytest.mark.parametrize("seed", range(20))
def test_swaps_are_those_of_a_plain_loop(seed):
    draw = np.random.default_rng(seed)
    num_layers, num_pieces, most = int(draw.integers(2, 12)), 40, 16
    # a piece is what a set of layers has beyond one within it
    outer_sets = draw.random((num_pieces, num_layers)) < 0.8
    inner_sets = outer_sets & (draw.random((num_pieces, num_layers)) < 0.3)
    members, index = np.concatenate([outer_sets, inner_sets]), np.arange(num_pieces)
    inside = (outer_sets & ~inner_sets).astype(float)
    fast = np.stack([draw.uniform(1, 3, num_layers), draw.uniform(0, 4, num_layers)])
    # some layers free nothing, some only what does not grow with y, some need more that does not
    saved = np.stack([
        -draw.uniform(0, 2, num_layers),
        fast[0] * draw.uniform(0, 0.9, num_layers) * (draw.random(num_layers) < 0.8),
        draw.uniform(-2, 2, num_layers) * (seed % 2),
    ])  # fmt: skip
    each, rest = inside @ fast[0], inside @ fast[1]
    memory = float(draw.uniform(20, 60))
    swaps = Swaps(members, index, index + num_pieces, each, rest, saved, memory, most)
    rows, ys = [], []
    for row in range(num_pieces):
        layers = np.flatnonzero(inside[row])
        for y in range(1, most + 1):
            need = each[row] * y + rest[row] - memory
            freed = np.maximum(saved[1] * y + saved[2], 0)
            assert (need <= 0) == (y <= swaps.fits_fast[row])
            if need > 0 and y <= swaps.fits[row] and freed[layers].sum() >= need:
                rows.append(row)
                ys.append(y)
            elif need > 0:
                # nor is it ever had for less than the least price
                assert y > swaps.fits[row]
        smallest = np.maximum(np.outer(np.arange(1, most + 1), saved[1]) + saved[2], 0)[:, layers].sum(1)
        fits = each[row] * np.arange(1, most + 1) + rest[row] - smallest <= memory
        assert swaps.fits[row] == 0 or fits[swaps.fits[row] - 1]
        assert swaps.fits[row] == most or not fits[swaps.fits[row]]
    costs_s = swaps.cost_s(np.array(rows, int), np.array(ys, int))
    for row, y, cost_s in zip(rows, ys, costs_s, strict=True):
        need, freed = each[row] * y + rest[row] - memory, saved[1] * y + saved[2]
        wanted_s, wanted = by_hand(list(np.flatnonzero(inside[row])), need, -saved[0], freed)
        assert cost_s == pytest.approx(wanted_s, rel=1e-9)
        assert set(np.flatnonzero(swaps.swapped(row, y))) == wanted
        assert swaps.affordable(np.array([row]), np.array([wanted_s]))[0] >= y
    if seed > 1:
        assert rows


def test_least_from_here_stays_within_its_run():
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 9, 50)
    ends = np.repeat(np.cumsum(lengths), lengths)
    values = draw.random(len(ends))
    wanted = [values[i : ends[i]].min() for i in range(len(values))]
    assert list(least_from_here(values, ends)) == wanted
    assert len(least_from_here(np.zeros(0), np.zeros(0, int))) == 0
