"""Measure the running world: `probe()` on every rank gives every rank the same `Cluster`.

All ranks measure at the same time, because in training they share memory bandwidth, caches and cores. The slowest
rank's figures stand for all, since training waits for it. With two CPU ranks it takes about five seconds.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
    Every rank of the group must call it. Raises ValueError when the hosts have different numbers of ranks, or the ranks
    of a host do not follow one another.
    """
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        join_world()
    distributed = dist.is_initialized()
    device = _device(device, process_group if distributed else None, distributed)
    world_size = dist.get_world_size(process_group) if distributed else 1
    together = (lambda: _barrier(device, process_group)) if world_size > 1 else (lambda: None)
    hosts = _gather(platform.node(), process_group, world_size)
    num_hosts, devices_per_host = _hosts(hosts)
    sampler = Sampler(device, _compute_clock(device, devices_per_host), together)
    measured = _slowest(_gather(probe_compute(sampler), process_group, world_size))
    memory_bytes = min(_gather(_memory_bytes(device, devices_per_host), process_group, world_size))
    intra, inter = _links(Sampler(device, time.perf_counter, together), process_group, num_hosts, devices_per_host)
    found = Cluster(
        Device(
            kind=_kind(device),
            memory_bytes=memory_bytes,
            flops_per_s=measured.flops_per_s,
            memory_bytes_per_s=measured.memory_bytes_per_s,
            launch_s=measured.launch_s,
            backward_launch_s=measured.backward_launch_s,
            rates=measured.rates,
            asynchronous=device.type != "cpu",
        ),
        num_hosts,
        devices_per_host,
        intra,
        inter,
        "probe",
    )
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


def _hosts(names: list[str]) -> tuple[int, int]:
    """(hosts, ranks per host) from the host name of each rank."""
    distinct = list(dict.fromkeys(names))
    per_host = len(names) // len(distinct)
    if names != [name for name in distinct for _ in range(per_host)]:
        raise ValueError(
            f"ranks must be numbered host by host, equally many on each; they run on {names}: "
            "start equally many processes on every host"
        )
    return len(distinct), per_host


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
    sampler: Sampler, group: dist.ProcessGroup | None, num_hosts: int, devices_per_host: int
) -> tuple[Link, Link]:
    """(within a host, between hosts); where there is only one of the two it stands for both."""
    if num_hosts * devices_per_host == 1:
        return _NO_LINK, _NO_LINK
    whole = _slowest_link(_gather(probe_link(sampler, group), group, num_hosts * devices_per_host))
    if num_hosts == 1 or devices_per_host == 1:
        return whole, whole
    rank = dist.get_rank(group)
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    # Every process must take part in making every group.
    groups = [
        dist.new_group([everyone[host * devices_per_host + local] for local in range(devices_per_host)])
        for host in range(num_hosts)
    ]
    own = groups[rank // devices_per_host]
    within = _slowest_link(_gather(probe_link(sampler, own), group, num_hosts * devices_per_host))
    dist.destroy_process_group(own)
    return within, whole


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
