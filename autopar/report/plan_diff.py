"""What changes between two plans, in words."""

from __future__ import annotations

from ..plan import Plan, Stage
from .words import gib, ranges, recompute_in_words, seconds

_STAGE_FIELDS = ("data", "tensor", "axes", "zero", "zero_group", "shares", "recompute")


_WHOLE = (
    "schema", "model", "fingerprint", "rewrites", "world_size", "batch_size", "microbatches", "schedule", "precision",
    "reduction", "offload",
)  # fmt: skip


def diff_plans(before: Plan, after: Plan) -> str:
    """One line per difference, "" when the plans do the same; predictions are compared, candidates are not."""
    lines = []
    for name in _WHOLE:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            lines.append(f"{name}: {was} -> {now}")
    if before.pipeline != after.pipeline:
        lines.append(f"pipeline: {before.pipeline} -> {after.pipeline}")
    for name in _STAGE_FIELDS:
        was, now = _everywhere(before, name), _everywhere(after, name)
        if was is not None and now is not None and was != now:
            lines.append(f"{name}: {was} -> {now}")
    for s in range(max(before.pipeline, after.pipeline)):
        lines += _stage_lines(s, before, after)
    if before.prediction and after.prediction and before.prediction != after.prediction:
        was, now = before.prediction, after.prediction
        lines.append(
            f"prediction: {seconds(was.step_time_s)} -> {seconds(now.step_time_s)} per step "
            f"({now.step_time_s / was.step_time_s:.2f}x), {gib(was.peak_memory_bytes)} -> {gib(now.peak_memory_bytes)}"
        )
    return "\n".join(lines)


def _said(stage: Stage, name: str):
    return recompute_in_words(stage) if name == "recompute" else getattr(stage, name)


def _everywhere(plan: Plan, name: str):
    """The value that all stages of a plan have, None if they differ."""
    values = {_said(stage, name) for stage in plan.stages}
    return values.pop() if len(values) == 1 else None


def _stage_lines(s: int, before: Plan, after: Plan) -> list[str]:
    if s >= before.pipeline:
        return [f"stage {s}: new, {_stage(after.stages[s])}"]
    if s >= after.pipeline:
        return [f"stage {s}: gone, was {_stage(before.stages[s])}"]
    was, now = before.stages[s], after.stages[s]
    changes = []
    if (was.start, was.stop) != (now.start, now.stop):
        changes.append(f"blocks {was.start}-{was.stop - 1} -> {now.start}-{now.stop - 1}")
    if was.ranks != now.ranks:
        changes.append(f"ranks {ranges(was.ranks)} -> {ranges(now.ranks)}")
    for name in _STAGE_FIELDS:
        mixed = _everywhere(before, name) is None or _everywhere(after, name) is None
        if mixed and _said(was, name) != _said(now, name):
            changes.append(f"{name} {_said(was, name)} -> {_said(now, name)}")
    changed = _changed_layouts(before, was, after, now)
    if changed:
        changes.append(f"other layouts in blocks {ranges(changed)}")
    return [f"stage {s}: {', '.join(changes)}"] if changes else []


def _changed_layouts(before: Plan, was: Stage, after: Plan, now: Stage) -> list[int]:
    """Blocks of both stages that are laid out differently, where both stages have the same model axes."""
    if was.axes != now.axes or not was.axes:
        return []
    old = {
        was.start + i: tuple(before.layouts[one] for one in index)
        for i, index in enumerate(zip(*was.layouts, strict=True))
    }
    new = {
        now.start + i: tuple(after.layouts[one] for one in index)
        for i, index in enumerate(zip(*now.layouts, strict=True))
    }
    return [block for block in sorted(old.keys() & new.keys()) if old[block] != new[block]]


def _stage(stage: Stage) -> str:
    return f"blocks {stage.start}-{stage.stop - 1} on ranks {ranges(stage.ranks)}"
