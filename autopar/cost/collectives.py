"""Seconds of a collective: the cheapest of the algorithms and protocols that a library has, over the links it crosses.

Volumes are those of cluster/ring.py. With n ranks on h hosts, g of them on each:

- ring: the ranks of a host pass the data on among themselves, and leave it over as many network ports as the host
  has ranks in the group, so that t = steps' latencies + max(volume / link, volume / (g port)); of 2 (n - 1) steps of
  an all-reduce 2 h cross hosts (NCCL, src/graph/tuning.cc).
- tree: all-reduce alone. 2 (g - 1) steps inside hosts, 2 log2 h between them, at the double tree's full bandwidth
  (Sanders, Speck and Traeff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan").
- hierarchical: reduce-scatter inside hosts, all-reduce of each part between them, all-gather inside; its volume between
  hosts is 2 (h - 1) / h instead of 2 (n - 1) / n. Frameworks do it with two groups of ranks; it is chosen by name only.
- all-to-all: (n - g) / n of what a rank sends leaves the host over its own port.

Protocols trade latency for bandwidth (`_PROTOCOLS`). Switches: when a group crosses leaves, an all-to-all shares the
leaf's uplinks with all other groups that do the same at that moment, and gets 1 / oversubscription of a port for what
leaves the leaf; a ring crosses each leaf's edge once whatever its length, and so takes its full rate up to an
oversubscription of as many hosts as a leaf has.

On hosts of several kinds the slowest link of those that a group lies on counts, within hosts and between them.

All groups of a stage run the same collective at once, one per port: a port's share is never counted twice. Where a
probe has measured a link, its latency per ring step and bandwidth are taken as they are: they hold all of this.
"""

from __future__ import annotations

import math

from ..cluster.ring import ring
from ..cluster.span import Span, span
from ..cluster.spec import Cluster
from .constants import Constants, constants_of
from .corrections import Corrections

# (share of a step's latency with the simple protocol, share of its bandwidth): NCCL's simple, LL128 and LL. Latencies:
# `hwLat` of src/graph/tuning.cc; bandwidths: 120 of 128 bytes, less what its threads reach, and half of an LL line.
_PROTOCOLS = ((1.0, 1.0), (0.55, 0.6), (0.2, 0.25))
_TREE_SHARE = 0.92  # of the ring's bandwidth: the same file


def collective_s(
    cluster: Cluster,
    kind: str,
    size_bytes: float,
    ranks: tuple[int, ...],
    corrections: Corrections | None = None,
    constants: Constants | None = None,
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
    where = span(cluster, ranks)
    link = cluster.links(where.runs)[where.hosts > 1]
    factors = (1.0, 1.0)
    if corrections is not None:
        factors = corrections.link("inter" if where.hosts > 1 else "intra", kind)
    if kind in link.collectives:
        latency_s, bandwidth = link.collectives[kind]
        return steps * latency_s * factors[0] + volume * size_bytes / (bandwidth * factors[1])
    transfer_s = volume * size_bytes / (_bandwidth(cluster, kind, where, constants) * factors[1])
    if not cluster.device.asynchronous:
        return _ring_latency_s(cluster, kind, steps, where) * factors[0] + transfer_s
    least_s = (constants or constants_of(cluster)).collective_s
    latencies = [(_ring_latency_s(cluster, kind, steps, where), 1.0)]
    if kind == "all_reduce" and where.hosts > 1:
        latencies.append((_tree_latency_s(cluster, where), _TREE_SHARE))
    return least_s + min(
        latency_s * slower * factors[0] + transfer_s / (share * wide)
        for latency_s, share in latencies
        for slower, wide in _PROTOCOLS
    )


def hierarchical_all_reduce_s(
    cluster: Cluster, size_bytes: float, ranks: tuple[int, ...], corrections: Corrections | None = None
) -> float:
    """Seconds of an all-reduce over `ranks` by host: reduce-scatter inside, all-reduce of the parts between, all-gather
    inside. Equal to `collective_s` inside one host. Needs as many ranks on every host, in order."""
    where = span(cluster, ranks)
    if where.hosts == 1 or where.per_host == 1:
        return collective_s(cluster, "all_reduce", size_bytes, ranks, corrections)
    if where.hosts * where.per_host != where.ranks:
        raise ValueError(f"a hierarchical all-reduce needs as many ranks on every host; got {where}")
    inside, between = ranks[: where.per_host], ranks[:: where.per_host]
    return (
        collective_s(cluster, "reduce_scatter", size_bytes, inside, corrections)
        + collective_s(cluster, "all_reduce", size_bytes / where.per_host, between, corrections)
        + collective_s(cluster, "all_gather", size_bytes, inside, corrections)
    )


def _bandwidth(cluster: Cluster, kind: str, where: Span, constants: Constants | None) -> float:
    """Bus bandwidth, bytes per second."""
    link_share = network_share = 1.0
    if cluster.device.asynchronous:
        constants = constants or constants_of(cluster)
        link_share, network_share = constants.link_share, constants.network_share
    intra, inter = cluster.links(where.runs)
    inside = intra.bandwidth_bytes_per_s * link_share
    if where.hosts == 1:
        return inside
    port = inter.bandwidth_bytes_per_s * network_share
    if kind == "send":
        return port
    over = cluster.oversubscription if where.leaves > 1 else 1.0
    if kind == "all_to_all":
        # Of what a rank sends, the share that leaves the host goes over its port.
        leaving = (where.ranks - where.per_host) / (where.ranks - 1)
        away = (1 - 1 / where.leaves) * over + 1 / where.leaves if where.leaves > 1 else 1.0
        return 1.0 / max(leaving * max(1.0, away) / port, (1 - leaving) / inside if leaving < 1 else 0.0)
    ports = port * where.per_host / max(1.0, over / (cluster.hosts_per_switch or 1))
    return min(ports, inside) if where.per_host > 1 else ports


def _ring_latency_s(cluster: Cluster, kind: str, steps: int, where: Span) -> float:
    intra, inter = cluster.links(where.runs)
    if where.hosts == 1:
        return steps * intra.latency_s
    if where.per_host == 1 or kind == "send":
        return steps * inter.latency_s
    crossing = min(steps, steps * where.hosts // where.ranks + 1)
    if kind == "all_to_all":
        crossing = where.ranks - where.per_host
    return crossing * inter.latency_s + (steps - crossing) * intra.latency_s


def _tree_latency_s(cluster: Cluster, where: Span) -> float:
    intra, inter = cluster.links(where.runs)
    inside = (where.per_host - 1) * intra.latency_s
    return 2 * (inside + math.ceil(math.log2(where.hosts)) * inter.latency_s)
