"""Seconds of a dense product on an accelerator: tiles of the result dealt out to multiprocessors, wave after wave.

    t = waves x ((2 tile_m tile_n k / splits) / (rate of one multiprocessor) + wave_setup) + setup,
    waves = ceil(batch ceil(m / tile_m) ceil(n / tile_n) splits / multiprocessors)

at the tile and the split of k that are fastest (wave_setup: a tile's first loads and its last stores, beside which its
multiprocessor does not multiply), and never faster than the operands can be read. So small and thin
products, and those whose last wave is nearly empty, fall short of the peak as they do in the libraries. Reference:
NVIDIA, "Matrix multiplication background user's guide", sections on tile and wave quantization. Ignored: what a
library's heuristics miss.
"""

from __future__ import annotations

import math
from functools import lru_cache

from .constants import Constants

# (rows, columns, share of the best tile's rate): smaller tiles read their operands more often. Shares by the guide's
# figure of throughput by tile.
_TILES = (
    *((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (256, 64, 0.85), (64, 256, 0.85)),
    *((128, 64, 0.8), (64, 128, 0.8), (64, 64, 0.65)),
)
_SPLITS = (1, 2, 4, 8)
_LEAST_K = 512  # of a split
# Tensor cores want dims of 16 bytes at least; up to 128 bytes more is better (the guide's section on alignment).
_ALIGNED, _WELL_ALIGNED = 8, 64


def product_s(batch: int, m: int, n: int, k: int, peak_flops_per_s: float, constants: Constants) -> float:
    """Seconds of `batch` products of (m, k) and (k, n), apart from reading and writing them."""
    reached = peak_flops_per_s * constants.matmul_share * constants.product_scale
    if not constants.multiprocessors:
        return 2.0 * batch * m * n * k / reached + constants.matmul_setup_s
    one = reached / constants.multiprocessors
    choices = _waves(batch, m, n, k, constants.multiprocessors)
    best_s = min(waves * (flops / one + constants.wave_setup_s) for waves, flops in choices)
    return best_s / _alignment(m, n, k, constants) + constants.matmul_setup_s


@lru_cache(maxsize=65536)
def _waves(batch: int, m: int, n: int, k: int, multiprocessors: float) -> tuple[tuple[int, float], ...]:
    """(waves, flops of a tile as if at the best tile's rate) of each choice that some other one does not beat in both."""
    found = []
    for rows, columns, share in _TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        for splits in _SPLITS:
            if splits > 1 and (k // splits < _LEAST_K or tiles * splits > 2 * multiprocessors):
                break
            found.append((math.ceil(tiles * splits / multiprocessors), 2.0 * rows * columns * (k / splits) / share))
    return tuple(
        one
        for one in set(found)
        if not any(w <= one[0] and w * f <= one[0] * one[1] for w, f in found if (w, f) != one)
    )


def _alignment(m: int, n: int, k: int, constants: Constants) -> float:
    """Share of the rate that is left: rows of n and k elements start at addresses of their alignment."""
    if n % _ALIGNED or k % _ALIGNED:
        return constants.unaligned_share
    if n % _WELL_ALIGNED or k % _WELL_ALIGNED or m % _ALIGNED:
        return constants.half_aligned_share
    return 1.0
