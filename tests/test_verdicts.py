"""When a bound passes, fails, or is neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perf import verdict
from perf.budgets import Budget, Comparison
from perf.confidence import Interval
from perf.load import Load
from perf.rounds import Case, Results, Run


def runs(release: str, p95: list[float], load: Load = Load(4), **facts: Any) -> list[Run]:  # noqa: B008
    """A round for each value; 100 requests a second, 1000 in each round."""
    figures = {"requests": 1000, "throughput": 100.0, "mean": 10.0, "p50": 10.0, "p99": 90.0} | facts
    return [Run(Case(release, "gateway", load), i, p95=value, **figures) for i, value in enumerate(p95)]


def budget(**bounds: float) -> Budget:
    load = {} if "request_rate" in bounds else {"concurrency": 4}
    return Budget.model_validate({"endpoint": "gateway", **load, **bounds})


def outcomes(of: Budget, measured: list[Run], limits: list[float] | None = None) -> dict[str, str]:
    found = verdict.of_budget(of, "defect-v1", Results(measured, limits or []))
    return {each.what: each.outcome for each in found}


def test_the_interval_is_students_over_logarithms() -> None:
    """Of 10, 20 and 40 the logarithms' mean is log 20, their standard error log 2 / sqrt 3, and t is 4.303."""
    interval = Interval.of_rounds([10, 20, 40])
    assert interval.middle == pytest.approx(20)
    assert interval.high / 20 == pytest.approx(2 ** (4.303 / 3**0.5), rel=1e-3)
    assert interval.low * interval.high == pytest.approx(400)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [([20, 21, 20], "pass"), ([40, 41, 40], "fail"), ([25, 35, 28], "inconclusive"), ([20, 20, 60], "inconclusive")],
)
def test_a_bound_holds_or_breaks_only_with_the_whole_interval(rounds: list[float], expected: str) -> None:
    assert outcomes(budget(p95=30), runs("defect-v1", rounds)) == {"p95": expected}


@pytest.mark.parametrize(("limit", "expected"), [(150.0, "pass"), (250.0, "fail")])
def test_the_share_of_the_limit_is_judged_round_by_round(limit: float, expected: str) -> None:
    measured = runs("defect-v1", [20, 20, 20])
    assert outcomes(budget(of_limit=0.5), measured, [limit, limit * 1.01, limit]) == {"of limit": expected}


def test_a_quantile_of_too_few_requests_is_inconclusive() -> None:
    few = runs("defect-v1", [20, 20, 20], requests=99)
    assert outcomes(budget(p95=30, p99=100), few) == {"p95": "pass", "p99": "inconclusive"}


def test_a_load_whose_requests_fail_fails() -> None:
    measured = runs("defect-v1", [20, 20], failed={"status 503": 1})
    (found,) = verdict.of_budget(budget(p95=30), "defect-v1", Results(measured, []))
    assert (found.outcome, found.note) == ("fail", "2 requests failed: status 503")


def test_a_round_without_an_answer_fails() -> None:
    nothing = runs("defect-v1", [float("nan")] * 2, requests=0)
    assert outcomes(budget(p95=30), nothing) == {"p95": "fail"}


def test_what_a_busy_machine_kept_from_being_measured_is_inconclusive() -> None:
    measured = runs("defect-v1", [20, 20])
    measured += [replace(measured[0], round=2, p95=float("nan"), requests=0, unmeasured="no request was answered")]
    (found,) = verdict.of_budget(budget(p95=30), "defect-v1", Results(measured, []))
    assert (found.outcome, found.measured) == ("inconclusive", None)
    assert found.note == "not measured in 1 of 3 rounds, no request was answered"
    compared = Comparison(endpoint="gateway", concurrency=4, p95=1.2)
    for names in (("defect-v1", "defect-v2"), ("defect-v2", "defect-v1")):
        results = Results(measured + runs("defect-v2", [20, 20, 20]), [])
        (found,) = verdict.of_comparison(compared, *names, results)
        assert (found.outcome, found.note) == ("inconclusive", "not measured in 1 of 3 rounds, no request was answered")


@pytest.mark.parametrize(("throughput", "expected"), [(100.0, "pass"), (80.0, "fail")])
def test_a_rate_that_is_not_kept_fails(throughput: float, expected: str) -> None:
    measured = runs("defect-v1", [20, 20], Load(request_rate=100), throughput=throughput)
    assert outcomes(budget(p95=30, request_rate=100), measured) == {"p95": "pass", "rate": expected}


@pytest.mark.parametrize(("slower", "expected"), [(1.0, "pass"), (1.1, "pass"), (1.3, "fail")])
def test_releases_are_compared_within_a_round(slower: float, expected: str) -> None:
    """Rounds that differ by a factor of three do not matter where both releases share them."""
    base = [20.0, 60.0, 31.0]
    measured = runs("defect-v1", base) + runs("defect-v2", [value * slower for value in base])
    comparison = Comparison(endpoint="gateway", concurrency=4, p95=1.2)
    (found,) = verdict.of_comparison(comparison, "defect-v2", "defect-v1", Results(measured, []))
    assert found.outcome == expected
    assert found.measured is not None and found.measured.middle == pytest.approx(slower)
