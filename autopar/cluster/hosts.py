"""Hosts of several kinds in one cluster, and the equal cluster that such a one is nowhere worse than.

A run of `Hosts` are hosts that follow one another in the numbering of ranks and are alike in everything. A machine with
two kinds of device counts as two hosts. Between hosts of different runs the slower of the two ports counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .spec import Cluster, Curve, Device, Link


@dataclass(frozen=True, slots=True)
class Hosts:
    """`count` equal hosts of `devices_per_host` equal devices, whose ranks follow one another.

    intra: the link between two devices of one such host; inter: of a device to other hosts.
    """

    device: Device
    count: int
    devices_per_host: int
    intra: Link
    inter: Link

    def __post_init__(self) -> None:
        for name in ("count", "devices_per_host"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} of hosts must be a whole number of at least 1; got {count!r}")

    @property
    def kind(self) -> tuple:
        """What tells these hosts from others, but for how many there are."""
        return self.device, self.devices_per_host, self.intra, self.inter


def cluster_of(
    hosts: Iterable[Hosts],
    source: str = "",
    software: str = "",
    hosts_per_switch: int = 0,
    oversubscription: float = 1.0,
) -> Cluster:
    """The cluster of these hosts, its ranks numbered in their order; an equal one where all are alike.

    ValueError without any.
    """
    merged: list[Hosts] = []
    for run in hosts:
        if merged and merged[-1].kind == run.kind:
            merged[-1] = replace(merged[-1], count=merged[-1].count + run.count)
        else:
            merged.append(run)
    if not merged:
        raise ValueError("a cluster needs at least one host with a device; got none")
    return Cluster(
        *common(merged), source, software, hosts_per_switch, oversubscription, tuple(merged) if len(merged) > 1 else ()
    )


def join(clusters: Sequence[Cluster]) -> Cluster:
    """One cluster of the hosts of several, in their order. ValueError for none, or where software or switches differ."""
    if not clusters:
        raise ValueError("a cluster needs at least one host with a device; got no clusters to join")
    for name in ("software", "hosts_per_switch", "oversubscription"):
        given = {getattr(cluster, name) for cluster in clusters}
        if len(given) > 1:
            raise ValueError(f"clusters that are joined must agree in {name}; got {sorted(map(str, given))}")
    first = clusters[0]
    return cluster_of(
        itertools.chain(*(cluster.runs for cluster in clusters)),
        " + ".join(dict.fromkeys(cluster.source for cluster in clusters if cluster.source)),
        first.software,
        first.hosts_per_switch,
        first.oversubscription,
    )


def common(hosts: Sequence[Hosts]) -> tuple[Device, int, int, Link, Link]:
    """(device, hosts, devices per host, intra, inter) of the best equal cluster that has as many devices and is nowhere
    better than these hosts: the least of each figure, and hosts so small that each real one is some of them."""
    if len(hosts) == 1:
        (run,) = hosts
        return run.device, run.count, run.devices_per_host, run.intra, run.inter
    width = math.gcd(*(run.devices_per_host for run in hosts))
    world_size = sum(run.count * run.devices_per_host for run in hosts)
    return (
        least_device([run.device for run in hosts]),
        world_size // width,
        width,
        worst_link([run.intra for run in hosts if run.devices_per_host > 1] or [run.intra for run in hosts]),
        worst_link([run.inter for run in hosts]),
    )


def least_device(devices: Sequence[Device]) -> Device:
    """A device that is nowhere better than any of these; itself where all are equal. Its kind is the slowest one's."""
    slowest = min(devices, key=lambda device: max(device.flops_per_s.values()))
    if all(device == slowest for device in devices):
        return slowest
    dtypes = [dtype for dtype in slowest.flops_per_s if all(dtype in device.flops_per_s for device in devices)]
    rates = [name for name in slowest.rates if all(name in device.rates for device in devices)]
    return Device(
        kind=slowest.kind,
        memory_bytes=min(device.memory_bytes for device in devices),
        flops_per_s={dtype: min(device.flops_per_s[dtype] for device in devices) for dtype in dtypes},
        memory_bytes_per_s=min(device.memory_bytes_per_s for device in devices),
        launch_s=max(device.launch_s for device in devices),
        backward_launch_s=max(device.backward_launch_s for device in devices),
        rates={name: least_curve([device.rates[name] for device in devices]) for name in rates},
        asynchronous=slowest.asynchronous,
    )


def least_curve(curves: Sequence[Curve]) -> Curve:
    """At each size that any of the curves has, the least rate of all."""
    sizes = sorted({size for curve in curves for size, _ in curve.points})
    return Curve(tuple((size, min(curve.at(size) for curve in curves)) for size in sizes))


def worst_link(links: Sequence[Link]) -> Link:
    """A link that is nowhere better than any of these; itself where all are equal."""
    if all(link == links[0] for link in links):
        return links[0]
    measured = [kind for kind in links[0].collectives if all(kind in link.collectives for link in links)]
    return Link(
        max(link.latency_s for link in links),
        min(link.bandwidth_bytes_per_s for link in links),
        min(link.overlap for link in links),
        {
            kind: (max(link.collectives[kind][0] for link in links), min(link.collectives[kind][1] for link in links))
            for kind in measured
        },
    )


def seen_by(cluster: Cluster, device: Device) -> Cluster:
    """The cluster with its links as they are, if all its devices were this one."""
    if not cluster.hosts:
        return replace(cluster, device=device)
    runs = [replace(run, device=device) for run in cluster.hosts]
    return Cluster(
        *common(runs), cluster.source, cluster.software, cluster.hosts_per_switch, cluster.oversubscription, tuple(runs)
    )
