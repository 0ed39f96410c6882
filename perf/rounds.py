"""Everything that is to be measured, in turns, round after round: what a busy machine does to one it does to all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import contract
from contract import Manifest
from export.repository import Repository
from perf import attribution, steps
from perf.analyzer import WINDOWS, Analyzer, NothingMeasured
from perf.bench.contenders import limit
from perf.load import Load, drive
from perf.serving import Endpoints

_BATCHES = (1, 4, 8)


@dataclass(frozen=True)
class Case:
    """A release's endpoint under a load."""

    release: str
    endpoint: str
    load: Load


@dataclass(frozen=True)
class Run:
    """A case in one round: requests a second, and milliseconds.

    `parts` divide the mean; `answers` are the means of the answers' own `timing_ms`. Both may be empty. `failed` counts
    requests by the reason why they were not answered. Latencies are of those that were, NaN where there is none.
    `unmeasured` is why there are no figures, where the machine was too busy for the measurement.
    """

    case: Case
    round: int
    requests: int
    throughput: float
    mean: float
    p50: float
    p95: float
    p99: float
    parts: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    unmeasured: str = ""


@dataclass(frozen=True)
class Results:
    """Every run, and the limit of the machine in pictures a second, round by round (empty: it was not asked for)."""

    runs: list[Run]
    limits: list[float]

    @property
    def cases(self) -> list[Case]:
        """What was measured, in its order."""
        return list(dict.fromkeys(run.case for run in self.runs))

    def of(self, case: Case) -> list[Run]:
        """A case's runs, a round each."""
        return [run for run in self.runs if run.case == case]

    def middle(self, case: Case, name: str) -> float | None:
        """The geometric mean of a figure over the rounds; None where nothing was answered in one."""
        values = [getattr(run, name) for run in self.of(case)]
        return statistics.geometric_mean(values) if all(value > 0 for value in values) else None

    def unmeasured(self, case: Case) -> str:
        """In how many rounds a case could not be measured, and why; empty where it could be in all."""
        return unmeasured(self.of(case))

    def parts(self, case: Case) -> dict[str, float]:
        """The parts of the mean request over the rounds; empty where nothing was answered."""
        return _mean([run.parts for run in self.of(case) if run.parts])

    def answers(self, case: Case) -> dict[str, float]:
        """The same of what the answers say of themselves."""
        return _mean([run.answers for run in self.of(case) if run.answers])


def unmeasured(runs: Sequence[Run]) -> str:
    """Which share of the rounds has no figures, and why; empty where all have."""
    reasons = [run.unmeasured for run in runs if run.unmeasured]
    return f"not measured in {len(reasons)} of {len(runs)} rounds, {reasons[0]}" if reasons else ""


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each key."""
    return {name: statistics.mean(each[name] for each in found) for name in (found[0] if found else ())}


@dataclass(frozen=True)
class Plan:
    """What is measured: `cases` in this order, for `seconds` each, in every one of `rounds`."""

    cases: Sequence[Case]
    rounds: int
    seconds: float
    with_limit: bool

    @property
    def measurements(self) -> int:
        """How often something is measured."""
        return self.rounds * (len(self.cases) + self.with_limit) + self.with_limit * len(_BATCHES)


class Rounds:
    """Measures a plan on what is running.

    Args:
        releases: the releases of the plan; the limit is that of the first.
        say: told what is measured next, before each measurement.
    """

    def __init__(
        self,
        serving: Endpoints,
        repository: Repository,
        releases: Sequence[Manifest],
        pictures: Sequence[Path],
        say: Callable[[str], None],
    ) -> None:
        self._serving, self._repository, self._say = serving, repository, say
        self._releases = {release.name: release for release in releases}
        self._pictures = list(pictures)

    def measure(self, plan: Plan) -> Results:
        """Every case once a round; two releases under the same load directly after each other, in alternating order.

        Raises:
            PerfError: something could not be measured.
        """
        results = Results([], [])
        with ExitStack() as stack:
            self._analyzer = stack.enter_context(Analyzer(self._serving.triton.grpc_url))
            self._inputs = {
                (release.name, endpoint): self._analyzer.store(f"{release.name}-{endpoint}", rows)
                for release in self._releases.values()
                for endpoint, rows in steps.inputs(self._repository, release, self._pictures).items()
            }
            batch = self._best_batch(plan.seconds) if plan.with_limit else 0
            for number in range(plan.rounds):
                place = f"round {number + 1} of {plan.rounds}"
                if plan.with_limit:
                    self._say(f"{place}: the limit of the machine")
                    results.limits.append(self._limit(batch, plan.seconds))
                for case in plan.cases if number % 2 == 0 else _pairs_swapped(plan.cases):
                    self._say(f"{place}: {case.release}, {case.endpoint}, {case.load}")
                    results.runs.append(self._run(case, number, plan.seconds))
        return results

    def _run(self, case: Case, number: int, seconds: float) -> Run:
        release = self._releases[case.release]
        before = attribution.snapshot(self._serving.triton, release, case.endpoint)
        run = (self._over_http if case.endpoint == "gateway" else self._over_grpc)(case, number, seconds)
        if run.unmeasured:
            return run
        after = attribution.snapshot(self._serving.triton, release, case.endpoint)
        return replace(run, parts=attribution.parts(run.mean, before, after))

    def _over_grpc(self, case: Case, number: int, seconds: float) -> Run:
        release = self._releases[case.release]
        model, version = release.name, None
        if case.endpoint in contract.STEPS:
            model = contract.step_model(release.pipeline, case.endpoint)
            version = release.steps[case.endpoint].version
        try:
            m = self._analyzer.run(
                model,
                self._inputs[case.release, case.endpoint],
                case.load,
                version=version,
                interval_ms=round(1000 * seconds / WINDOWS),
            )
        except NothingMeasured as error:
            nothing = float("nan")
            return Run(case, number, 0, nothing, nothing, nothing, nothing, nothing, unmeasured=str(error))
        return Run(case, number, round(m.throughput * m.seconds), m.throughput, m.mean, m.p50, m.p95, m.p99)

    def _over_http(self, case: Case, number: int, seconds: float) -> Run:
        url = self._serving.predict_url(case.release)
        answered = drive(url, self._pictures, case.load, seconds=seconds)
        times = [answer["timing_ms"] for answer in answered.answers]
        latencies = answered.latencies or [float("nan")]
        p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
        return Run(
            case,
            number,
            len(answered.latencies),
            answered.throughput,
            statistics.mean(latencies),
            float(p50),
            float(p95),
            float(p99),
            answers=_mean(times),
            failed=dict(answered.failed),
        )

    def _limit(self, batch: int, seconds: float) -> float:
        release = next(iter(self._releases.values()))
        preprocess, classifier = (
            self._repository.step_folder(release.pipeline, step, release.steps[step].version)
            for step in ("preprocess", "classifier")
        )
        files = preprocess / "preprocessing.py", classifier / "model.onnx"
        return limit.measure(*files, self._pictures, batch=batch, seconds=seconds)

    def _best_batch(self, seconds: float) -> int:
        rates = {}
        for batch in _BATCHES:
            self._say(f"the limit of the machine: batches of {batch}")
            rates[batch] = self._limit(batch, min(seconds, 2.0))
        return max(rates, key=rates.__getitem__)


def _pairs_swapped(cases: Sequence[Case]) -> list[Case]:
    """Of each group of cases that differ by release alone, the last one first."""
    groups: dict[tuple[str, Load], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.endpoint, case.load), []).append(case)
    return [case for group in groups.values() for case in reversed(group)]
