"""Budgets beside what was measured: pass, fail, or inconclusive where the noise is larger than the margin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.budgets import Budget, Comparison
from perf.confidence import Interval, Outcome
from perf.load import Load
from perf.rounds import Case, Results, Run, unmeasured

KEPT_RATE = 0.9
"""Share of a request rate that must be answered, or the latencies are those of a server that falls behind."""

_LEAST_REQUESTS = {"p50": 2, "p95": 20, "p99": 100}
"""In a round, so that the quantile is no more than its slowest request."""


@dataclass(frozen=True)
class BoundVerdict:
    """One bound: on what (`p95`) of which endpoint under which load, in which unit, and whether it holds.

    `measured` is missing where nothing could be; `note` says why the outcome is not the interval's.
    """

    release: str
    endpoint: str
    load: Load
    what: str
    unit: str
    at_most: bool
    bound: float
    measured: Interval | None
    outcome: Outcome
    note: str = ""

    @property
    def limit(self) -> str:
        """The bound for people: `p95 ≤ 300 ms`."""
        return f"{self.what} {'≤' if self.at_most else '≥'} {self.bound:g}{self.unit and ' '}{self.unit}"

    @property
    def interval(self) -> str:
        """What was measured for people: `280 (260 to 301)`."""
        m = self.measured
        return f"{_short(m.middle)} ({_short(m.low)} to {_short(m.high)})" if m else ""


def of_budget(budget: Budget, release: str, results: Results) -> Iterator[BoundVerdict]:
    """One verdict for each bound that a budget gives, and one for its request rate."""
    runs = results.of(Case(release, budget.endpoint, budget.load))
    judge = _Judge(release, budget.endpoint, budget.load, (runs,))
    for name, bound in budget.quantiles.items():
        yield judge(name, "ms", True, bound, [getattr(run, name) for run in runs], _LEAST_REQUESTS[name])
    if budget.of_limit is not None:
        shares = [run.throughput / limit for run, limit in zip(runs, results.limits, strict=True)]
        yield judge("of limit", "", False, budget.of_limit, shares)
    if budget.request_rate is not None:
        yield judge("rate", "/s", False, KEPT_RATE * budget.request_rate, [run.throughput for run in runs])


def of_comparison(comparison: Comparison, release: str, base: str, results: Results) -> Iterator[BoundVerdict]:
    """One verdict for each bound, on the ratios of `release` to `base` round by round."""
    mine, theirs = (results.of(Case(name, comparison.endpoint, comparison.load)) for name in (release, base))
    judge = _Judge(f"{release} / {base}", comparison.endpoint, comparison.load, (mine, theirs))
    for name, bound in comparison.quantiles.items():
        yield judge(f"{name} ratio", "", True, bound, _ratios(mine, theirs, name), _LEAST_REQUESTS[name])
    if comparison.throughput is not None:
        yield judge("req/s ratio", "", False, comparison.throughput, _ratios(mine, theirs, "throughput"))


def _ratios(mine: Sequence[Run], theirs: Sequence[Run], name: str) -> list[float]:
    base = {run.round: getattr(run, name) for run in theirs}
    return [getattr(run, name) / base[run.round] if base[run.round] else float("nan") for run in mine]


@dataclass(frozen=True)
class _Judge:
    release: str
    endpoint: str
    load: Load
    runs: tuple[list[Run], ...]

    def __call__(
        self, what: str, unit: str, at_most: bool, bound: float, values: list[float], least_requests: int = 1
    ) -> BoundVerdict:
        every = [run for runs in self.runs for run in runs]
        failed = sum((Counter(run.failed) for run in every), Counter[str]())
        fewest = min(run.requests for run in every)
        measured, note = None, ""
        outcome: Outcome = "fail"
        if all(value > 0 for value in values):  # NaN is not
            measured = Interval.of_rounds(values)
            outcome = measured.is_at_most(bound) if at_most else measured.is_at_least(bound)
        if lacking := " and ".join(filter(None, map(unmeasured, self.runs))):
            outcome, note = "inconclusive", lacking
        elif failed:
            (reason, _), *_ = failed.most_common(1)
            outcome, note = "fail", f"{failed.total()} requests failed: {reason}"
        elif measured is None:
            note = "in a round nothing was answered"
        elif fewest < least_requests:
            outcome = "inconclusive"
            note = f"needs {least_requests} requests a round, there were {fewest}: lengthen --seconds"
        return BoundVerdict(self.release, self.endpoint, self.load, what, unit, at_most, bound, measured, outcome, note)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
