"""What a plan amounts to, in the words that engineers use: "tensor 4 with sequence split; experts over 8; context by ring"."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Graph
from ..plan import Plan, Stage
from ..sharding.flow import block_flow
from ..sharding.rows import stage_units
from .naming import COLUMN_ROW, read_facts
from .words import ranges

# Schemes of attention (report/naming.py) that split the positions, and how they get by.
_CONTEXT = {
    "context-parallel: keys and values passed around, ring attention": "by ring",
    "context-parallel: queries local, keys and values gathered": "by gathered keys and values",
    "sequence-split: heads exchanged by all-to-all, Ulysses": "by all-to-all of heads (Ulysses)",
}
# What a model axis splits that does nothing of the above, by the first word of its schemes.
_SPLITS = {
    "sequence": "sequence split over {}",
    "space": "height and width over {}",
    "batch": "batch over {} of a model axis",
}
_HEADS = (COLUMN_ROW, "head-parallel")
_SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "zb-h1": "ZB-H1", "zb-v": "ZB-V", "2bw": "PipeDream-2BW"}


def common_words(plan: Plan, graph: Graph | None = None) -> str:
    """One line; without the graph a model axis is only called a tensor axis."""
    graph = plan.graph_of(graph) if graph is not None else None
    parts = []
    if plan.pipeline > 1:
        virtual = len(plan.stages) // plan.pipeline
        several = f", {virtual} stages per device" if virtual > 1 else ""
        parts.append(f"pipeline {plan.pipeline} ({_SCHEDULES.get(plan.schedule, plan.schedule)}{several})")
    meshes: dict[tuple, list[int]] = {}
    for s, stage in enumerate(plan.stages):
        meshes.setdefault((stage.data, stage.zero, stage.axes), []).append(s)
    for stages in meshes.values():
        where = f" in stages {ranges(stages)}" if len(meshes) > 1 else ""
        words = "; ".join(_mesh(plan, [plan.stages[s] for s in stages], graph))
        if words or where:
            parts.append((words or "one device each") + where)
    kinds = {choice for stage in plan.stages for choice in stage.block_recompute} - {"none"}
    if kinds:
        parts.append(f"{' and '.join(sorted(kinds))} recomputation")
    return "; ".join(parts) or "one device, nothing split"


def _mesh(plan: Plan, stages: Sequence[Stage], graph: Graph | None) -> list[str]:
    """Of stages with the same mesh."""
    stage, found = stages[0], []
    if stage.data > 1:
        zero = f" with ZeRO {stage.zero}" if stage.zero else ""
        found.append(f"data {stage.data}{zero}")
    for axis, degree in enumerate(stage.axes):
        found += _axis(plan, stages, axis, degree, graph) if graph is not None else [f"tensor {degree}"]
    return found


def _axis(plan: Plan, stages: Sequence[Stage], axis: int, degree: int, graph: Graph) -> list[str]:
    """What one model axis does: several things, where its parts do different ones."""
    blocks, seen = [], set()
    for stage in stages:
        units = stage_units(plan, stage)
        for block, layouts in zip(graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
            if (block.kind, layouts) not in seen:
                seen.add((block.kind, layouts))
                blocks.append(block_flow(graph, block, layouts, units))
    facts = read_facts(graph, blocks, axis)
    attention = set(facts.parts.get("attention", ()))
    others = {scheme for part, counts in facts.parts.items() if part != "attention" for scheme in counts}
    found = []
    is_tensor = bool(attention.intersection(_HEADS)) or any(
        "column" in scheme or "row parallel" in scheme for scheme in others
    )
    if is_tensor:
        found.append(f"tensor {degree}{' with sequence split' if facts.residual['sequence'] else ''}")
    found += [f"context {degree} {_CONTEXT[scheme]}" for scheme in _CONTEXT if scheme in attention]
    if facts.experts:
        found.append(f"experts over {degree}")
    if facts.vocabulary and not is_tensor:
        found.append(f"vocabulary over {degree}")
    for kind, words in _SPLITS.items():
        if not found and (facts.residual[kind] or any(s.startswith(kind) for s in attention | others)):
            found.append(words.format(degree))
    return found or [f"{degree} ranks that do the same"]
