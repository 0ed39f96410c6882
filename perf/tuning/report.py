"""What was tried, as a table and as a plot of throughput against latency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from export.config import Serving
from perf import plots
from perf.tuning.choice import LatencyBudget, Trial, front
from perf.tuning.space import difference


def describe(serving: Serving, present: Serving) -> str:
    """The settings that differ from the present ones, in words."""
    changes = difference(serving, present)
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "the present settings"


def table(trials: Sequence[Trial], present: Serving, budget: LatencyBudget, stages: Mapping[Serving, str]) -> Table:
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


def plot(trials: Sequence[Trial], present: Serving, budget: LatencyBudget, winner: Serving | None, path: Path) -> None:
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
    across, up = (_span([point[i] for point in (base, *points, *limit)]) for i in (0, 1))
    axes = plots.Axes(across, up, width=760, height=460)
    ends = [place(trial) for trial in front(measured, figure)]
    if not any(rate >= base[0] and latency <= base[1] for rate, latency in ends):
        ends = sorted([*ends, base])
    parts = axes.draw(f"{figure}, milliseconds", "requests a second")
    if budget.limit_ms:
        parts.append(plots.line([axes.at(each, budget.limit_ms) for each in (across[0], across[-1])], 'class="budget"'))
    parts.append(plots.line([axes.at(*end) for end in ends], 'class="front"'))
    for trial, point in zip(measured, points, strict=True):
        kind = "winner" if trial.serving == winner else "kept" if budget.is_met(trial) else "missed"
        parts += _dot(axes, point, kind, describe(trial.serving, present))
    parts += _dot(axes, base, "present", "the present settings")
    plots.write(path, plots.svg("throughput and latency", axes.width, axes.height, parts, _STYLE))


def _dot(axes: plots.Axes, point: tuple[float, float], kind: str, name: str) -> list[str]:
    """A dot and its name beside it."""
    x, y = axes.at(*point)
    is_left = x < axes.width / 2
    return [
        plots.dot(x, y, f'r="5" class="{kind}"', f"{name}: {point[0]:.1f}, {point[1]:.1f}"),
        plots.text(x + (8 if is_left else -8), y - 6, name, anchor="start" if is_left else "end"),
    ]


def _span(values: Sequence[float]) -> list[float]:
    """Five numbers, with some room around the values."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 1.0
    low, high = math.floor(low - room), math.ceil(high + 2 * room)
    return [low + i / 4 * (high - low) for i in range(5)]


_STYLE = """
.front { stroke: #2a6 } .budget { stroke: #c33; stroke-dasharray: 6 4 }
.kept { fill: #2a6 } .missed { fill: #c33 } .present { fill: #36c }
.winner { fill: #fff; stroke: #2a6; stroke-width: 3 }
"""
