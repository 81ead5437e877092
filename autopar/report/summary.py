"""Predicted against measured, side by side, in one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from autopar.timeline import Timeline

# Label of each kind of instruction, in the order of the table.
_KINDS = {
    "P": "prologue",
    "RA": "receive activation (wait)",
    "F": "forward",
    "SA": "send activation",
    "RG": "receive gradient (wait)",
    "B": "backward",
    "I": "backward of inputs",
    "W": "backward of weights",
    "SG": "send gradient",
    "D": "reduce gradients",
    "O": "optimizer",
    "U": "update",
}
# A predicted send lasts as long as its link is busy, a measured one until it is under way: their error means nothing.
_NOT_COMPARABLE = frozenset({"SA", "SG"})
_DURATIONS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_SIZES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


def timeline_table(predicted: Timeline | None, measured: Timeline | None) -> str:
    """Step time, idle share, mean duration of each kind of instruction, and peak memory, with the relative errors.

    error is predicted / measured - 1. A kind's mean is taken over instructions, each averaged over its ranks first, so
    that a prediction for one rank per stage and a measurement of all ranks compare. Peak memory is listed for ranks
    that both sides know (all that one side knows, if there is only one), the fullest eight at most. ValueError without
    any timeline.
    """
    lines = [line for line in (predicted, measured) if line is not None]
    if not lines:
        raise ValueError("there is no timeline to show: give predicted, measured or both")
    both = (predicted, measured)
    rows = [_row("step time", [line and line.step_time_s for line in both], _DURATIONS)]
    rows.append(("idle share", *("-" if line is None else f"{line.bubble_fraction():.1%}" for line in both), ""))
    means = [_means(line) for line in both]
    others = sorted((means[0].keys() | means[1].keys()) - _KINDS.keys())
    for kind in (*_KINDS, *others):
        values = [mean.get(kind) for mean in means]
        if any(value is not None for value in values):
            row = _row(f"  {_KINDS.get(kind, kind)}", values, _DURATIONS)
            rows.append((*row[:-1], "") if kind in _NOT_COMPARABLE else row)
    known = set.intersection(*({*line.peak_memory_bytes} for line in lines))
    fullest = sorted(known, key=lambda rank: (-lines[-1].peak_memory_bytes[rank], rank))[:8]
    for rank in sorted(fullest):
        values = [None if line is None else line.peak_memory_bytes[rank] for line in both]
        rows.append(_row(f"peak memory, rank {rank}", values, _SIZES))
    return _aligned([("", "predicted", "measured", "error"), *rows])


def _means(line: Timeline | None) -> dict[str, float]:
    """Mean seconds per kind, over instructions."""
    found: dict[str, list[float]] = defaultdict(list)
    for events in line.by_token().values() if line else ():
        found[events[0].kind].append(sum(e.duration_s for e in events) / len(events))
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def _row(label: str, values: Sequence[float | None], units: Sequence[tuple[float, str]]) -> tuple[str, ...]:
    """Both values in the unit that suits the larger one, and the relative error of the first."""
    largest = max(abs(value) for value in values if value is not None)
    scale, unit = next((u for u in units if largest >= u[0]), units[-1])
    cells = ["-" if value is None else f"{value / scale:.3f} {unit}" for value in values]
    predicted, measured = values
    error = f"{predicted / measured - 1:+.1%}" if predicted is not None and measured else ""
    return (label, *cells, error)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )
