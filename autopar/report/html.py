"""A plan as one self-contained HTML page: its step, its memory, its layouts and its alternatives. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..cluster.spec import Cluster
from ..graph import Graph
from ..plan import Plan
from ..plan_json import write_atomically
from ..sharding.rows import stage_units
from ..timeline import Timeline
from .common_words import common_words
from .explain import MEMORY_PARTS, bound_in_words, boundary_in_words, memory_rows, ops_in_words
from .naming import describe_layout
from .prediction import memory_groups
from .timeline_svg import LABEL_WIDTH, WIDTH, legend, timeline_svg
from .words import gib, plan_in_words, ranges, recompute_in_words, seconds, shares_in_words

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
pre { background: var(--soft); padding: .7rem 1rem; white-space: pre-wrap; font-size: 13px; }
.figures { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 1.2rem 0; }
.figures b { display: block; font-size: 1.45rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
tr.chosen { font-weight: 600; background: var(--soft); }
details ul { margin: .3rem 0; padding-left: 1.2rem; font-size: 13px; }
.scroll { overflow-x: auto; } svg { width: 100%; height: auto; min-width: 700px; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .label { text-anchor: end; } svg .time { text-anchor: middle; opacity: .7; }
svg .token { text-anchor: middle; fill: #fff; font-size: 11px; } svg .idle { fill: #8882; }
svg .tick { stroke: #8884; } svg .limit { stroke: #c2463f; stroke-width: 2; }
.legend span { margin-right: 1.4rem; display: inline-block; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; }
"""


_COLORS = ("#4d86c6", "#d9843b", "#62a467", "#8a63b8", "#c2463f", "#3fa2a0", "#b8a13a")
_WAITING = "#8886"


def save_report(path: str | Path, graph: Graph, plan: Plan, cluster: Cluster, line: Timeline) -> None:
    """Write `report_page` to `path`."""
    write_atomically(Path(path), report_page(graph, plan, cluster, line))


def report_page(graph: Graph, plan: Plan, cluster: Cluster, line: Timeline) -> str:
    """The page of `plan` for `graph` on `cluster`; line: its predicted step, at least one rank of each stage."""
    graph = plan.graph_of(graph)
    stage_of = {rank: index for index, stage in enumerate(plan.stages) for rank in stage.ranks}
    labels = {
        rank: f"stage {stage_of[rank]}, rank{'s' if len(plan.stages[stage_of[rank]].ranks) > 1 else ''} "
        f"{ranges(plan.stages[stage_of[rank]].ranks)}"
        for rank in line.by_rank()
    }
    sections = [
        f"<h1>{escape(plan.model)} on {plan.world_size} devices</h1>"
        f"<p>{escape(common_words(plan, graph))}<br><small>{escape(plan_in_words(plan))}</small></p>",
        _figures(plan, cluster, line),
        _terms(plan),
        "<h2>Predicted step</h2>" + legend(line) + f'<div class="scroll">{timeline_svg(line, labels)}</div>',
        "<h2>Memory per rank</h2>" + _memory(plan, cluster, line) + _memory_parts(plan),
        "<h2>Layout of each block</h2>" + _layouts(graph, plan),
    ]
    if plan.candidates:
        sections.append("<h2>Alternatives</h2>" + _candidates(plan))
    if plan.prediction and plan.prediction.changes:
        sections.append("<h2>What would change the choice</h2>" + _list(plan.prediction.changes))
    sections.append(f"<h2>Cluster</h2><pre>{escape(cluster.describe())}</pre>")
    title = escape(f"autopar: {plan.model} on {plan.world_size} devices")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _figures(plan: Plan, cluster: Cluster, line: Timeline) -> str:
    fullest, peak = max(line.peak_memory_bytes.items(), key=lambda item: item[1] / cluster.memory_bytes_of(item[0]))
    figures = (
        (seconds(line.step_time_s), "per step"),
        (f"{plan.batch_size / line.step_time_s:.4g}", "rows per second"),
        (f"{line.bubble_fraction():.1%}", "of the step idle"),
        (gib(peak), f"on the fullest of the devices, which has {gib(cluster.memory_bytes_of(fullest))}"),
    )
    return (
        '<div class="figures">'
        + "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
        + "</div>"
    )


def _terms(plan: Plan) -> str:
    """One bar that is the step, in its terms, with the share of each in words."""
    if not plan.prediction or not plan.prediction.terms:
        return ""
    whole_s, x, parts, keys = plan.prediction.step_time_s, 0.0, [], []
    for index, term in enumerate(plan.prediction.terms):
        color = _WAITING if index == len(plan.prediction.terms) - 1 else _COLORS[index % len(_COLORS)]
        width = WIDTH * term.seconds / whole_s
        title = escape(f"{term.name}: {seconds(term.seconds)}")
        parts.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="22" fill="{color}"><title>{title}</title></rect>'
        )
        keys.append(
            f'<span><i style="background:{color}"></i>{escape(term.name)} {seconds(term.seconds)} '
            f"({term.seconds / whole_s:.1%})</span>"
        )
        x += width
    bound = bound_in_words(plan)
    return (
        f"<h2>Where the step goes</h2><p>Mean over stages{f'; the plan is {escape(bound)}' if bound else ''}.</p>"
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} 22" role="img" aria-label="terms of the step time">'
        + "".join(parts)
        + f'</svg></div><p class="legend">{"".join(keys)}</p>'
    )


