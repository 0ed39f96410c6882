"""A load on a gateway whose requests have a deadline, and what came back of it."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from harness.load import Reply, Sender, post

_PATIENCE_S = 10.0
"""For an answer beyond its deadline; what takes longer counts as lost."""


@dataclass
class Offered:
    """What was offered and what came back. Seconds are from a request's first byte to its answer's last."""

    seconds: float
    deadline_s: float
    offered: int = 0
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    """Of the problems; `lost` where the connection ended without an answer, `untyped` where it was no problem."""
    generator_s: float = 0.0
    """Processor time that making the load took."""

    @property
    def goodput(self) -> float:
        """Answers within their deadline, a second."""
        return sum(seconds <= self.deadline_s for seconds in self.answered_s) / self.seconds

    @property
    def late(self) -> int:
        """Answers after their deadline."""
        return sum(seconds > self.deadline_s for seconds in self.answered_s)


class Generator:
    """Load on one gateway, with these JPEGs, each with the same deadline."""

    def __init__(self, host: str, port: int, pictures: Sequence[bytes], deadline_s: float) -> None:
        headers = ("Content-Type: image/jpeg", f"X-Timeout-Ms: {round(deadline_s * 1000)}")
        requests = [post(f"{host}:{port}", "/v1/predict", picture, *headers) for picture in pictures]
        self._sender = Sender(host, port, requests, _PATIENCE_S)
        self._deadline_s = deadline_s

    def closed(self, connections: int, seconds: float) -> Offered:
        """Each connection one request after the other, which finds the capacity."""
        return self._offer(seconds, lambda: self._sender.closed(connections, seconds))

    def open(self, rate: float, seconds: float) -> Offered:
        """So many requests a second on average, at times that do not depend on each other (Poisson)."""
        return self._offer(seconds, lambda: self._sender.open(_arrivals(rate, seconds)))

    def _offer(self, seconds: float, send: Callable[[], list[Reply]]) -> Offered:
        before = time.process_time()
        replies = send()
        result = Offered(seconds, self._deadline_s, len(replies), generator_s=time.process_time() - before)
        for reply in replies:
            (result.answered_s if reply.status == 200 else result.refused_s).append(reply.done - reply.sent)
            if reply.status != 200:
                result.codes[_code(reply)] += 1
        return result


def _code(reply: Reply) -> str:
    try:
        return str(json.loads(reply.body)["code"]) if reply.status else "lost"
    except (ValueError, KeyError, TypeError):
        return "untyped"


def _arrivals(rate: float, seconds: float) -> Iterator[float]:
    chance, due = random.Random(0), 0.0  # noqa: S311 - arrivals, no secret
    while due < seconds:
        yield due
        due += chance.expovariate(rate)
