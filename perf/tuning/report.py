"""What was tried, as a table and as a plot of throughput against latency."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from export.config import Serving
from perf.tuning.choice import Budget, Trial, front
from perf.tuning.space import difference

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 760, 460, 70, 50, 30


def describe(serving: Serving, present: Serving) -> str:
    """The settings that differ from the present ones, in words."""
    changes = difference(serving, present)
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "the present settings"


def table(trials: Sequence[Trial], present: Serving, budget: Budget, stages: Mapping[Serving, str]) -> Table:
    """One row for each settings tried, in the order given; a star marks the Pareto front.

    Throughput (with the range of its rounds) and latency stand there as measured, and as multiples of the present ones.
    """
    figure = budget.figure
    result = Table(title=f"tried; budget: {budget}", title_justify="left")
    result.add_column("settings", ratio=1, overflow="fold")
    for header in ("measured", "req/s", "throughput", f"{figure} ms", figure, "budget"):
        result.add_column(header, justify="left" if header == "measured" else "right", no_wrap=True)
    best = front(trials, figure)
    for trial in trials:
        settings, stage = describe(trial.serving, present), stages[trial.serving]
        if not trial.rounds:
            result.add_row(f"{settings}: {trial.error}", stage, *[""] * 4, "failed")
            continue
        result.add_row(
            f"{'* ' if trial in best else ''}{settings}",
            stage,
            f"{trial.median('throughput'):.1f}",
            str(trial.ratio("throughput")),
            f"{trial.median(figure):.0f}",
            f"{trial.ratio(figure).middle:.2f}",
            "kept" if budget.is_met(trial) else "missed",
        )
    return result


def plot(trials: Sequence[Trial], present: Serving, budget: Budget, winner: Serving | None, path: Path) -> None:
    """Write an SVG: a point for each settings tried, the Pareto front as a line, the budget as another one.

    A point is the ratio to the present settings times what those reached over the whole run: the machine's ups and
    downs are left out. Its colour says whether it kept to the budget as it was measured, those included.
    """
    measured = [trial for trial in trials if trial.rounds]
    if not measured:
        return
    figure = budget.figure
    pairs = [r.present for trial in measured for r in trial.rounds]
    base = (statistics.median(p.throughput for p in pairs), statistics.median(getattr(p, figure) for p in pairs))

    def place(trial: Trial) -> tuple[float, float]:
        return base[0] * trial.ratio("throughput").middle, base[1] * trial.ratio(figure).middle

    points = [place(trial) for trial in measured]
    limit = [(base[0], budget.limit_ms)] if budget.limit_ms else []
    axes = _Axes([base, *points, *limit])
    ends = [place(trial) for trial in front(measured, figure)]
    if not any(rate >= base[0] and latency <= base[1] for rate, latency in ends):
        ends = sorted([*ends, base])
    line = " ".join("{:.1f},{:.1f}".format(*axes.at(*end)) for end in ends)
    parts = [axes.draw("requests a second", f"{figure}, milliseconds")]
    if budget.limit_ms:
        y = axes.at(base[0], budget.limit_ms)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" class="budget"/>')
    parts.append(f'<polyline points="{line}" class="front"/>')
    for trial, point in zip(measured, points, strict=True):
        kind = "winner" if trial.serving == winner else "kept" if budget.is_met(trial) else "missed"
        parts.append(axes.point(point, kind, describe(trial.serving, present)))
    parts.append(axes.point(base, "present", "the present settings"))
    path.write_text(_PAGE.format(width=_WIDTH, height=_HEIGHT, body="\n".join(parts)))


class _Axes:
    """Two linear scales around the points."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._x, self._y = (_span([point[i] for point in points]) for i in (0, 1))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in pixels."""
        right, up = ((v - low) / (high - low) for v, (low, high) in ((x, self._x), (y, self._y)))
        across, tall = _WIDTH - _LEFT - _MARGIN, _HEIGHT - _BOTTOM - _MARGIN
        return _LEFT + right * across, _HEIGHT - _BOTTOM - up * tall

    def draw(self, x_title: str, y_title: str) -> str:
        """Both axes, with five numbers each."""
        parts = []
        for i in range(5):
            x, y = (low + i / 4 * (high - low) for low, high in (self._x, self._y))
            across, up = self.at(x, y)
            parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.0f}</text>')
            parts.append(f'<text x="{_LEFT - 8}" y="{up + 4:.1f}" text-anchor="end">{y:.0f}</text>')
        parts.append(f'<path d="M{_LEFT},{_MARGIN} V{_HEIGHT - _BOTTOM} H{_WIDTH - _MARGIN}" class="axis"/>')
        parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{x_title}</text>')
        parts.append(f'<text x="{_LEFT - 55}" y="{_MARGIN - 12}">{y_title}</text>')
        return "\n".join(parts)

    def point(self, point: tuple[float, float], kind: str, name: str) -> str:
        """A dot with its name, which shows in full where the pointer rests."""
        x, y = self.at(*point)
        label, rate, latency = html.escape(name), *(f"{value:.1f}" for value in point)
        dot = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}"><title>{label}: {rate}, {latency}</title></circle>'
        )
        beside = f'x="{x + 8:.1f}"' if x < _WIDTH / 2 else f'x="{x - 8:.1f}" text-anchor="end"'
        return f'{dot}<text {beside} y="{y - 6:.1f}" class="name">{label}</text>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 1.0
    return low - room, high + 2 * room


_PAGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
text {{ font: 12px sans-serif; fill: #333 }} .name {{ font-size: 10px }}
.axis {{ fill: none; stroke: #333 }} .front {{ fill: none; stroke: #2a6 }}
.budget {{ stroke: #c33; stroke-dasharray: 6 4 }}
.kept {{ fill: #2a6 }} .missed {{ fill: #c33 }} .present {{ fill: #36c }}
.winner {{ fill: #fff; stroke: #2a6; stroke-width: 3 }}
</style>
<rect width="100%" height="100%" fill="#fff"/>
{body}
</svg>
"""
