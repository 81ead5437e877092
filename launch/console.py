"""What train_lm prints besides the plan: the cluster, and predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.cluster.spec import Cluster, Link
from autopar.report.explain import table
from autopar.report.words import gib, seconds
from autopar.timeline import Timeline

PREFIXES = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))


def rate(value_per_s: float, unit: str) -> str:
    """Three digits with a decimal prefix: rate(2.5e9, "B") is "2.50 GB/s"."""
    # The largest prefix whose number does not round to less than one.
    factor, prefix = max((pair for pair in PREFIXES if value_per_s >= 0.9995 * pair[0]), default=PREFIXES[0])
    return f"{value_per_s / factor:#.3g}".rstrip(".") + f" {prefix}{unit}/s"


def cluster_text(cluster: Cluster) -> str:
    if cluster.hosts:
        return f"Cluster ({cluster.source}): {cluster.describe()}"
    device = cluster.device
    peaks = ", ".join(f"{dtype} {rate(flops_per_s, 'flop')}" for dtype, flops_per_s in device.flops_per_s.items())
    lines = [
        f"Cluster ({cluster.source}): {cluster.num_hosts} x {cluster.devices_per_host} {device.kind}, "
        f"{gib(device.memory_bytes)} each",
        f"- matrix products: {peaks}",
        f"- memory: {rate(device.memory_bytes_per_s, 'B')}",
    ]
    if cluster.devices_per_host > 1:
        lines.append(f"- inside a host: {_link_text(cluster.intra)}")
    if cluster.num_hosts > 1:
        lines.append(f"- between hosts: {_link_text(cluster.inter)}")
    return "\n".join(lines)


def _link_text(link: Link) -> str:
    if not link.collectives:
        return f"{seconds(link.latency_s)} + {rate(link.bandwidth_bytes_per_s, 'B')}"
    return ", ".join(
        f"{name} {seconds(latency_s)} + {rate(bytes_per_s, 'B')}"
        for name, (latency_s, bytes_per_s) in link.collectives.items()
    )


def comparison_text(predicted: Timeline, step_time_s: float, peak_memory_bytes: Mapping[int, int]) -> str:
    """Predicted against measured: the step's time, and the peak memory of each rank of which both are known."""
    pairs = [("step time", predicted.step_time_s, step_time_s, seconds)]
    for rank in sorted(set(predicted.peak_memory_bytes) & set(peak_memory_bytes)):
        name = f"peak memory, rank {rank}"
        pairs.append((name, predicted.peak_memory_bytes[rank], peak_memory_bytes[rank], gib))
    rows = [
        (name, words(expected), words(measured), f"{expected / measured - 1:+.1%}")
        for name, expected, measured, words in pairs
    ]
    return table(("", "predicted", "measured", "error"), rows)
