"""The report of a measurement: one HTML file that needs nothing else, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from perf import plots
from perf.attribution import PARTS
from perf.budgets import QUANTILES
from perf.confidence import Outcome
from perf.rounds import Case, Results
from perf.verdict import BoundVerdict

OUTCOMES: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .2em .6em; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums } td:first-child { white-space: nowrap }
.pass { color: #00663f } .fail { color: #b00020; font-weight: bold } .inconclusive { color: #8a5a00; font-weight: bold }
svg { max-width: 100%; height: auto; margin: .5em 0 }
code { background: #f4f4f4; padding: .1em .3em } p.note { color: #555; max-width: 60em }
"""

_METHOD = """Every case is measured once a round, in turns. A figure is the geometric mean of its rounds, its interval
Student's over their logarithms (95 %). A bound passes or fails where the whole interval is on one side of it; else it
is inconclusive, which is neither. A load whose requests fail, fails."""

_ATTRIBUTION = """By Triton's statistics, means. gateway: all outside of Triton, that is the gateway and HTTP (for the
ensemble and the steps, which are asked without a gateway: gRPC). queue: inside of Triton, in no step's run. A step that
runs a batch counts the whole run for each request in it."""


@dataclass(frozen=True)
class Report:
    """All that is known at the end; `facts` are name -> value for people, `command` is what was typed."""

    title: str
    command: str
    facts: Mapping[str, str]
    results: Results
    verdicts: Sequence[BoundVerdict]

    def summary(self) -> str:
        """How many bounds passed, failed, or are neither: `1 fail, 2 inconclusive, 9 pass`."""
        counts = {outcome: sum(v.outcome == outcome for v in self.verdicts) for outcome in OUTCOMES}
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "no bounds"

    def json(self) -> str:
        """Everything, every run included; NaN as null."""
        document = {**asdict(self), "summary": self.summary()}
        return json.dumps(_without_nan(document), indent=1) + "\n"

    def html(self) -> str:
        """The page."""
        body = [
            f"<h1>{escape(self.title)}</h1>",
            f"<p>{self._summary()}</p>",
            _table(None, [(escape(name), escape(value)) for name, value in self.facts.items()]),
            f"<p><code>{escape(self.command)}</code></p>",
            "<h2>Budgets</h2>",
            self._verdicts(),
            _note(_METHOD),
            "<h2>Latency and throughput</h2>",
            *self._curves(),
            "<h2>Where the time goes</h2>",
            self._breakdown(),
            _note(_ATTRIBUTION),
            "<h2>All cases</h2>",
            self._cases(),
            *self._unmeasured(),
        ]
        if answers := self._answers():
            body += ["<h2>What the answers say</h2>", answers, _note("Means of the answers' own timing_ms.")]
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `<name>.html` and `<name>.json`; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        page, data = folder / f"{name}.html", folder / f"{name}.json"
        page.write_text(self.html())
        data.write_text(self.json())
        return page, data

    def _summary(self) -> str:
        worst = next((o for o in OUTCOMES if any(v.outcome == o for v in self.verdicts)), "")
        return f'<span class="{worst}">{escape(self.summary())}</span>'

    def _verdicts(self) -> str:
        rows = []
        for v in self.verdicts:
            cells = (v.release, v.endpoint, str(v.load), v.limit, v.interval)
            outcome = f'<span class="{v.outcome}">{v.outcome}</span> {escape(v.note)}'
            rows.append((*map(escape, cells), outcome))
        return _table(("release", "endpoint", "load", "bound", "measured (95 %)", ""), rows)

    def _curves(self) -> Iterator[str]:
        """For each release, gateway and ensemble: the quantiles over the throughput, a point a level."""
        levels: dict[tuple[str, str], list[Case]] = {}
        for case in self.results.cases:
            if case.load.concurrency and case.endpoint in ("gateway", "ensemble"):
                levels.setdefault((case.release, case.endpoint), []).append(case)
        for (release, endpoint), found in levels.items():
            series: dict[str, list[tuple[float, float]]] = {name: [] for name in QUANTILES}
            marks = []
            for case in sorted(found, key=lambda case: case.load.concurrency or 0):
                x, *ys = (self.results.middle(case, name) for name in ("throughput", *QUANTILES))
                if x is not None:
                    marks.append(str(case.load.concurrency))
                    for points, y in zip(series.values(), ys, strict=True):
                        points.append((x, y or 0.0))
            if marks:
                across = "requests a second, a point for each number in flight"
                yield plots.charts([plots.Chart(f"{release}, {endpoint}, ms", across, series, marks=marks)])

    def _breakdown(self) -> str:
        rows = {_label(case): parts for case in self.results.cases if (parts := self.results.parts(case))}
        return plots.bars("mean request", "ms", rows) if rows else ""

    def _cases(self) -> str:
        rows = []
        for case in self.results.cases:
            parts = self.results.parts(case)
            figures = [self.results.middle(case, name) for name in ("throughput", *QUANTILES)]
            shown = map(_number, (*figures, *map(parts.get, PARTS)))
            rows.append((*map(escape, (case.release, case.endpoint, case.load.short)), *shown))
        return _table(("release", "endpoint", "load", "req/s", *QUANTILES, *PARTS), rows)

    def _unmeasured(self) -> Iterator[str]:
        for case in self.results.cases:
            if why := self.results.unmeasured(case):
                yield _note(f"{_label(case)}: {why}.")

    def _answers(self) -> str:
        said = {case: answers for case in self.results.cases if (answers := self.results.answers(case))}
        rows = [(escape(_label(case)), *map(_number, answers.values())) for case, answers in said.items()]
        return _table(("", *next(iter(said.values()))), rows) if said else ""


def _label(case: Case) -> str:
    return f"{case.release}, {case.endpoint}, {case.load}"


def _number(value: float | None) -> str:
    return "" if value is None else f'<span title="{value!r}">{value:.1f}</span>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(" ".join(text.split()))}</p>'


def _table(headers: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "<tr>" + "".join(f"<th>{escape(header)}</th>" for header in headers) + "</tr>" if headers else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