def _memory_parts(plan: Plan) -> str:
    rows = [(ranges(stages), *map(gib, sizes)) for stages, sizes in memory_rows(plan)]
    return _table(("stage", *MEMORY_PARTS, "in all"), rows) if rows else ""


def _memory(plan: Plan, cluster: Cluster, line: Timeline) -> str:
    """A bar for each group of ranks of a stage that need equally much, against what their devices have."""
    groups = memory_groups(plan, line)
    capacities = [min(map(cluster.memory_bytes_of, ranks)) for _, ranks, _ in groups]
    room = WIDTH - LABEL_WIDTH - 170
    scale = room / max(*capacities, *(size for _, _, size in groups))
    height = 28 * len(groups) + 26
    parts = []
    for index, ((stage, ranks, size), capacity) in enumerate(zip(groups, capacities, strict=True)):
        y = 4 + 28 * index
        width = size * scale
        parts.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 14}" class="label">rank{"s" if len(ranks) > 1 else ""} '
            f'{ranges(ranks)}</text><rect x="{LABEL_WIDTH}" y="{y}" width="{width:.2f}" height="20" fill="#4d86c6">'
            f"<title>stage {stage}: {size} bytes</title></rect>"
            f'<text x="{LABEL_WIDTH + width + 6:.2f}" y="{y + 14}">{gib(size)} ({size / capacity:.0%})</text>'
        )
        x = LABEL_WIDTH + capacity * scale
        parts.append(f'<line x1="{x:.2f}" y1="{y - 4}" x2="{x:.2f}" y2="{y + 24}" class="limit"/>')
    parts += [
        f'<text x="{LABEL_WIDTH + capacity * scale:.2f}" y="{height - 5}" class="time">device: {gib(capacity)}</text>'
        for capacity in sorted(set(capacities))
    ]
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="peak memory of each rank">'
        + "".join(parts)
        + "</svg></div>"
    )


def _layouts(graph: Graph, plan: Plan) -> str:
    """A row for each run of blocks of one stage, kind and layout."""
    rows: list[tuple[int, int, int | None, list[int]]] = []
    for index, stage in enumerate(plan.stages):
        for position, block in enumerate(graph.blocks[stage.start : stage.stop]):
            layout = stage.layouts[0][position] if stage.layouts else None
            if rows and rows[-1][:3] == (index, block.kind, layout):
                rows[-1][3].append(block.index)
            else:
                rows.append((index, block.kind, layout, [block.index]))
    cells = []
    for index, _, layout, blocks in rows:
        stage = plan.stages[index]
        cells.append(
            (
                escape(ranges(blocks)),
                f"{index}",
                escape(ranges(stage.ranks)),
                f"data {stage.data}{shares_in_words(stage)} x tensor {stage.tensor}",
                f"zero {stage.zero}, recompute {recompute_in_words(stage)}",
                _layout(graph, plan, blocks[0], layout),
            )
        )
    return _table(("blocks", "stage", "ranks", "mesh", "storage", "layout on the tensor axis"), cells)


def _layout(graph: Graph, plan: Plan, block_index: int, index: int | None) -> str:
    block = graph.blocks[block_index]
    names = [graph.tensors[name].fqn or name for name in block.parameters]
    if index is None:
        return f"<details><summary>whole</summary>{_list(names)}</details>"
    layout = plan.layouts[index]
    shards = next(stage_units(plan, stage) for stage in plan.stages if stage.start <= block_index < stage.stop)
    enters, leaves = (
        boundary_in_words(tokens, graph, crossing)
        for tokens, crossing in ((layout.inputs, block.inputs), (layout.outputs, block.outputs))
    )
    words = f"{describe_layout(graph, block, layout, shards)}; enters {enters}, leaves {leaves}"
    return f"<details><summary>{escape(words)}</summary>{_list(ops_in_words(graph, block, layout, shards))}</details>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _candidates(plan: Plan) -> str:
    rows = [
        (escape(one.name), seconds(one.step_time_s), gib(one.peak_memory_bytes), escape(one.verdict))
        for one in plan.candidates
    ]
    chosen = [one.verdict.startswith("chosen") for one in plan.candidates]
    return _table(("plan", "step", "memory", "verdict"), rows, chosen)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[bool] = ()) -> str:
    """A table of cells that are HTML already; `chosen` rows stand out."""
    head = "".join(f"<th>{name}</th>" for name in header)
    marks = [*chosen, *[False] * (len(rows) - len(chosen))]
    body = "".join(
        f"<tr{' class=chosen' if mark else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
