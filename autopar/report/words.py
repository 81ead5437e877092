"""Plans and sizes in words: what tables, errors and explanations share."""

from __future__ import annotations

from ..plan import Plan


def gib(size_bytes: float) -> str:
    """Bytes in the largest of GiB, MiB and KiB that leaves a readable number."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


def seconds(time_s: float) -> str:
    return (
        f"{time_s:.3f} s" if time_s >= 1 else f"{time_s * 1e3:.3g} ms" if time_s >= 1e-3 else f"{time_s * 1e6:.3g} us"
    )


def plan_in_words(plan: Plan) -> str:
    """ "pipeline 2 x data 2 x tensor 2, 4 microbatches, 1f1b, zero 3, recompute full"."""
    first = plan.stages[0]
    return ", ".join(
        (
            f"pipeline {plan.pipeline} x data {first.data} x tensor {first.tensor}",
            f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}",
            plan.schedule,
            f"zero {_common([stage.zero for stage in plan.stages])}",
            f"recompute {_common([stage.recompute for stage in plan.stages])}",
        )
    )


def ranges(numbers: list[int] | tuple[int, ...]) -> str:
    """Ascending whole numbers in words: 0-3, 6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _common(values: list) -> str:
    """The one value of all stages, or each value with its stages."""
    if len(set(values)) == 1:
        return str(values[0])
    groups = {value: [s for s, other in enumerate(values) if other == value] for value in dict.fromkeys(values)}
    return " and ".join(f"{value} in stages {ranges(stages)}" for value, stages in groups.items())
