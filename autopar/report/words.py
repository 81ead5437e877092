"""Plans and sizes in words: what tables, errors and explanations share."""

from __future__ import annotations

from ..plan import Plan, Stage


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
    """ "pipeline 2 x data 2 x tensor 2, 4 microbatches, 1f1b, zero 3, recompute full".

    Of unequal stages: "pipeline 2 x (data 2 shared 3:1 in stages 0 and data 1 x tensor 2 in stages 1), ...".
    """
    meshes = [_mesh_in_words(stage) for stage in plan.stages]
    mesh = _common(meshes)
    return ", ".join(
        (
            f"pipeline {plan.pipeline} x {mesh if len(set(meshes)) == 1 else f'({mesh})'}",
            f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}",
            plan.schedule,
            f"zero {_common([stage.zero for stage in plan.stages])}",
            f"recompute {_common([recompute_in_words(stage) for stage in plan.stages])}",
        )
    )


def _mesh_in_words(stage: Stage) -> str:
    return f"data {stage.data}{shares_in_words(stage)} x tensor {stage.tensor}"


def shares_in_words(stage: Stage) -> str:
    """ " shared 3:1", or "" where the shares are equal."""
    return f" shared {':'.join(map(str, stage.shares))}" if len(set(stage.shares)) > 1 else ""


def recompute_in_words(stage: Stage) -> str:
    """ "full", or "full in blocks 3-5" (counted in the model) where the blocks differ."""
    choices = {
        choice: [stage.start + i for i, other in enumerate(stage.block_recompute) if other == choice]
        for choice in dict.fromkeys(stage.block_recompute)
    }
    if len(choices) == 1:
        return next(iter(choices))
    return " and ".join(f"{choice} in blocks {ranges(blocks)}" for choice, blocks in choices.items())


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
