"""A predicted step in words: its time, its bubbles, and the memory of each rank."""

from __future__ import annotations

from ..cluster.spec import Cluster
from ..plan import Plan
from ..timeline import Timeline
from .explain import table
from .words import gib, plan_in_words, ranges, seconds


def prediction_text(plan: Plan, line: Timeline, cluster: Cluster) -> str:
    """Some lines on `line`, the predicted step of `plan` on `cluster`."""
    rows = [
        (str(stage), ranges(ranks), gib(size), f"{size / min(map(cluster.memory_bytes_of, ranks)):.0%}")
        for stage, ranks, size in memory_groups(plan, line)
    ]
    return "\n".join(
        (
            "",
            f"Plan for {plan.model} on {plan.world_size} devices: {plan_in_words(plan)}",
            f"Predicted step time: {seconds(line.step_time_s)}, {plan.batch_size / line.step_time_s:.4g} rows per second",
            f"Bubbles: ranks are idle for {line.bubble_fraction():.1%} of the step",
            "",
            table(("stage", "ranks", "peak memory", "of the device"), rows),
        )
    )


def memory_groups(plan: Plan, line: Timeline) -> list[tuple[int, list[int], int]]:
    """(stage, ranks, peak bytes of each of them): ranks of a stage with equal peaks together."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, stage in enumerate(plan.stages):
        for rank in sorted(stage.ranks):
            found.setdefault((index, line.peak_memory_bytes[rank]), []).append(rank)
    return [(stage, ranks, size) for (stage, size), ranks in found.items()]
