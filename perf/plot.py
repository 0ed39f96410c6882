"""Line charts as one self-contained SVG, for the figures that this package measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
    "#b8a800",
    "#7a4fbf",
)
"""Okabe and Ito's first, which colour-blind readers can tell apart."""
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 34, 40
_LEGEND = 150


@dataclass(frozen=True)
class Chart:
    """One chart: a line a name. Both axes begin at nothing, unless the points across are named steps.

    Args:
        title: above it.
        across: what is across.
        lines: points by name; across first.
        steps: the values across are placed evenly, in this order.
    """

    title: str
    across: str
    lines: Mapping[str, Points]
    steps: Sequence[float] = ()

    def svg(self, colours: Mapping[str, str]) -> str:
        """The chart as an SVG group of `_WIDTH` x `_HEIGHT`."""
        points = [point for line in self.lines.values() for point in line]
        top = _round_up(max((y for _, y in points), default=1.0))
        widest = max((x for x, _ in points), default=1.0) or 1.0

        def place(x: float, y: float) -> tuple[float, float]:
            share = self.steps.index(x) / max(1, len(self.steps) - 1) if self.steps else x / widest
            return (
                _LEFT + share * (_WIDTH - _LEFT - _RIGHT),
                _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
            )

        parts = [f'<text x="{_LEFT}" y="18" class="title">{escape(self.title)}</text>']
        for i in range(5):
            _, y = place(self.steps[0] if self.steps else 0, top * i / 4)
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 4:g}</text>')
        for x in self.steps or [widest * i / 4 for i in range(5)]:
            parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{x:,.0f}</text>')
        parts.append(
            f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(self.across)}</text>'
        )
        for name, line in self.lines.items():
            placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
            parts.append(f'<polyline points="{placed}" stroke="{colours[name]}"/>')
            if self.steps:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>'
                          for x, y in (place(*point) for point in line)]  # fmt: skip
        return "".join(parts)


def svg(charts: Sequence[Chart], columns: int = 2) -> str:
    """The charts side by side, `columns` in a row, with one legend. The same name has the same colour in each."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width, height = columns * _WIDTH + _LEGEND, max(rows * _HEIGHT, _TOP + 20 * len(names))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text{font:11px sans-serif;fill:#333}.title{font-size:13px;font-weight:bold}.grid{stroke:#e5e5e5}"
        "polyline{fill:none;stroke-width:1.8}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, chart in enumerate(charts):
        parts.append(f'<g transform="translate({i % columns * _WIDTH} {i // columns * _HEIGHT})">')
        parts.append(chart.svg(colours) + "</g>")
    for i, name in enumerate(names):
        x, y = columns * _WIDTH + 10, _TOP + 20 * i
        parts.append(f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
