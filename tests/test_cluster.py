"""Clusters: curves, validation, JSON, presets, the fit of links, and the probe of a running world."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from autopar.cluster import probe as probe_module
from autopar.cluster.presets import PRESETS
from autopar.cluster.probe import probe
from autopar.cluster.probe_compute import ComputeProbe
from autopar.cluster.probe_links import fit
from autopar.cluster.rates import CLASSES, rate_key
from autopar.cluster.ring import COLLECTIVES, ring
from autopar.cluster.spec import Cluster, Curve, Device, Link

DEVICE = Device("made up", 1 << 30, {"float32": 1e12}, 1e11, 1e-6, 2e-6, {"softmax": Curve(((1e3, 1e9), (1e6, 4e10)))})
LINK = Link(1e-5, 1e9, 0.5, {"all_reduce": (2e-5, 8e8)})


def random_cluster(seed: int) -> Cluster:
    draw = random.Random(seed)

    def curve() -> Curve:
        sizes = sorted({draw.uniform(1, 1e9) for _ in range(draw.randint(1, 6))})
        return Curve(tuple((size, draw.uniform(1, 1e12)) for size in sizes))

    def link() -> Link:
        measured = draw.sample(COLLECTIVES, draw.randint(0, len(COLLECTIVES)))
        return Link(
            draw.uniform(0, 1e-3),
            draw.uniform(1e6, 1e11),
            draw.random(),
            {kind: (draw.uniform(0, 1e-3), draw.uniform(1e6, 1e11)) for kind in measured},
        )

    device = Device(
        kind=f"device {seed}",
        memory_bytes=draw.randint(1, 1 << 40),
        flops_per_s={"float32": draw.uniform(1e9, 1e15), "bfloat16": draw.uniform(1e9, 1e15)},
        memory_bytes_per_s=draw.uniform(1e9, 1e13),
        launch_s=draw.uniform(0, 1e-4),
        backward_launch_s=draw.uniform(0, 1e-4),
        rates={rate_key(name, "float32", draw.random() < 0.5): curve() for name in draw.sample(CLASSES, 5)},
        asynchronous=draw.random() < 0.5,
    )
    return Cluster(device, draw.randint(1, 9), draw.randint(1, 8), link(), link(), f"seed {seed}")


@pytest.mark.parametrize("seed", range(20))
def test_curves_interpolate_in_log_size_and_are_flat_outside(seed: int) -> None:
    draw = random.Random(seed)
    sizes = sorted({10 ** draw.uniform(0, 10) for _ in range(draw.randint(1, 7))})
    curve = Curve(tuple((size, draw.uniform(1, 1e12)) for size in sizes))
    for size, rate in curve.points:
        assert curve.at(size) == pytest.approx(rate, rel=1e-9)
    assert curve.at(sizes[0] / 7) == curve.points[0][1]
    assert curve.at(sizes[-1] * 7) == curve.points[-1][1]
    for (left, low), (right, high) in zip(curve.points, curve.points[1:], strict=False):
        assert curve.at((left * right) ** 0.5) == pytest.approx((low + high) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "points", [(), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 2.0)), ((1.0, 0.0),), ((-1.0, 1.0),)]
)
def test_curves_refuse_what_is_no_curve(points: tuple) -> None:
    with pytest.raises(ValueError):
        Curve(points)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Cluster(DEVICE, 0, 8, LINK, LINK), "num_hosts"),
        (lambda: Cluster(DEVICE, 1, 0, LINK, LINK), "devices_per_host"),
        (lambda: Cluster(DEVICE, 1, 2.5, LINK, LINK), "devices_per_host"),
        (lambda: replace(DEVICE, memory_bytes=-1), "memory_bytes"),
        (lambda: replace(DEVICE, memory_bytes_per_s=0), "memory_bytes_per_s"),
        (lambda: replace(DEVICE, launch_s=-1e-9), "launch_s"),
        (lambda: replace(DEVICE, flops_per_s={"bfloat16": 1e12}), "float32"),
        (lambda: replace(DEVICE, flops_per_s={"float32": float("nan")}), "flops_per_s"),
        (lambda: replace(LINK, bandwidth_bytes_per_s=0), "bandwidth"),
        (lambda: replace(LINK, latency_s=-1), "latency"),
        (lambda: replace(LINK, overlap=1.5), "overlap"),
        (lambda: replace(LINK, collectives={"send": (0.0, 0.0)}), "send"),
    ],
)
def test_impossible_hardware_is_refused_by_name(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        change()


@pytest.mark.parametrize("seed", range(20))
def test_json_keeps_everything(seed: int, tmp_path: Path) -> None:
    cluster = random_cluster(seed)
    assert Cluster.from_json(cluster.to_json()) == cluster
    cluster.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == cluster


def test_broken_files_are_named(tmp_path: Path) -> None:
    text = random_cluster(0).to_json()
    data = json.loads(text)
    broken = {
        "truncated": text[: len(text) // 2],
        "other schema": json.dumps({**data, "schema": 99}),
        "no device": json.dumps({k: v for k, v in data.items() if k != "device"}),
        "strange field": json.dumps({**data, "device": {**data["device"], "colour": "red"}}),
        "a list": "[1, 2]",
        "negative": json.dumps({**data, "device": {**data["device"], "memory_bytes": -5}}),
        "text for a number": json.dumps({**data, "intra": {**data["intra"], "latency_s": "fast"}}),
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.json"
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            Cluster.load(path)
        assert str(path) in str(error.value) or name in ("negative", "text for a number"), name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    cluster = Cluster.preset(name, hosts=4, devices_per_host=8)
    assert cluster.world_size == 32
    assert Cluster.from_json(cluster.to_json()) == cluster
    assert cluster.intra.bandwidth_bytes_per_s >= cluster.inter.bandwidth_bytes_per_s
    assert cluster.device.memory_bytes_per_s >= cluster.intra.bandwidth_bytes_per_s
    assert max(cluster.device.flops_per_s.values()) >= cluster.device.flops_per_s["float32"]
    assert name in cluster.describe() and "between hosts" in cluster.describe()
    slow = Link(1e-3, 1e6)
    assert Cluster.preset(name, 2, 2, inter=slow).inter == slow


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="a100-80gb"):
        Cluster.preset("a100-80")
    with pytest.raises(ValueError, match="Known: .*h200-141gb"):
        Cluster.preset("abacus")


def test_the_slowest_link_counts() -> None:
    cluster = Cluster(DEVICE, 3, 4, Link(0.0, 2.0), Link(0.0, 1.0))
    assert cluster.link((0, 3)) is cluster.intra
    assert cluster.link((3, 4)) is cluster.inter
    assert cluster.link((4, 5, 6, 7)) is cluster.intra
    assert cluster.link((0, 1, 2, 11)) is cluster.inter
    assert cluster.link((5,)) is cluster.intra


@pytest.mark.parametrize("seed", range(30))
def test_the_fit_recovers_latency_and_bandwidth(seed: int) -> None:
    draw = random.Random(seed)
    latency_s, bandwidth = 10 ** draw.uniform(-6, -3), 10 ** draw.uniform(8, 11)
    sizes = [4e3, 64e3, 1e6, 8e6, 64e6]
    exact = [(n, latency_s + n / bandwidth) for n in sizes]
    assert fit(exact) == pytest.approx((latency_s, bandwidth), rel=1e-5)
    noisy = [(n, t * draw.uniform(0.95, 1.05)) for n, t in exact]
    found_latency_s, found_bandwidth = fit(noisy)
    for n, t in exact:
        assert found_latency_s + n / found_bandwidth == pytest.approx(t, rel=0.25)


@pytest.mark.parametrize("seed", range(50))
def test_the_fit_never_invents_negative_figures(seed: int) -> None:
    draw = random.Random(seed)
    points = [(size, 10 ** draw.uniform(-5, -1)) for size in (4e3, 64e3, 1e6, 8e6)]
    latency_s, bandwidth = fit(points)
    assert latency_s >= 0 and 0 < bandwidth < float("inf")
    assert latency_s + 8e6 / bandwidth <= 10 * max(t for _, t in points)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks: int) -> None:
    parts = [ring(kind, ranks) for kind in ("reduce_scatter", "all_gather")]
    assert ring("all_reduce", ranks) == pytest.approx((sum(p[0] for p in parts), sum(p[1] for p in parts)))
    with pytest.raises(ValueError, match="gossip"):
        ring("gossip", ranks)


def test_ranks_must_be_numbered_host_by_host() -> None:
    assert probe_module._hosts(["a", "a", "b", "b"], ["cpu"] * 4) == [[0, 1], [2, 3]]
    assert probe_module._hosts(["a"], ["cpu"]) == [[0]]
    assert probe_module._hosts(["a", "a", "b"], ["cpu"] * 3) == [[0, 1], [2]]
    assert probe_module._hosts(["a", "a", "b"], ["cpu", "gpu", "gpu"]) == [[0], [1], [2]]
    for names in (["a", "b", "a", "b"], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="host by host"):
            probe_module._hosts(names, ["cpu"] * len(names))


def test_the_slowest_rank_stands_for_all() -> None:
    def made(rate: float, launch_s: float) -> ComputeProbe:
        return ComputeProbe({"copy": Curve(((1.0, rate), (2.0, 9.0)))}, launch_s, 1.0, {"float32": rate}, rate)

    slowest = probe_module._slowest([made(5.0, 1.0), made(3.0, 2.0), made(4.0, 3.0)])
    assert slowest.rates["copy"].points == ((1.0, 3.0), (2.0, 9.0))
    assert (slowest.launch_s, slowest.flops_per_s["float32"], slowest.memory_bytes_per_s) == (3.0, 3.0, 3.0)
    links = [Link(0, 1, 0.5, {"send": (1e-3, 5.0)}), Link(0, 1, 0.2, {"send": (2e-3, 7.0)})]
    assert probe_module._slowest_link(links) == Link(2e-3, 5.0, 0.2, {"send": (2e-3, 5.0)})


def test_compute_counts_cpu_time_and_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(probe_module.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    alone, shared = (probe_module._compute_clock(torch.device("cpu"), ranks) for ranks in (2, 6))
    spans = []
    for clock in (alone, shared):
        start_s, cpu_s = clock(), time.process_time()
        time.sleep(0.05)  # what other programs take is not ours
        total = sum(range(200_000))
        spans.append((clock() - start_s) / (time.process_time() - cpu_s))
        assert total
    assert spans == pytest.approx([1.0, 3.0], rel=0.2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert probe_module._compute_clock(torch.device("cpu"), 2) is time.perf_counter


def probed() -> tuple[str, float]:
    dist.barrier()
    start = time.perf_counter()
    return probe().to_json(), time.perf_counter() - start


def test_every_rank_probes_the_same_cluster(pool: Pool) -> None:
    results = pool.run(probed, world_size=2, timeout_s=180, collective_timeout_s=120)
    assert results[0][0] == results[1][0]
    print(f"\nprobe of 2 ranks: {max(seconds for _, seconds in results):.1f} s")
    cluster = Cluster.from_json(results[0][0])
    assert (cluster.num_hosts, cluster.devices_per_host, cluster.source) == (1, 2, "probe")
    assert not cluster.device.asynchronous
    assert set(cluster.intra.collectives) == set(COLLECTIVES)
    # Orders of magnitude that any machine keeps: between a hundredth and a hundred times a usual core.
    assert 1e9 < cluster.device.flops_per_s["float32"] < 1e14
    assert 1e8 < cluster.device.memory_bytes_per_s < 1e13
    assert 1e-7 <= cluster.device.launch_s < 1e-2
    for compute_class in set(CLASSES) - {"view"}:
        dtype = "float32"
        assert rate_key(compute_class, dtype) in cluster.device.rates, compute_class
    print(cluster.describe())
