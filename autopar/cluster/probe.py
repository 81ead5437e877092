"""Measure the running world: `probe()` on every rank gives every rank the same `Cluster`.

All ranks measure at the same time, because in training they share memory bandwidth, caches and cores. Of the ranks whose
devices are of one kind the slowest's figures stand for all, since training waits for it; ranks of different kinds, or on
hosts with different numbers of ranks, make a cluster of several kinds of hosts. With two CPU ranks it takes about five
seconds.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .hosts import Hosts, cluster_of
from .probe_compute import ComputeProbe, Sampler, probe_compute
from .probe_links import probe_link
from .probe_world import join_world
from .spec import Cluster, Curve, Device, Link

# A world of one rank has no links; a Cluster needs some, and no collective ever crosses them.
_NO_LINK = Link(latency_s=0.0, bandwidth_bytes_per_s=1e12)


def probe(
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Cluster:
    """The cluster of `process_group` (None: the launcher's world, or one rank where there is none).

    device: what this rank computes on; None takes the current accelerator where the group can use it, else the CPU.
    Every rank of the group must call it. Raises ValueError when the ranks of a host do not follow one another.
    """
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        join_world()
    distributed = dist.is_initialized()
    device = _device(device, process_group if distributed else None, distributed)
    world_size = dist.get_world_size(process_group) if distributed else 1
    together = (lambda: _barrier(device, process_group)) if world_size > 1 else (lambda: None)
    names = _gather(platform.node(), process_group, world_size)
    mine = names.count(platform.node())
    kinds = _gather(_kind(device), process_group, world_size)
    hosts = _hosts(names, kinds)
    sampler = Sampler(device, _compute_clock(device, mine), together)
    probes = _gather(probe_compute(sampler), process_group, world_size)
    memories = _gather(_memory_bytes(device, mine), process_group, world_size)
    asynchronous = _gather(device.type != "cpu", process_group, world_size)
    labels = [(kinds[ranks[0]], len(ranks)) for ranks in hosts]
    within, between = _links(Sampler(device, time.perf_counter, together), process_group, hosts, labels)
    runs = []
    for ranks, label in zip(hosts, labels, strict=True):
        alike = [rank for other, its in zip(hosts, labels, strict=True) if its == label for rank in other]
        measured = _slowest([probes[rank] for rank in alike])
        one = Device(
            kind=label[0],
            memory_bytes=min(memories[rank] for rank in alike),
            flops_per_s=measured.flops_per_s,
            memory_bytes_per_s=measured.memory_bytes_per_s,
            launch_s=measured.launch_s,
            backward_launch_s=measured.backward_launch_s,
            rates=measured.rates,
            asynchronous=asynchronous[ranks[0]],
        )
        runs.append(Hosts(one, 1, len(ranks), within[label], between))
    found = cluster_of(runs, "probe")
    # Ranks compute the same from gathered figures; rank 0's is sent all the same, so that nothing can tell them apart.
    return Cluster.from_json(_from_first(found.to_json(), device, process_group, world_size))


def _device(device: torch.device | str | None, group: dist.ProcessGroup | None, distributed: bool) -> torch.device:
    if device is not None:
        return torch.device(device)
    usable = torch.cuda.is_available() and (not distributed or "nccl" in dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")


def _compute_clock(device: torch.device, ranks_on_host: int) -> Callable[[], float]:
    """Seconds for compute.

    A rank of one CPU thread counts its own CPU time, so that what other programs take for a moment does not count;
    where its host has more ranks than cores, they take turns in training too, and the time grows by as much.
    """
    if device.type != "cpu" or torch.get_num_threads() != 1:
        return time.perf_counter
    turns = max(1.0, ranks_on_host / len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 1.0
    return lambda: time.process_time() * turns


def _barrier(device: torch.device, group: dist.ProcessGroup | None) -> None:
    # An all-reduce rather than dist.barrier, which picks a device of its own on NCCL.
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def _gather(value: Any, group: dist.ProcessGroup | None, world_size: int) -> list[Any]:
    """`value` of every rank, in rank order."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values


def _from_first(text: str, device: torch.device, group: dist.ProcessGroup | None, world_size: int) -> str:
    if world_size == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, group=group, group_src=0, device=device)
    return box[0]


def _hosts(names: list[str], kinds: list[str]) -> list[list[int]]:
    """The ranks of each host, from the host name and the kind of device of each rank; a machine with devices of several
    kinds is a host for each run of equal ones."""
    seen: list[str] = []
    for name in names:
        if name in seen[:-1]:
            raise ValueError(
                f"ranks must be numbered host by host; they run on {names}: start the processes of a host one after another"
            )
        if name not in seen:
            seen.append(name)
    grouped = itertools.groupby(range(len(names)), key=lambda rank: (names[rank], kinds[rank]))
    return [list(ranks) for _, ranks in grouped]


def _slowest(probes: list[ComputeProbe]) -> ComputeProbe:
    """Point by point the slowest rank's figures; all ranks measured the same sizes."""
    first = probes[0]

    def lowest(name: str) -> Curve:
        curves = [p.rates[name].points for p in probes]
        return Curve(tuple((size, min(c[i][1] for c in curves)) for i, (size, _) in enumerate(curves[0])))

    return ComputeProbe(
        rates={name: lowest(name) for name in first.rates},
        launch_s=max(p.launch_s for p in probes),
        backward_launch_s=max(p.backward_launch_s for p in probes),
        flops_per_s={dtype: min(p.flops_per_s[dtype] for p in probes) for dtype in first.flops_per_s},
        memory_bytes_per_s=min(p.memory_bytes_per_s for p in probes),
    )


def _links(
    sampler: Sampler, group: dist.ProcessGroup | None, hosts: list[list[int]], labels: list[tuple[str, int]]
) -> tuple[dict[tuple[str, int], Link], Link]:
    """(within a host, by its label; between hosts). Where there is only one of the two it stands for both.

    labels: of each host, what kind it is.
    """
    world_size = sum(len(ranks) for ranks in hosts)
    if world_size == 1:
        return dict.fromkeys(labels, _NO_LINK), _NO_LINK
    whole = _slowest_link(_gather(probe_link(sampler, group), group, world_size))
    if len(hosts) in (1, world_size):
        return dict.fromkeys(labels, whole), whole
    rank = dist.get_rank(group)
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    # Every process must take part in making every group.
    groups = [dist.new_group([everyone[member] for member in ranks]) for ranks in hosts]
    place = next(i for i, ranks in enumerate(hosts) if rank in ranks)
    own = probe_link(sampler, groups[place]) if len(hosts[place]) > 1 else None
    measured = _gather((labels[place], own), group, world_size)
    dist.destroy_process_group(groups[place])
    found = {label: [link for there, link in measured if there == label and link is not None] for label in labels}
    return {label: _slowest_link(links) if links else whole for label, links in found.items()}, whole


def _slowest_link(links: list[Link]) -> Link:
    worst = {
        kind: (max(link.collectives[kind][0] for link in links), min(link.collectives[kind][1] for link in links))
        for kind in links[0].collectives
    }
    return Link(*worst["send"], min(link.overlap for link in links), worst)


def _memory_bytes(device: torch.device, ranks_on_host: int) -> int:
    """What this rank may use: the device's memory, or an equal share of the host's (or of its cgroup's limit)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path)
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():
            host_bytes = min(host_bytes, int(text))
    return host_bytes // ranks_on_host


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
