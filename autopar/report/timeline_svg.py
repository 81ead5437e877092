"""A timeline as an SVG picture: a row for each rank with events, time from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..timeline import Event, Timeline
from .words import seconds

WIDTH = 1160
LABEL_WIDTH = 190
SPAN_WIDTH = WIDTH - LABEL_WIDTH - 30
_ROW, _BAR, _STRIP = 30, 20, 4
# Anything narrower is drawn together with its neighbour of the same kind, so that a page of any plan stays small.
_LEAST_WIDTH = 0.6

# Colour and name of what occupies a rank; waiting for a message is left blank.
KINDS = {
    "P": ("#8a63b8", "prologue"),
    "F": ("#4d86c6", "forward"),
    "B": ("#62a467", "backward"),
    "I": ("#3f8f63", "backward of inputs"),
    "W": ("#9cc79a", "backward of weights"),
    "D": ("#d9843b", "reduce gradients"),
    "O": ("#7a7f87", "optimizer"),
    "U": ("#7a7f87", "update"),
}
_SENDS = {"SA": ("#4d86c6", "send activation"), "SG": ("#62a467", "send gradient")}


def timeline_svg(line: Timeline, labels: Mapping[int, str]) -> str:
    """The picture of `line`. labels: what to write in front of a rank's row, by rank."""
    rows = line.by_rank()
    height = _ROW * len(rows) + 34
    scale = SPAN_WIDTH / line.step_time_s if line.step_time_s > 0 else 0.0
    parts = [_axis(line.step_time_s, scale, height)]
    for index, (rank, events) in enumerate(rows.items()):
        y = 4 + index * _ROW
        parts.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 14}" class="label">{escape(labels.get(rank, f"rank {rank}"))}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{line.step_time_s * scale:.2f}" height="{_BAR}" class="idle"/>'
        )
        parts += _bars([event for event in events if event.kind in KINDS], y, _BAR, scale, KINDS)
        parts += _bars([e for e in events if e.kind in _SENDS], y + _BAR + 1, _STRIP, scale, _SENDS)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline of the predicted step">'
        + "".join(parts)
        + "</svg>"
    )


def legend(line: Timeline) -> str:
    """The colours of what happens in the step, in words, as HTML."""
    kinds = {event.kind for event in line.events}
    keys = "".join(
        f'<span><i style="background:{color}"></i>{name}</span>'
        for kind, (color, name) in KINDS.items()
        if kind in kinds
    )
    return f'<p class="legend">{keys}<span>thin strips: transfers; blank: waiting</span></p>'


def _bars(
    events: Sequence[Event], y: int, height: int, scale: float, kinds: Mapping[str, tuple[str, str]]
) -> list[str]:
    found = []
    for run in _runs(events, scale):
        first, last = run[0], run[-1]
        color, name = kinds[first.kind]
        x, width = LABEL_WIDTH + first.start_s * scale, max(0.2, (last.end_s - first.start_s) * scale)
        what = f"{name} {first.token}" if len(run) == 1 else f"{len(run)} x {name}, {first.token} to {last.token}"
        span = f"{seconds(first.start_s)} to {seconds(last.end_s)}"
        title = escape(f"{what}: {span} ({seconds(last.end_s - first.start_s)})")
        found.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{color}"><title>{title}</title></rect>'
        )
        if len(run) == 1 and width > 9 * len(first.token) and height == _BAR:
            found.append(f'<text x="{x + width / 2:.2f}" y="{y + 14}" class="token">{escape(first.token)}</text>')
    return found


def _runs(events: Sequence[Event], scale: float) -> list[list[Event]]:
    """Events one by one, but neighbours of a kind together as long as they are too narrow to see."""
    runs: list[list[Event]] = []
    for event in events:
        last = runs[-1] if runs else None
        narrow = last is not None and (event.end_s - last[0].start_s) * scale < _LEAST_WIDTH
        if narrow and last[0].kind == event.kind:
            last.append(event)
        else:
            runs.append([event])
    return runs


def _axis(step_time_s: float, scale: float, height: int) -> str:
    parts = []
    for tick in range(5):
        time_s = step_time_s * tick / 4
        x = LABEL_WIDTH + time_s * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - 22}" class="tick"/>'
            f'<text x="{x:.1f}" y="{height - 6}" class="time">{seconds(time_s) if tick else "0"}</text>'
        )
    return "".join(parts)
