"""Hardware as plain data: devices, the links between them, and what was measured of both."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hosts import Hosts

# Of files of equal clusters, and of clusters of several kinds of hosts.
SCHEMA = 1
SCHEMA_OF_KINDS = 2


@dataclass(frozen=True)
class Curve:
    """A rate that depends on size: (size, rate) points, sizes ascending; interpolated in log size, flat outside.

    For compute classes size is flops (or bytes for memory-bound classes) of one call and rate is flops/s (bytes/s).
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError(f"a curve needs at least one point, sizes strictly ascending; got sizes {sizes}")
        for size, rate in self.points:
            _positive("size of a curve's point", size)
            _positive("rate of a curve's point", rate)

    @cached_property
    def _log_sizes(self) -> tuple[float, ...]:
        return tuple(math.log(size) for size, _ in self.points)

    @property
    def is_rising(self) -> bool:
        """Whether no larger size has a lower rate."""
        rates = [rate for _, rate in self.points]
        return rates == sorted(rates)

    def at(self, size: float) -> float:
        """The rate at `size`."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        if size >= points[-1][0]:
            return points[-1][1]
        right = bisect.bisect_right(self._log_sizes, math.log(size), hi=len(points) - 1)
        low, high = self._log_sizes[right - 1], self._log_sizes[right]
        share = (math.log(size) - low) / (high - low)
        return points[right - 1][1] * (1 - share) + points[right][1] * share


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU share, as one rank sees it while its neighbours work too.

    flops_per_s: dense matrix peak by dtype name ("float32", "bfloat16", ...).
    rates: measured (or efficiency-derived) curves by class of op, forward "<class>" and backward "<class>_backward",
        with ".<dtype>" appended for "matmul", "convolution" and "attention" (cost/compute.py lists the classes and what
        their size means); a missing class falls back to the roofline of flops_per_s and memory_bytes_per_s with
        published efficiencies. Rates are net of launch cost.
    launch_s: fixed cost of one op forward (dispatch plus kernel launch); backward_launch_s: of its backward.
    asynchronous: kernels run while the host dispatches the next ops (GPUs), so that launch cost is a floor of an op's
        time; otherwise it adds to it.
    """

    kind: str
    memory_bytes: int
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    launch_s: float
    backward_launch_s: float
    rates: Mapping[str, Curve] = field(default_factory=dict)
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _positive("memory_bytes of a device", self.memory_bytes)
        _positive("memory_bytes_per_s of a device", self.memory_bytes_per_s)
        _not_negative("launch_s of a device", self.launch_s)
        _not_negative("backward_launch_s of a device", self.backward_launch_s)
        if "float32" not in self.flops_per_s:
            raise ValueError(f"flops_per_s of a device must have 'float32'; it has {sorted(self.flops_per_s)}")
        for dtype, flops in self.flops_per_s.items():
            _positive(f"flops_per_s[{dtype!r}] of a device", flops)

    @property
    def rates_fall(self) -> bool:
        """Whether something is slower at large sizes, as where small ones fit into a cache."""
        return any(not curve.is_rising for curve in self.rates.values())


