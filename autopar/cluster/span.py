"""Where a group of ranks lies: on how many hosts and switches, how many of it on one host."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import Cluster

# Spans of groups up to this size are remembered; longer ones take longer to look up than to see.
SHORT = 8


@dataclass(frozen=True, slots=True)
class Span:
    """ranks: of the group. hosts: that hold any of them. per_host: the most on one host. leaves: switches that these
    hosts hang on. runs: which of `Cluster.hosts` these belong to; () where all hosts are alike."""

    ranks: int
    hosts: int
    per_host: int
    leaves: int
    runs: tuple[int, ...] = ()


def span(cluster: Cluster, ranks: tuple[int, ...]) -> Span:
    """The span of a group of distinct global ranks; evenly spaced ones, as meshes have them, take no walk."""
    count, width = len(ranks), cluster.devices_per_host
    if cluster.hosts or count <= SHORT:
        if ranks not in cluster.spans:
            cluster.spans[ranks] = _of_kinds(cluster, ranks) if cluster.hosts else _counted(cluster, ranks)
        return cluster.spans[ranks]
    step = ranks[1] - ranks[0]
    per_leaf = cluster.hosts_per_switch or cluster.num_hosts
    if step > 0 and ranks[-1] == ranks[0] + (count - 1) * step:
        first, last = ranks[0] // width, ranks[-1] // width
        if step >= width:
            leaves = min(count, last // per_leaf - first // per_leaf + 1)
            return Span(count, count, 1, leaves)
        hosts = last - first + 1
        return Span(count, hosts, min(count, -(-width // step)), last // per_leaf - first // per_leaf + 1)
    return _counted(cluster, ranks)


def _counted(cluster: Cluster, ranks: tuple[int, ...]) -> Span:
    count, per_leaf = len(ranks), cluster.hosts_per_switch or cluster.num_hosts
    if count <= 1:
        return Span(count, count, count, count)
    hosts: dict[int, int] = {}
    for rank in ranks:
        host = rank // cluster.devices_per_host
        hosts[host] = hosts.get(host, 0) + 1
    return Span(count, len(hosts), max(hosts.values()), len({host // per_leaf for host in hosts}))


def _of_kinds(cluster: Cluster, ranks: tuple[int, ...]) -> Span:
    hosts: dict[int, int] = {}
    for rank in ranks:
        host = cluster.host(rank)
        hosts[host] = hosts.get(host, 0) + 1
    leaves = {host // cluster.hosts_per_switch if cluster.hosts_per_switch else 0 for host in hosts}
    runs = tuple(sorted({cluster.run_of(rank) for rank in ranks}))
    return Span(len(ranks), len(hosts), max(hosts.values(), default=0), len(leaves), runs)
