"""How many pictures a second each client may send: a token bucket a client, filled at the client's own rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.problems import Failure

_BURST_S = 1.0
"""A client that was quiet may send what this long earns it at once, and one request at least."""


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class Rates:
    """The buckets of all clients. Only named clients have one, so there are as many as there are keys at most."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def spend(self, client: str, rate: float | None) -> None:
        """Take one picture of a client that may send `rate` a second; None: as many as it likes.

        Raises:
            Failure: rate_limited.
        """
        if rate is None:
            self._buckets.pop(client, None)
            return
        bucket = self._filled(client, rate)
        if bucket.tokens < 1:
            raise _limited(client, rate, bucket)
        bucket.tokens -= 1

    def lend(self, client: str, rate: float | None, pictures: int) -> None:
        """Take the other pictures of a request. Those that are not there are lent, and earned back before the next one.

        To one request at a time: else a client would get as much more as it sends requests at once. One that is refused
        here takes nothing more.

        Raises:
            Failure: rate_limited, another request's pictures are not earned back yet.
        """
        if rate is None:
            return
        bucket = self._filled(client, rate)
        if bucket.tokens < 0:
            raise _limited(client, rate, bucket)
        bucket.tokens -= pictures

    def _filled(self, client: str, rate: float) -> _Bucket:
        most, now = max(1.0, rate * _BURST_S), self._now()
        bucket = self._buckets.setdefault(client, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + rate * (now - bucket.filled_at))
        bucket.filled_at = now
        return bucket


def _limited(client: str, rate: float, bucket: _Bucket) -> Failure:
    detail = f"{client} may send {rate:g} pictures a second"
    return Failure("rate_limited", detail, retry_after=math.ceil((1 - bucket.tokens) / rate))
