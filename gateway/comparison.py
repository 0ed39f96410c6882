"""How a release compares with the stable one on the same requests: running figures in bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter
from datetime import datetime, timezone

from gateway.api import schemas
from gateway.triton.client import Inference

_KEPT = 20


class Comparison:
    """One release against one stable release. Nothing grows with the number of requests."""

    def __init__(self, release: str, against: str) -> None:
        self.release = release
        self.against = against
        self.since = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.errors: Counter[str] = Counter()
        self.shed = 0
        self._compared = self._agreed = 0
        self._confusion: dict[str, Counter[str]] = {}
        self._sum = self._max = 0.0
        self._most: list[tuple[tuple[bool, float], int, schemas.Disagreement]] = []

    def add(self, request_id: str, stable: Inference, this: Inference) -> bool:
        """Take in both answers to one request; returns whether the labels agree."""
        expected, found = dict(stable.scores), dict(this.scores)
        difference = max(abs(expected.get(label, 0.0) - found.get(label, 0.0)) for label in {*expected, *found})
        agrees = stable.label == this.label
        self._compared += 1
        self._agreed += agrees
        self._confusion.setdefault(stable.label, Counter())[this.label] += 1
        self._sum += difference
        self._max = max(self._max, difference)
        entry = schemas.Disagreement(
            request_id=request_id, stable=_judgement(stable), this=_judgement(this), difference=round(difference, 7)
        )
        # The counter keeps the heap from comparing entries, and the earlier of two equals in.
        heapq.heappush(self._most, ((not agrees, difference), -self._compared, entry))
        if len(self._most) > _KEPT:
            heapq.heappop(self._most)
        return agrees

    def report(self) -> schemas.Report:
        """The figures until now."""
        return schemas.Report(
            release=self.release,
            against=self.against,
            since=self.since,
            compared=self._compared,
            agreement=round(self._agreed / self._compared, 6) if self._compared else None,
            confusion={label: dict(counts) for label, counts in self._confusion.items()},
            mean_difference=round(self._sum / self._compared, 7) if self._compared else None,
            max_difference=round(self._max, 7) if self._compared else None,
            errors=dict(self.errors),
            shed=self.shed,
            most_disagreeing=[entry for _, _, entry in sorted(self._most, key=lambda item: item[:2], reverse=True)],
        )


class Comparisons:
    """The latest comparison of each release."""

    def __init__(self) -> None:
        self._by_release: dict[str, Comparison] = {}

    def between(self, release: str, stable: str) -> Comparison:
        """The running comparison; a new one where another release was stable until now."""
        comparison = self._by_release.get(release)
        if comparison is None or comparison.against != stable:
            comparison = self._by_release[release] = Comparison(release, stable)
        return comparison

    def forget(self, release: str) -> None:
        """A release is gone."""
        self._by_release.pop(release, None)

    def report(self, release: str) -> schemas.Report:
        """A release's report, an empty one where it was never compared."""
        if release in self._by_release:
            return self._by_release[release].report()
        return Comparison(release, "").report().model_copy(update={"against": None, "since": None})


def _judgement(inference: Inference) -> schemas.Judgement:
    return schemas.Judgement(label=inference.label, confidence=round(inference.confidence, 7))
