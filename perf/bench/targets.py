"""What the figures are held against: one contender beside another, round by round."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from perf.bench.services import BASE, BENTOML, LITSERVE, MOSEC, PLAIN, STACK, TUNED
from perf.bench.wrk import ContenderRun, WrkLoad

LIMIT, BARE, TRITON = "limit", "bare", "triton"


@dataclass(frozen=True)
class Target:
    """A figure of one contender beside the same figure of another: a bound on their ratio, or on their difference.

    Args:
        contender: whose figure it is.
        against: who else's.
        connections: the loads at which the target holds.
        bound: of the ratio, or of the difference in milliseconds.
        figure: which figure of the two runs.
        at_least: the bound is the least; otherwise it is the most.
        compare: `operator.truediv` or `operator.sub`.
    """

    contender: str
    against: str
    connections: tuple[int, ...]
    bound: float
    figure: Literal["throughput", "p50", "p99"] = "throughput"
    at_least: bool = True
    compare: Callable[[float, float], float] = operator.truediv

    def __str__(self) -> str:
        sign = "-" if self.compare is operator.sub else "/"
        return f"{self.contender} {sign} {self.against}"

    def values(self, runs: list[ContenderRun], load: WrkLoad) -> list[float]:
        """The comparison in each round; empty where one of the two was not measured under this load."""
        figures = {(run.contender, run.round): float(getattr(run, self.figure)) for run in runs if run.load == load}
        rounds = sorted(number for contender, number in figures if contender == self.contender)
        return [
            self.compare(figures[self.contender, number], figures[self.against, number])
            for number in rounds
            if (self.against, number) in figures
        ]

    def verdict(self, values: list[float]) -> str:
        """Met or missed where every round says so, else inconclusive."""
        met = [value >= self.bound if self.at_least else value <= self.bound for value in values]
        return "met" if all(met) else "inconclusive" if any(met) else "missed"


TARGETS = (
    Target(STACK, LIMIT, (16, 64), 0.90),
    Target(STACK, TUNED, (16, 64), 0.92),
    Target(STACK, TUNED, (16, 64), 1.0, "p99", at_least=False),
    *(Target(STACK, other, (16, 64), 1.0) for other in (PLAIN, LITSERVE, BENTOML, MOSEC)),
    Target(STACK, TRITON, (16,), 0.95),
    Target(STACK, TRITON, (1,), 1.0, "p50", at_least=False, compare=operator.sub),
    Target(STACK, BARE, (1,), 1.3, "p50", at_least=False),
)
INT8 = (Target(STACK, BASE, (16, 64), 1.6),)
"""Of an int8 release beside the fp32 release that it was made of."""
REDUCED_DECODE = (Target(STACK, BASE, (4, 16), 4.0),)
"""Of 12-megapixel pictures, beside the same release decoding at full size."""


def table(runs: list[ContenderRun], targets: tuple[Target, ...]) -> Table:
    """Every target that these runs say something about."""
    result = Table(title="targets", title_justify="left")
    for header in ("", "figure", "load", "bound", "median", "range", ""):
        result.add_column(header, no_wrap=bool(header))
    for target, load, values in judged(runs, targets):
        result.add_row(
            str(target),
            "req/s" if target.figure == "throughput" else target.figure,
            f"{load.connections} {load.form}",
            f"{'≥' if target.at_least else '≤'} {target.bound:.2f}{' ms' * (target.compare is operator.sub)}",
            f"{statistics.median(values):.2f}",
            f"{min(values):.2f}..{max(values):.2f}",
            target.verdict(values),
        )
    return result


def judged(runs: list[ContenderRun], targets: tuple[Target, ...]) -> Iterator[tuple[Target, WrkLoad, list[float]]]:
    """Each target under each load that it is for, with its comparison in each round."""
    for target in targets:
        for load in dict.fromkeys(run.load for run in runs):
            if load.connections in target.connections and (values := target.values(runs, load)):
                yield target, load, values
