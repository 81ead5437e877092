"""Hardware as plain data: devices, the links between them, and what was measured of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate that depends on size: (size, rate) points, sizes ascending; interpolated in log size, flat outside.

    For compute classes size is flops (or bytes for memory-bound classes) of one call and rate is flops/s (bytes/s).
    """

    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU share, as one rank sees it while its neighbours work too.

    flops_per_s: dense matrix peak by dtype name ("float32", "bfloat16", ...).
    rates: measured (or efficiency-derived) curves by class of op and dtype, keys such as "matmul.float32",
        "attention.float32", "elementwise", "transcendental", "reduction", "gather", "optimizer"; a missing class falls
        back to the roofline of flops_per_s and memory_bytes_per_s with published efficiencies.
    launch_s: fixed cost of one op forward (dispatch plus kernel launch); backward_launch_s: of its backward.
    """

    kind: str
    memory_bytes: int
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    launch_s: float
    backward_launch_s: float
    rates: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """Any path between two ranks. A message of n bytes takes latency_s + n / bandwidth_bytes_per_s.

    overlap: the share of a transfer's time that hides behind independent compute (0: none, 1: all).
    collectives: measured (latency_s, bandwidth_bytes_per_s) by collective name ("all_reduce", "all_gather",
        "reduce_scatter", "all_to_all", "send"), where bandwidth is bus bandwidth (NCCL tests' convention).
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    overlap: float = 0.0
    collectives: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`num_hosts` hosts of `devices_per_host` equal devices; ranks are numbered host by host.

    intra: the link between two devices of one host; inter: between devices of different hosts, per device.
    source: where the numbers come from ("probe", "preset h100-80gb", a path).
    """

    device: Device
    num_hosts: int
    devices_per_host: int
    intra: Link
    inter: Link
    source: str = ""

    @property
    def world_size(self) -> int:
        return self.num_hosts * self.devices_per_host

    def host(self, rank: int) -> int:
        return rank // self.devices_per_host

    def link(self, ranks: tuple[int, ...]) -> Link:
        """The slowest link that a collective over `ranks` crosses."""
        return self.intra if len({self.host(r) for r in ranks}) <= 1 else self.inter
