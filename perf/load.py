"""A load: so many requests in flight, or so many begun a second; and one on the gateway, over HTTP.

Closed loop: each connection sends when it was answered. Open loop: requests are due at random times, whether or not
earlier ones were answered, and latency counts from when a request was due, so that a server which stalls cannot hide
the requests that it kept waiting.
"""

from __future__ import annotations

import json
import mimetypes
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from harness.load import Sender, post

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Load:
    """Exactly one of the two: `concurrency` requests in flight at any time, or `request_rate` begun a second."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        return self.short if self.request_rate else f"{self.short} in flight"

    @property
    def short(self) -> str:
        """For tables: `16` in flight, `10/s`."""
        return f"{self.request_rate:g}/s" if self.request_rate else str(self.concurrency)


@dataclass(frozen=True)
class Answered:
    """A load's answers in `seconds`: latencies in milliseconds, the answers' JSON, and failures by their reason."""

    seconds: float
    latencies: list[float]
    answers: list[dict]
    failed: Counter[str]

    @property
    def throughput(self) -> float:
        """Requests answered a second."""
        return len(self.latencies) / self.seconds


def drive(url: str, pictures: Sequence[Path], load: Load, *, seconds: float, warm_up: float = 0.5) -> Answered:
    """Post the pictures in turn to `url` for `warm_up` and then `seconds`, of which the latter count."""
    parts = urlsplit(url)
    requests = [
        post(parts.netloc, f"{parts.path}?{parts.query}", picture.read_bytes(), f"Content-Type: {kind_of(picture)}")
        for picture in pictures
    ]
    sender = Sender(parts.hostname or "", parts.port or 80, requests, _PATIENCE_S)
    end = warm_up + seconds
    if load.request_rate:
        replies = sender.open(_arrivals(load.request_rate, warm_up, seconds))
        counted = [reply for reply in replies if reply.due >= warm_up]
        end = max([end, *(reply.done for reply in counted)])  # what comes late makes the rate no better
    else:
        counted = [reply for reply in sender.closed(load.concurrency or 0, end) if warm_up <= reply.done < end]
    good = [reply for reply in counted if reply.status == 200]
    return Answered(
        seconds=end - warm_up,
        latencies=[1e3 * (reply.done - reply.due) for reply in good],
        answers=[json.loads(reply.body) for reply in good],
        failed=Counter(
            f"status {reply.status}: {reply.text[:200]}" if reply.status else reply.text
            for reply in counted
            if reply.status != 200
        ),
    )


def kind_of(picture: Path) -> str:
    """The media type that a picture's name says."""
    return mimetypes.guess_type(picture.name)[0] or "image/unknown"


def _arrivals(rate: float, warm_up: float, seconds: float) -> Iterator[float]:
    """A Poisson process given how many come: independent of each other, and exactly the rate asked for."""
    chance = random.Random(0)  # noqa: S311 - the same arrivals in every round
    for start, length in ((0.0, warm_up), (warm_up, seconds)):
        yield from sorted(start + length * chance.random() for _ in range(round(rate * length)))
