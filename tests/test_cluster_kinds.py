"""Clusters of several kinds of hosts: ranks, links, files, what they have in common, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_cluster import random_cluster

from autopar.cli_cluster import read_cluster
from autopar.cluster import probe as probe_module
from autopar.cluster.hosts import cluster_of, least_curve, seen_by
from autopar.cluster.probe_compute import ComputeProbe
from autopar.cluster.span import span
from autopar.cluster.spec import Cluster, Curve, Link

FAST, SLOW = Cluster.preset("a100-80gb", 2, 8), Cluster.preset("v100-32gb", 4, 4)
MIXED = Cluster.join(FAST, SLOW)


def random_kinds(seed: int) -> Cluster:
    draw = random.Random(seed)
    kinds = [random_cluster(100 * seed + k) for k in range(draw.randint(2, 4))]
    order = [draw.choice(kinds) for _ in range(draw.randint(2, 6))]
    return Cluster.join(*(replace(kind, num_hosts=draw.randint(1, 3)) for kind in order))


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_has_its_host_device_and_links(seed: int) -> None:
    cluster = random_kinds(seed)
    expected = [
        (host, run)
        for host, run in enumerate(run for run in cluster.runs for _ in range(run.count))
        for _ in range(run.devices_per_host)
    ]
    assert cluster.world_size == len(expected)
    for rank, (host, run) in enumerate(expected):
        assert cluster.host(rank) == host and cluster.device_of(rank) == run.device
        assert cluster.runs[cluster.run_of(rank)] == run
        assert cluster.memory_bytes_of(rank) == run.device.memory_bytes
    draw = random.Random(seed)
    for _ in range(20):
        ranks = tuple(sorted(draw.sample(range(cluster.world_size), draw.randint(1, min(6, cluster.world_size)))))
        hosts, runs = {expected[r][0] for r in ranks}, [expected[r][1] for r in ranks]
        link, where = cluster.link(ranks), span(cluster, ranks)
        crossed = [run.inter if len(hosts) > 1 else run.intra for run in runs]
        assert cluster.crosses_hosts(ranks) == (len(hosts) > 1)
        assert link.bandwidth_bytes_per_s == min(one.bandwidth_bytes_per_s for one in crossed)
        assert link.latency_s == max(one.latency_s for one in crossed)
        most = max(sum(expected[r][0] == host for r in ranks) for host in hosts)
        assert (where.ranks, where.hosts, where.per_host, where.leaves) == (len(ranks), len(hosts), most, 1)
    with pytest.raises(ValueError, match=f"rank {cluster.world_size} of a cluster of {cluster.world_size} devices"):
        cluster.device_of(cluster.world_size)


@pytest.mark.parametrize("seed", range(20))
def test_what_they_have_in_common_is_nowhere_better(seed: int) -> None:
    cluster = random_kinds(seed)
    if not cluster.hosts:
        return
    equal = cluster.as_equal
    assert equal.is_equal and not equal.hosts and equal.world_size == cluster.world_size
    for rank in range(cluster.world_size):
        device = cluster.device_of(rank)
        assert equal.device.memory_bytes <= device.memory_bytes
        assert equal.device.flops_per_s["float32"] <= device.flops_per_s["float32"]
        for name, curve in equal.device.rates.items():
            assert all(rate <= device.rates[name].at(size) * (1 + 1e-9) for size, rate in curve.points)
    for pair in itertools.combinations(range(cluster.world_size), 2):
        if not cluster.crosses_hosts(pair):
            continue
        assert equal.crosses_hosts(pair)
        assert equal.link(pair).bandwidth_bytes_per_s <= cluster.link(pair).bandwidth_bytes_per_s


@pytest.mark.parametrize("seed", range(20))
def test_files_keep_everything(seed: int, tmp_path: Path) -> None:
    cluster = random_kinds(seed)
    cluster.save(tmp_path / "cluster.json")
    found = Cluster.load(tmp_path / "cluster.json")
    assert found == cluster and found.hosts == cluster.hosts
    assert json.loads(cluster.to_json())["schema"] == (2 if cluster.hosts else 1)


def test_files_of_equal_clusters_are_as_they_were() -> None:
    data = json.loads(FAST.to_json())
    assert data["schema"] == 1 and "hosts" not in data
    for added in ("software", "hosts_per_switch", "oversubscription"):  # what the first files did not have
        del data[added]
    assert Cluster.from_json(json.dumps(data)) == replace(FAST, software="")


def test_equal_hosts_make_an_equal_cluster() -> None:
    assert Cluster.join(FAST) == FAST
    assert Cluster.join(FAST, replace(FAST, num_hosts=3)) == replace(FAST, num_hosts=5)
    assert not Cluster.join(FAST, FAST).hosts and MIXED.as_equal.device.kind == "v100-32gb"
    assert FAST.as_equal is FAST and FAST.device_of(15) == FAST.device
    twice = Cluster.join(FAST, SLOW, FAST)
    assert len(twice.hosts) == 3 and len(twice.devices) == 2 and not twice.is_equal
    wider = Cluster.join(FAST, replace(FAST, devices_per_host=4))
    assert wider.is_equal and wider.hosts and (wider.num_hosts, wider.devices_per_host) == (6, 4)


def test_as_if_all_devices_were_of_one_kind() -> None:
    seen = seen_by(MIXED, SLOW.device)
    assert seen.is_equal and {seen.device_of(rank).kind for rank in range(32)} == {"v100-32gb"}
    for ranks in ((0, 1), (0, 8), (0, 16), (16, 17), (16, 20)):
        assert seen.link(ranks) == MIXED.link(ranks)


def test_the_least_of_curves() -> None:
    curve = least_curve([Curve(((1.0, 4.0), (100.0, 4.0))), Curve(((10.0, 2.0), (1000.0, 9.0)))])
    assert [size for size, _ in curve.points] == [1.0, 10.0, 100.0, 1000.0]
    assert [rate for _, rate in curve.points] == pytest.approx([2.0, 2.0, 4.0, 4.0])


def test_the_command_line_names_kinds() -> None:
    assert read_cluster("2xa100-80gbx8+4xv100-32gbx4") == MIXED
    assert read_cluster(" 2 x A100-80gb x 8 + 4 x v100-32gb x 4 ") == MIXED
    text = MIXED.describe()
    assert "32 devices of 2 kinds" in text and "16 x a100-80gb (2 hosts of 8)" in text
    assert "16 x v100-32gb (4 hosts of 4)" in text and text.count("between hosts") == 2


HOSTS = MIXED.hosts[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Cluster.join(), "at least one host with a device"),
        (lambda: cluster_of([]), "at least one host with a device"),
        (lambda: replace(HOSTS, count=0), "count of hosts must be a whole number of at least 1; got 0"),
        (lambda: replace(HOSTS, devices_per_host=True), "devices_per_host"),
        (lambda: replace(HOSTS.device, memory_bytes=-1), "memory_bytes of a device must be a positive number"),
        (lambda: replace(HOSTS.inter, bandwidth_bytes_per_s=0), "bandwidth_bytes_per_s of a link"),
        (lambda: replace(HOSTS.inter, latency_s=float("nan")), "latency_s of a link"),
        (lambda: replace(HOSTS.intra, overlap=float("nan")), "overlap of a link"),
        (
            lambda: replace(MIXED, device=FAST.device),
            "device of a cluster with hosts= must be what these have in common",
        ),
        (lambda: replace(MIXED, num_hosts=2), "num_hosts of a cluster"),
        (lambda: Cluster.join(FAST, replace(SLOW, software="megatron")), "agree in software"),
        (lambda: read_cluster("2xa100-80gbx8+"), "hosts>x<preset>x<devices per host"),
        (lambda: read_cluster("2xa100-80gbx8+0xt4x4"), "num_hosts of a cluster"),
        (lambda: read_cluster("2xa100-80gbx8+1xv100-23gbx4"), "v100-32gb"),
    ],
)
def test_nonsense_is_refused_with_one_clear_error(change, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        change()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(hosts=[]), "at least one host"),
        (lambda data: data["hosts"][1]["device"].update(memory_bytes=-5), "memory_bytes"),
        (lambda data: data["hosts"][0]["inter"].update(bandwidth_bytes_per_s=0), "bandwidth"),
        (lambda data: data["hosts"][0]["device"]["flops_per_s"].update(float32=float("nan")), "flops_per_s"),
        (lambda data: data["hosts"][0].update(colour="red"), "not a complete cluster"),
        (lambda data: data.pop("hosts"), "not a complete cluster"),
        (lambda data: data.update(hosts=3), "not a complete cluster"),
    ],
)
def test_nonsense_files_are_refused(change, words: str) -> None:
    data = json.loads(MIXED.to_json())
    change(data)
    with pytest.raises(ValueError, match=words):
        Cluster.from_json(json.dumps(data), "kinds.json")


def measured(rank: int) -> ComputeProbe:
    return ComputeProbe(
        {"copy": Curve(((1.0, 2.0 + rank), (2.0, 9.0)))}, 1e-6, 1e-6, {"float32": 1e9 * (1 + rank)}, 1e9
    )


def probed() -> tuple[str, str]:
    """The last rank computes on two threads, so that its device is of another kind. What is measured is made up."""
    before = torch.get_num_threads(), probe_module.probe_compute, probe_module.probe_link
    torch.set_num_threads(1 + (dist.get_rank() == 3))
    probe_module.probe_compute = lambda sampler: measured(dist.get_rank())
    probe_module.probe_link = lambda sampler, group: Link(0, 1, 0.5, {"send": (1e-3 / dist.get_world_size(group), 5.0)})
    try:
        return probe_module.probe().to_json(), probe_module._kind(torch.device("cpu"))
    finally:
        torch.set_num_threads(before[0])
        probe_module.probe_compute, probe_module.probe_link = before[1:]


def test_ranks_of_different_kinds_are_told_apart(pool: Pool) -> None:
    results = pool.run(probed, world_size=4)
    assert len({text for text, _ in results}) == 1
    cluster = Cluster.from_json(results[0][0])
    assert [cluster.device_of(rank).kind for rank in range(4)] == [kind for _, kind in results]
    assert [(run.count, run.devices_per_host) for run in cluster.hosts] == [(1, 3), (1, 1)]
    # The slowest of each kind, and the links within hosts and between them.
    assert [run.device.flops_per_s["float32"] for run in cluster.hosts] == [1e9, 4e9]
    assert [run.device.rates["copy"].at(1.0) for run in cluster.hosts] == [2.0, 5.0]
    assert cluster.link((0, 2)).latency_s == pytest.approx(1e-3 / 3)
    assert cluster.link((2, 3)).latency_s == pytest.approx(1e-3 / 4)