@dataclass(frozen=True, slots=True)
class Link:
    """Any path between two ranks. A message of n bytes takes latency_s + n / bandwidth_bytes_per_s.

    overlap: the share of a transfer's time that hides behind independent compute (0: none, 1: all).
    collectives: measured (latency_s, bandwidth_bytes_per_s) by collective name ("all_reduce", "all_gather",
        "reduce_scatter", "all_to_all", "send"), where latency is per step of the ring (cost/collectives.py) and
        bandwidth is bus bandwidth (NCCL tests' convention).
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    overlap: float = 0.0
    collectives: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _not_negative("latency_s of a link", self.latency_s)
        _positive("bandwidth_bytes_per_s of a link", self.bandwidth_bytes_per_s)
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap of a link is a share between 0 and 1; got {self.overlap!r}")
        for kind, (latency_s, bandwidth) in self.collectives.items():
            _not_negative(f"latency of {kind} on a link", latency_s)
            _positive(f"bandwidth of {kind} on a link", bandwidth)


@dataclass(frozen=True)
class Cluster:
    """`num_hosts` hosts of `devices_per_host` equal devices; ranks are numbered host by host.

    Hosts of several kinds are `hosts` (cluster/hosts.py; `Cluster.join` makes such clusters). The other fields then
    describe the best equal cluster that is nowhere better, for what knows of equal devices alone; its hosts are as wide
    as all kinds have in common. `device_of`, `host`, `link` and `runs` tell the truth about both.

    intra: the link between two devices of one host; inter: between devices of different hosts, per device.
    source: where the numbers come from ("probe", "preset h100-80gb", a path). software: the stack that trains, one of
        cost/constants.py; "" where everything is measured.
    hosts_per_switch: on one leaf switch; 0: one switch has them all. oversubscription: how many times the ports of a
        leaf exceed its uplinks.
    """

    device: Device
    num_hosts: int
    devices_per_host: int
    intra: Link
    inter: Link
    source: str = ""
    software: str = ""
    hosts_per_switch: int = 0
    oversubscription: float = 1.0
    hosts: tuple[Hosts, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_hosts", "devices_per_host"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} of a cluster must be a whole number of at least 1; got {count!r}")
        count = self.hosts_per_switch
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"hosts_per_switch of a cluster must be a whole number, 0 for all; got {count!r}")
        _positive("oversubscription of a cluster", self.oversubscription)
        if self.oversubscription < 1:
            raise ValueError(f"oversubscription of a cluster must be at least 1; got {self.oversubscription!r}")
        if self.hosts:
            self._check_common()

    def _check_common(self) -> None:
        from .hosts import common

        names = ("device", "num_hosts", "devices_per_host", "intra", "inter")
        for name, expected in zip(names, common(self.hosts), strict=True):
            if getattr(self, name) != expected:
                raise ValueError(f"{name} of a cluster with hosts= must be what these have in common; use Cluster.join")

    @property
    def world_size(self) -> int:
        return self.num_hosts * self.devices_per_host

    @property
    def runs(self) -> tuple[Hosts, ...]:
        """All hosts, in the order of their ranks, as runs of equal ones."""
        from .hosts import Hosts

        return self.hosts or (Hosts(self.device, self.num_hosts, self.devices_per_host, self.intra, self.inter),)

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The distinct devices, in the order of their first ranks."""
        found: list[Device] = []
        for run in self.runs:
            if run.device not in found:
                found.append(run.device)
        return tuple(found)

    @property
    def is_equal(self) -> bool:
        """Whether all devices are alike; links may still differ between hosts."""
        return not self.hosts or len(self.devices) == 1

    @property
    def as_equal(self) -> Cluster:
        """The best equal cluster that is nowhere better; itself where all hosts are alike."""
        return replace(self, hosts=()) if self.hosts else self

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        """(host, run) of each rank of a cluster with `hosts`."""
        found: list[tuple[int, int]] = []
        host = 0
        for number, run in enumerate(self.hosts):
            for _ in range(run.count):
                found += [(host, number)] * run.devices_per_host
                host += 1
        return tuple(found)

    def host(self, rank: int) -> int:
        """The number of the host that a rank is on."""
        return self._places[rank][0] if self.hosts else rank // self.devices_per_host

    def run_of(self, rank: int) -> int:
        """Which of `runs` a rank's host belongs to."""
        return self._places[rank][1] if self.hosts else 0

    @cached_property
    def kinds(self) -> tuple[Hosts, ...]:
        """One run of hosts of each kind: of those that differ in anything but their number."""
        found: list[Hosts] = []
        for run in self.runs:
            if all(run.kind != other.kind for other in found):
                found.append(run)
        return tuple(found)

    @cached_property
    def _kind_numbers(self) -> tuple[int, ...]:
        return tuple(next(i for i, kind in enumerate(self.kinds) if kind.kind == run.kind) for run in self.runs)

    def kind_number(self, rank: int) -> int:
        """Which of `kinds` a rank's host is of."""
        return self._kind_numbers[self.run_of(rank)]

    @cached_property
    def _device_numbers(self) -> tuple[int, ...]:
        return tuple(self.devices.index(run.device) for run in self.runs)

    def device_number(self, rank: int) -> int:
        """Which of `devices` a rank has."""
        return self._device_numbers[self.run_of(rank)]

    def device_of(self, rank: int) -> Device:
        """The device of a rank. ValueError for a rank that the cluster does not have."""
        if not 0 <= rank < self.world_size:
            raise ValueError(
                f"rank {rank} of a cluster of {self.world_size} devices; expected 0 to {self.world_size - 1}"
            )
        return self.hosts[self.run_of(rank)].device if self.hosts else self.device

    def memory_bytes_of(self, rank: int) -> int:
        return self.device_of(rank).memory_bytes

    def links(self, runs: tuple[int, ...]) -> tuple[Link, Link]:
        """(within hosts, between hosts): the slowest of these runs of `hosts`; of all where there are none."""
        if not self.hosts or not runs:
            return self.intra, self.inter
        if runs not in self._links:
            from .hosts import worst_link

            kinds = [self.hosts[run] for run in runs]
            self._links[runs] = worst_link([k.intra for k in kinds]), worst_link([k.inter for k in kinds])
        return self._links[runs]

    @cached_property
    def spans(self) -> dict[tuple[int, ...], Any]:
        """What cluster/span.py has found."""
        return {}

    @cached_property
    def _links(self) -> dict[tuple[int, ...], tuple[Link, Link]]:
        return {}

    def link(self, ranks: tuple[int, ...]) -> Link:
        """The slowest link that a collective over `ranks` crosses."""
        runs = tuple(sorted({self.run_of(rank) for rank in ranks})) if self.hosts else ()
        return self.links(runs)[self.crosses_hosts(ranks)]

    def crosses_hosts(self, ranks: tuple[int, ...]) -> bool:
        return bool(ranks) and self.host(min(ranks)) != self.host(max(ranks))

    def describe(self) -> str:
        """A few lines for people: devices, their rates, and both kinds of link."""
        if not self.hosts:
            return "\n".join(_described(self.runs[0], self.source, self.num_hosts > 1))
        lines = [
            f"{self.world_size} devices of {len(self.devices)} kinds" + (f", from {self.source}" if self.source else "")
        ]
        for run in self.hosts:
            lines += [f"  {line}" for line in _described(run, "", True)]
        return "\n".join(lines)

    def to_json(self) -> str:
        data = asdict(self)
        if not self.hosts:
            del data["hosts"]
            return json.dumps({"schema": SCHEMA, **data}, indent=1)
        shared = ("source", "software", "hosts_per_switch", "oversubscription", "hosts")
        return json.dumps({"schema": SCHEMA_OF_KINDS, **{name: data[name] for name in shared}}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "") -> Cluster:
        """The inverse of `to_json`. ValueError for anything that is not a cluster; `source` names it in the error."""
        where = source or "the text"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); expected a file written by Cluster.save") from None
        if not isinstance(data, dict) or data.get("schema") not in (SCHEMA, SCHEMA_OF_KINDS):
            given = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"{where} has schema {given!r}; expected a cluster file of schema {SCHEMA} or {SCHEMA_OF_KINDS}; probe again"
            )
        try:
            others = {
                "source": data.get("source", ""),
                "software": data.get("software", ""),
                "hosts_per_switch": data.get("hosts_per_switch", 0),
                "oversubscription": data.get("oversubscription", 1.0),
            }
            if data["schema"] == SCHEMA_OF_KINDS:
                return _of_kinds(data["hosts"], others)
            return cls(
                device=_device(data["device"]),
                num_hosts=data["num_hosts"],
                devices_per_host=data["devices_per_host"],
                intra=_link(data["intra"]),
                inter=_link(data["inter"]),
                **others,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is not a complete cluster ({type(error).__name__}: {error})") from None
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a file written by `save`; ValueError when it holds something else."""
        return cls.from_json(Path(path).read_text(encoding="utf-8", errors="replace"), source=str(path))

    @classmethod
    def preset(
        cls, name: str, hosts: int = 1, devices_per_host: int = 8, inter: Link | None = None, software: str = "autopar"
    ) -> Cluster:
        """A cluster from published data sheets; see cluster/presets.py."""
        from .presets import preset

        return preset(name, hosts, devices_per_host, inter, software=software)

    @classmethod
    def join(cls, *clusters: Cluster) -> Cluster:
        """One cluster of the hosts of several: `Cluster.join(Cluster.preset("a100-80gb", 2), Cluster.preset("t4-16gb", 4))`.

        Ranks are numbered in this order. ValueError for none, or where their software or switches differ.
        """
        from .hosts import join

        return join(clusters)

    @classmethod
    def probe(cls, device: Any = None, process_group: Any = None) -> Cluster:
        """Measure the running world; every rank must call it; see cluster/probe.py."""
        from .probe import probe

        return probe(device, process_group)


def _described(hosts: Hosts, source: str, networked: bool) -> list[str]:
    """Lines on hosts of one kind."""
    device = hosts.device
    peaks = ", ".join(f"{dtype} {flops / 1e12:.3g} Tflop/s" for dtype, flops in device.flops_per_s.items())
    lines = [
        f"{hosts.count * hosts.devices_per_host} x {device.kind} ({hosts.count} hosts of {hosts.devices_per_host})"
        + (f", from {source}" if source else ""),
        f"  device: {device.memory_bytes / 2**30:.1f} GiB at {device.memory_bytes_per_s / 1e9:.4g} GB/s; {peaks}; "
        f"launch {device.launch_s * 1e6:.1f} us forward, {device.backward_launch_s * 1e6:.1f} us backward",
    ]
    for where, link, used in (
        ("within a host", hosts.intra, hosts.devices_per_host > 1),
        ("between hosts", hosts.inter, networked),
    ):
        if used:
            lines.append(
                f"  {where}: {link.bandwidth_bytes_per_s / 1e9:.3g} GB/s, {link.latency_s * 1e6:.3g} us, "
                f"{link.overlap:.0%} hides behind compute"
            )
            lines += [
                f"    {kind}: {bandwidth / 1e9:.3g} GB/s bus, {latency_s * 1e6:.3g} us per ring step"
                for kind, (latency_s, bandwidth) in link.collectives.items()
            ]
    return lines


def _of_kinds(hosts: list[dict[str, Any]], others: dict[str, Any]) -> Cluster:
    from .hosts import Hosts, cluster_of

    runs = [
        Hosts(**{**run, "device": _device(run["device"]), "intra": _link(run["intra"]), "inter": _link(run["inter"])})
        for run in hosts
    ]
    return cluster_of(runs, **others)


def _device(data: dict[str, Any]) -> Device:
    rates = {name: Curve(tuple((s, rate) for s, rate in curve["points"])) for name, curve in data["rates"].items()}
    return Device(**{**data, "rates": rates})


def _link(data: dict[str, Any]) -> Link:
    return Link(**{**data, "collectives": {kind: tuple(pair) for kind, pair in data["collectives"].items()}})


def _positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number; got {value!r}")


def _not_negative(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{what} must be a number of at least 0; got {value!r}")
