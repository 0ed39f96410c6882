"""What was measured, as tables for the terminal. A load is requests in flight, or begun a second (`/s`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from perf.attribution import PARTS
from perf.budgets import QUANTILES
from perf.rounds import Case, Results
from perf.verdict import BoundVerdict

_STYLE = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def latencies(results: Results) -> Table:
    """One row a case: what the client saw."""
    return _cases(results, "requests a second, and milliseconds", ("throughput", *QUANTILES), results.middle)


def parts(results: Results) -> Table:
    """One row a case: where the mean request's time went."""
    return _cases(results, "where the milliseconds of the mean request go", PARTS,
                  lambda case, name: results.parts(case).get(name))  # fmt: skip


def _cases(results: Results, title: str, names: Sequence[str], figure: Callable[[Case, str], float | None]) -> Table:
    several = len({case.release for case in results.cases}) > 1
    table = Table(title=title, title_justify="left")
    for header in ("release",) * several + ("endpoint", "load"):
        table.add_column(header)
    for name in names:
        table.add_column("req/s" if name == "throughput" else name, justify="right")
    for case in results.cases:
        shown = ["" if value is None else f"{value:.1f}" for value in (figure(case, name) for name in names)]
        table.add_row(*(case.release,) * several, case.endpoint, case.load.short, *shown)
    return table


def verdicts(found: Sequence[BoundVerdict]) -> Table:
    """One row a bound; where there is more to say, below it."""
    table = Table(title="bounds, with 95 % intervals", title_justify="left")
    for header in ("endpoint", "load", "bound", "measured", ""):
        table.add_column(header)
    for each in found:
        outcome = Text(each.outcome, _STYLE[each.outcome]) + Text(each.note and f": {each.note}", "default")
        table.add_row(each.endpoint, each.load.short, each.limit, each.interval, outcome)
    return table
