"""Lines, bars and points between two axes, as SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Points = Sequence[tuple[float, float]]
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#000000", "#999999", "#b8a800", "#7a4fbf"),
)
"""Okabe and Ito's first, which colour-blind readers can tell apart."""
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 34, 40
_LEGEND = 150
_STYLE = """text{font:11px sans-serif;fill:#333}.title{font-size:13px;font-weight:bold}.grid{stroke:#e5e5e5}
polyline{fill:none;stroke-width:1.8}"""


def svg(title: str, width: float, height: float, parts: Iterable[str], style: str = "") -> str:
    """One picture, to stand in a page."""
    name = escape(title, quote=True)
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{name}">'
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, f"<style>{_STYLE}{style}</style>", background, *parts, "</svg>"]) + "\n"


def write(path: Path, drawn: str) -> None:
    """Write what `svg` drew as a file of its own."""
    path.write_text(drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(points: Iterable[tuple[float, float]], attributes: str) -> str:
    """A line through pixels."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {attributes}/>'


def dot(x: float, y: float, attributes: str, title: str) -> str:
    """A dot that says what it is where the pointer rests."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" {attributes}><title>{escape(title)}</title></circle>'


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, four to seven of them."""
    rough = max(largest, 1e-9) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough)
    return [round(i * step, 10) for i in range(math.ceil(largest / step - 1e-9) + 1)] if largest > 0 else [0.0, 1.0]


@dataclass(frozen=True)
class Axes:
    """Two axes with numbers, from the first one to the last one; `even`: those across have the same distance."""

    across: Sequence[float]
    up: Sequence[float]
    even: bool = False
    width: float = _WIDTH
    height: float = _HEIGHT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in pixels."""
        left, right = self.across[0], self.across[-1]
        share = self.across.index(x) / max(1, len(self.across) - 1) if self.even else (x - left) / (right - left)
        rise = (y - self.up[0]) / (self.up[-1] - self.up[0])
        return (
            _LEFT + share * (self.width - _LEFT - _RIGHT),
            self.height - _BOTTOM - rise * (self.height - _TOP - _BOTTOM),
        )

    def draw(self, title: str, across: str) -> list[str]:
        """The numbers, a line for each of those that go up, what is across, and a title."""
        parts = [text(_LEFT, 18, title, "title")]
        for number in self.up:
            _, y = self.at(self.across[0], number)
            parts.append(f'<line x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(text(_LEFT - 6, y + 4, f"{number:,g}", anchor="end"))
        for number in self.across:
            x, y = self.at(number, self.up[0])
            parts.append(text(x, y + 16, f"{number:,g}", anchor="middle"))
        return [*parts, text((_LEFT + self.width) / 2, self.height - 6, across, anchor="middle")]


@dataclass(frozen=True)
class Chart:
    """One chart: a line a name. Both axes begin at nothing, unless the points across are named steps.

    Args:
        title: above it.
        across: what is across.
        lines: points by name; across first.
        steps: the values across are placed evenly, in this order.
        marks: what stands above the points of the last line.
    """

    title: str
    across: str
    lines: Mapping[str, Points]
    steps: Sequence[float] = ()
    marks: Sequence[str] = ()

    def parts(self, colours: Mapping[str, str]) -> list[str]:
        """The chart, of `_WIDTH` x `_HEIGHT`."""
        points = [point for each in self.lines.values() for point in each]
        across = self.steps or ticks(max((x for x, _ in points), default=1.0))
        axes = Axes(across, ticks(max((y for _, y in points), default=1.0)), bool(self.steps))
        parts = axes.draw(self.title, self.across)
        for name, each in self.lines.items():
            placed = [axes.at(*point) for point in each]
            parts.append(line(placed, f'stroke="{colours[name]}"'))
            if self.steps or self.marks:
                parts += [dot(x, y, f'r="3" fill="{colours[name]}"', f"{name}: {value:.1f}")
                          for (x, y), (_, value) in zip(placed, each, strict=True)]  # fmt: skip
        if self.marks:
            parts += [text(x, y - 8, mark, anchor="middle") for (x, y), mark in zip(placed, self.marks, strict=True)]
        return parts


def charts(drawn: Sequence[Chart], columns: int = 2) -> str:
    """The charts side by side, `columns` in a row, with one legend. The same name has the same colour in each."""
    names = list(dict.fromkeys(name for chart in drawn for name in chart.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    parts = []
    for i, chart in enumerate(drawn):
        place = f"{i % columns * _WIDTH} {i // columns * _HEIGHT}"
        parts.append("".join([f'<g transform="translate({place})">', *chart.parts(colours), "</g>"]))
    for i, name in enumerate(names):
        parts += _key(columns * _WIDTH + 10, _TOP + 20 * i, name, colours[name])
    width, height = columns * _WIDTH + _LEGEND, max(rows * _HEIGHT, _TOP + 20 * len(names))
    return svg(", ".join(chart.title for chart in drawn), width, height, parts)


def bars(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each label, its parts beside each other, all rows to the same scale."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    numbers = ticks(max(sum(parts.values()) for parts in rows.values()))
    width, left, bar = 2 * _WIDTH, 220, 22
    height = _TOP + 24 + len(rows) * (bar + 8) + 28
    scale = (width - left - 70) / numbers[-1]
    parts = [text(0, 16, title, "title")]
    for i, name in enumerate(names):
        parts += _key(left + 110 * i, _TOP + 9, name, COLOURS[i % len(COLOURS)])
    for j, (label, values) in enumerate(rows.items()):
        y, at = _TOP + 24 + j * (bar + 8), float(left)
        parts.append(text(left - 8, y + 15, label, anchor="end"))
        for name, value in values.items():
            place = f'x="{at:.1f}" y="{y}" width="{value * scale:.1f}" height="{bar}"'
            said = f"<title>{escape(f'{label}, {name}: {value:.2f} {unit}')}</title>"
            parts.append(f'<rect {place} fill="{COLOURS[names.index(name) % len(COLOURS)]}">{said}</rect>')
            at += value * scale
        parts.append(text(at + 6, y + 15, f"{sum(values.values()):.1f}"))
    parts += [text(left + number * scale, height - 10, f"{number:,g}", anchor="middle") for number in numbers]
    return svg(title, width, height, [*parts, text(width - 4, height - 10, unit, anchor="end")])


def _key(x: float, y: float, name: str, colour: str) -> list[str]:
    """An entry of a legend."""
    return [f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{colour}"/>', text(x + 18, y, name)]
