"""What train_lm prints: the cluster, the candidate plans, and predicted against measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from autopar.cluster.spec import Cluster, Link
from autopar.plan import Candidate
from autopar.timeline import Timeline

MAX_CANDIDATES = 16
PREFIXES = ((1e-6, "u"), (1e-3, "m"), (1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the last one is not padded."""
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def scaled(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: scaled(2.5e9, "B/s") is "2.50 GB/s"; "-" for what is not finite."""
    if not math.isfinite(value):
        return "-"
    # The largest prefix whose number does not round to less than one.
    factor, prefix = max((pair for pair in PREFIXES if value >= 0.9995 * pair[0]), default=PREFIXES[0])
    return f"{value / factor:#.3g}".rstrip(".") + f" {prefix}{unit}"


def cluster_text(cluster: Cluster) -> str:
    device = cluster.device
    peaks = ", ".join(f"{dtype} {scaled(flops, 'flop/s')}" for dtype, flops in device.flops_per_s.items())
    lines = [
        f"cluster ({cluster.source}): {cluster.num_hosts} x {cluster.devices_per_host} {device.kind}, "
        f"{scaled(device.memory_bytes, 'B')} each",
        f"  matrix products  {peaks}",
        f"  memory           {scaled(device.memory_bytes_per_s, 'B/s')}",
    ]
    if cluster.devices_per_host > 1:
        lines.append(f"  inside a host    {_link_text(cluster.intra)}")
    if cluster.num_hosts > 1:
        lines.append(f"  between hosts    {_link_text(cluster.inter)}")
    return "\n".join(lines)


def _link_text(link: Link) -> str:
    measured = {"any path": (link.latency_s, link.bandwidth_bytes_per_s), **link.collectives}
    return ", ".join(
        f"{name} {scaled(latency_s, 's')} + {scaled(bytes_per_s, 'B/s')}"
        for name, (latency_s, bytes_per_s) in measured.items()
    )


def candidates_text(candidates: Sequence[Candidate]) -> str:
    """The plans that were considered, fastest first, the chosen one marked with >."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.verdict != "", candidate.step_time_s))
    rows = [
        (
            ">" if candidate.verdict == "" else "",
            candidate.name,
            scaled(candidate.step_time_s, "s"),
            scaled(candidate.peak_memory_bytes, "B"),
            candidate.verdict or "chosen",
        )
        for candidate in ordered[:MAX_CANDIDATES]
    ]
    text = table(("", "plan", "step", "peak memory", ""), rows)
    if len(ordered) > MAX_CANDIDATES:
        text += f"\n  and {len(ordered) - MAX_CANDIDATES} slower ones"
    return text


def comparison_text(predicted: Timeline, step_time_s: float, peak_memory_bytes: Mapping[int, int]) -> str:
    """Predicted against measured: the step's time, and the peak memory of each rank of which both are known."""
    rows = [_comparison("step time", predicted.step_time_s, step_time_s, "s")]
    for rank in sorted(set(predicted.peak_memory_bytes) & set(peak_memory_bytes)):
        expected = predicted.peak_memory_bytes[rank]
        rows.append(_comparison(f"peak memory, rank {rank}", expected, peak_memory_bytes[rank], "B"))
    return table(("", "predicted", "measured", "error"), rows)


def _comparison(name: str, predicted: float, measured: float, unit: str) -> tuple[str, ...]:
    return name, scaled(predicted, unit), scaled(measured, unit), f"{predicted / measured - 1:+.1%}"
