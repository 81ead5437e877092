"""The planners' suite as a picture: for each instance, every method's predicted step time over auto's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

LEFT, WIDTH, ROW, TOP = 230, 640, 18, 60
# Ratios beyond this stand at the edge.
MOST = 4.0
TICKS = (1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#000000",
)  # fmt: skip


def plot(ratios: Mapping[str, Mapping[str, tuple[float, bool]]], methods: Sequence[str]) -> str:
    """An SVG picture. ratios: by instance and method (step time over auto's, whether it fits); hollow marks do not fit."""
    height = TOP + ROW * len(ratios) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    colours = dict(zip(methods, COLOURS, strict=False))
    for i, method in enumerate(methods):
        x, y = LEFT + 110 * (i % 6), 16 + 16 * (i // 6)
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colours[method]}"/>')
        parts.append(f'<text x="{x + 8}" y="{y}">{escape(method)}</text>')
    for tick in TICKS:
        x = _x(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for row, (name, found) in enumerate(ratios.items()):
        y = TOP + ROW * row + 8
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for method, (ratio, fits) in found.items():
            fill = colours[method] if fits else "none"
            title = f"{method}: {ratio:.3f}{'' if fits else ', does not fit'}"
            parts.append(
                f'<circle cx="{_x(ratio):.1f}" cy="{y}" r="4" fill="{fill}" fill-opacity="0.8" stroke="{colours[method]}">'
                f"<title>{escape(title)}</title></circle>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(ratio: float) -> float:
    """Logarithmic from 0.9 to MOST."""
    ratio = min(max(ratio, 0.9), MOST)
    return LEFT + WIDTH * math.log(ratio / 0.9) / math.log(MOST / 0.9)
