"""What was measured, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from perf.attribution import PARTS
from perf.budgets import QUANTILES
from perf.rounds import Results
from perf.verdict import Verdict

_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def cases(results: Results) -> Table:
    """One row a case: what the client saw, and where the mean request's time went."""
    table = Table(title="milliseconds, means of the rounds", title_justify="left")
    for header in ("", "", "load", "req/s", *QUANTILES, *PARTS):
        table.add_column(header, justify="left" if header in ("", "load") else "right", no_wrap=True)
    for case in results.cases:
        parts = results.parts(case)
        figures = [results.middle(case, name) for name in ("throughput", *QUANTILES)]
        shown = ["" if value is None else f"{value:.1f}" for value in (*figures, *map(parts.get, PARTS))]
        table.add_row(case.release, case.endpoint, str(case.load), *shown)
    return table


def verdicts(found: Sequence[Verdict]) -> Table:
    """One row a bound, and a second one where there is more to say."""
    table = Table(title="bounds", title_justify="left")
    for header in ("", "", "load", "", "bound", "measured", "95 % interval", ""):
        table.add_column(header, justify="right" if header in ("bound", "measured") else "left")
    for each in found:
        middle, interval = "", ""
        if each.measured:
            middle, interval = f"{each.measured.middle:.3g}", f"{each.measured.low:.3g} to {each.measured.high:.3g}"
        outcome = f"[{_STYLE[each.outcome]}]{each.outcome}[/]"
        table.add_row(each.release, each.endpoint, str(each.load), each.what, each.limit, middle, interval, outcome)
        if each.note:
            table.add_row(*[""] * 7, escape(each.note))
    return table
