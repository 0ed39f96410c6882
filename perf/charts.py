"""Two kinds of chart as SVG: lines over numbers, and stacked bars. Small, so that the report needs no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
"""Okabe and Ito's, told apart by colour-blind readers too."""

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 28, 44


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float, str]]]) -> str:
    """A line for each series of (x, y, label); the labels of the last series stand above its points."""
    points = [point for each in series.values() for point in each]
    x_ticks, y_ticks = _ticks(max(x for x, _, _ in points)), _ticks(max(y for _, y, _ in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / x_ticks[-1] * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / y_ticks[-1] * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_text(_LEFT, 16, title, "title")]
    for tick in y_ticks:
        (left, y), (right, _) = place(0, tick), place(x_ticks[-1], tick)
        parts += [_line(left, y, right, y, "grid"), _text(left - 6, y + 4, f"{tick:g}", "end")]
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts += [_line(x, y, x, y + 4, "axis"), _text(x, y + 17, f"{tick:g}", "middle")]
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, x_name, "end"))
    parts.append(_text(_LEFT, _HEIGHT - 8, y_name))
    for i, (name, each) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        placed = [place(x, y) for x, y, _ in each]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value, label) in zip(placed, each, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>'
                f"{escape(f'{name}, {label}: {value:.1f}')}</title></circle>"
            )
            if i == len(series) - 1:
                parts.append(_text(x, y - 8, label, "middle"))
        parts.append(_text(_WIDTH - _RIGHT - 44 * (len(series) - 1 - i), 16, name, "end", colour))
    return _svg(title, _WIDTH, _HEIGHT, parts)


def bars(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each label, its parts beside each other, all rows to the same scale."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    ticks = _ticks(max(sum(parts.values()) for parts in rows.values()))
    width, left, bar = 2 * _WIDTH, 220, 22
    height = _TOP + 24 + len(rows) * (bar + 8) + 28
    scale = (width - left - 70) / ticks[-1]
    parts = [_text(0, 16, title, "title")]
    for i, name in enumerate(names):
        x = left + 110 * i
        parts.append(f'<rect x="{x}" y="{_TOP}" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(_text(x + 17, _TOP + 11, name))
    for j, (label, values) in enumerate(rows.items()):
        y, at = _TOP + 24 + j * (bar + 8), float(left)
        parts.append(_text(left - 8, y + 15, label, "end"))
        for name, value in values.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(
                f'<rect x="{at:.1f}" y="{y}" width="{value * scale:.1f}" height="{bar}" fill="{colour}"><title>'
                f"{escape(f'{label}, {name}: {value:.2f} {unit}')}</title></rect>"
            )
            at += value * scale
        parts.append(_text(at + 6, y + 15, f"{sum(values.values()):.1f}"))
    for tick in ticks:
        parts.append(_text(left + tick * scale, height - 10, f"{tick:g}", "middle"))
    parts.append(_text(width - 4, height - 10, unit, "end"))
    return _svg(title, width, height, parts)


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, four to seven of them."""
    rough = max(largest, 1e-9) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough)
    return [round(i * step, 10) for i in range(math.ceil(largest / step) + 1)]


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", colour: str = "") -> str:
    fill = f' fill="{colour}"' if colour else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{fill}>{escape(text)}</text>'
