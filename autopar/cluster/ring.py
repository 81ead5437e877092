"""What the ring algorithms of the collectives move: the convention behind every latency and bandwidth of a `Link`.

Reference: nccl-tests, doc/PERFORMANCE.md ("bus bandwidth"); Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", 2005.
"""

from __future__ import annotations

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def ring(kind: str, ranks: int) -> tuple[int, float]:
    """(steps, volume): latencies paid, and bytes that each rank sends per byte of the whole tensor.

    The whole tensor is the result of an all_gather, the input of a reduce_scatter or all_reduce, and for an all_to_all
    all ranks' parts together (each rank holds 1/ranks of it). Raises ValueError for an unknown kind.
    """
    around = (ranks - 1) / ranks
    match kind:
        case "all_reduce":
            return 2 * (ranks - 1), 2 * around
        case "all_gather" | "reduce_scatter":
            return ranks - 1, around
        case "all_to_all":
            return ranks - 1, around / ranks
        case "send":
            return 1, 1.0
    raise ValueError(f"unknown collective {kind!r}; expected one of {', '.join(COLLECTIVES)}")
