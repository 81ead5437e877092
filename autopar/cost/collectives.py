"""Seconds of a collective: t = steps x latency + volume / bandwidth over the slowest link that it crosses.

Steps and volumes are the ring algorithms' (cluster/ring.py); latency and bandwidth are the link's measured ones for
that collective where there are any, else the link's own. Ignored: tree and in-network algorithms, and contention
between groups of one stage beyond what a probe of all ranks at once has seen.
"""

from __future__ import annotations

from ..cluster.ring import ring
from ..cluster.spec import Cluster, Link
from .corrections import Corrections


def collective_s(
    cluster: Cluster, kind: str, size_bytes: float, ranks: tuple[int, ...], corrections: Corrections | None = None
) -> float:
    """Seconds of one collective among global `ranks`.

    kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", or "send" (between two ranks).
    size_bytes: of the whole tensor: the result of an all_gather, the input of a reduce_scatter or an all_reduce, all
        ranks' parts together for an all_to_all (each holds 1/n), the message of a send.
    Raises ValueError for an unknown kind.
    """
    steps, volume = ring(kind, max(len(ranks), 1))
    if len(ranks) <= 1:
        return 0.0
    link = cluster.link(ranks)
    latency_s, bandwidth = link_rates(link, kind)
    if corrections is not None:
        latency_factor, bandwidth_factor = corrections.link("inter" if cluster.crosses_hosts(ranks) else "intra", kind)
        latency_s *= latency_factor
        bandwidth *= bandwidth_factor
    return steps * latency_s + volume * size_bytes / bandwidth


def link_rates(link: Link, kind: str) -> tuple[float, float]:
    """(latency_s per ring step, bus bytes_per_s) of `kind` on `link`."""
    return link.collectives.get(kind, (link.latency_s, link.bandwidth_bytes_per_s))
