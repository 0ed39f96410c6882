"""What rounds of a noisy measurement allow to say: an interval, and whether a bound holds.

A round is one measurement of everything, so rounds are independent where the requests of one round are not: they share
whatever the machine did meanwhile. The interval is Student's, over the logarithms of the rounds' values, because
latencies and ratios vary by factors and are never negative.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "fail", "inconclusive"]

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % quantiles of Student's t, for 1, 2, ... degrees of freedom; the last one is safe for more."""


@dataclass(frozen=True)
class Interval:
    """The geometric mean of the rounds, and where 95 % of such intervals hold the true value."""

    low: float
    middle: float
    high: float

    @classmethod
    def of_rounds(cls, values: Sequence[float]) -> Interval:
        """The interval of at least two positive values, one a round."""
        logs = [math.log(value) for value in values]
        middle = statistics.mean(logs)
        reach = _STUDENT[min(len(logs) - 1, len(_STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(middle - reach), math.exp(middle), math.exp(middle + reach))

    def is_at_most(self, bound: float) -> Outcome:
        """A bound passes or fails where the whole interval is on one side of it."""
        if self.high <= bound:
            return "pass"
        return "fail" if self.low > bound else "inconclusive"

    def is_at_least(self, bound: float) -> Outcome:
        """As `is_at_most`, the other way."""
        if self.low >= bound:
            return "pass"
        return "fail" if self.high < bound else "inconclusive"
