"""Which settings win: ratios to the present settings, a latency budget, and noise. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from export.config import Serving
from perf.analyzer import Measurement

Figure = Literal["throughput", "p95", "p99"]


@dataclass(frozen=True)
class Round:
    """Two measurements, one right after the other."""

    tried: Measurement
    present: Measurement


@dataclass(frozen=True)
class MedianRange:
    """A median, and the least and the greatest of its values."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> MedianRange:
        """Of n rounds it holds the true median with a probability of 1 - 2**(1-n), however they are distributed."""
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Trial:
    """Settings that were measured in turns with the present ones; `error` says why they could not be."""

    serving: Serving
    rounds: tuple[Round, ...]
    error: str = ""

    def ratio(self, figure: Figure) -> MedianRange:
        """A figure as a multiple of what the present settings reached in the same round."""
        return MedianRange.of([getattr(r.tried, figure) / getattr(r.present, figure) for r in self.rounds])

    def median(self, figure: Figure) -> float:
        """Requests a second, or milliseconds."""
        return float(statistics.median(getattr(r.tried, figure) for r in self.rounds))


@dataclass(frozen=True)
class LatencyBudget:
    """What latency may be. Without a limit: not worse than with the present settings, as far as noise lets one say."""

    figure: Literal["p95", "p99"] = "p99"
    limit_ms: float | None = None

    def is_met(self, trial: Trial) -> bool:
        """Whether a trial kept to it."""
        if self.limit_ms is None:
            return trial.ratio(self.figure).low <= 1
        return trial.median(self.figure) <= self.limit_ms

    def is_met_at_present(self, trials: Iterable[Trial]) -> bool:
        """Whether the present settings kept to it, in the rounds of these trials."""
        if self.limit_ms is None:
            return True
        latencies = [getattr(r.present, self.figure) for trial in trials for r in trial.rounds]
        return bool(statistics.median(latencies) <= self.limit_ms)

    def __str__(self) -> str:
        limit = "no worse than at present" if self.limit_ms is None else f"at most {self.limit_ms:g} ms"
        return f"{self.figure} {limit}"


def ranked(trials: Iterable[Trial], budget: LatencyBudget) -> list[Trial]:
    """What kept to the budget before what did not; the faster one first, and without the budget the prompter one."""

    def rank(trial: Trial) -> tuple[bool, float]:
        kept = budget.is_met(trial)
        return not kept, -trial.ratio("throughput").middle if kept else trial.ratio(budget.figure).middle

    return sorted((trial for trial in trials if trial.rounds), key=rank)


def front(trials: Sequence[Trial], figure: Literal["p95", "p99"]) -> list[Trial]:
    """The Pareto front: those that neither another one nor the present settings beat in both, by rising throughput."""
    points = [(trial, trial.ratio("throughput").middle, trial.ratio(figure).middle) for trial in trials if trial.rounds]
    all_points = [(1.0, 1.0), *((rate, latency) for _, rate, latency in points)]
    best = [
        (rate, trial)
        for trial, rate, latency in points
        if not any(r >= rate and t <= latency and (r, t) != (rate, latency) for r, t in all_points)
    ]
    return [trial for _, trial in sorted(best, key=lambda each: each[0])]


def decide(finals: Sequence[Trial], budget: LatencyBudget) -> tuple[Serving | None, str]:
    """The settings that replace the present ones, None where those stay; and why.

    To replace them, others must keep to the budget and be faster in every round of the final; where the present ones
    do not keep to it, lower latency in every round is enough.
    """
    keeping = [trial for trial in ranked(finals, budget) if budget.is_met(trial)]
    if not keeping:
        return None, f"nothing in the final kept to the budget ({budget}): the present settings stay"
    if not budget.is_met_at_present(finals):
        for trial in keeping:
            latency = trial.ratio(budget.figure)
            if latency.high < 1:
                return trial.serving, f"keeps to the budget, which the present settings miss: {budget.figure} {latency}"
        return None, "no latency in the final is lower beyond the noise: the present settings stay"
    for trial in keeping:
        throughput = trial.ratio("throughput")
        if throughput.low > 1:
            return trial.serving, f"faster in every round, within the budget ({budget}): throughput {throughput}"
    best = keeping[0].ratio("throughput")
    return None, f"nothing is faster beyond the noise (the best: throughput {best}): the present settings stay"
