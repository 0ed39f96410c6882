"""A load on the gateway over HTTP, cheap enough to share the machine with what it measures.

Keep-alive connections, requests written as ready-made bytes, answers read later. Closed loop: each connection sends
when it was answered. Open loop: requests are due at random times, whether or not earlier ones were answered, and
latency counts from when a request was due, so that a server which stalls cannot hide the requests that it kept waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import mimetypes
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from perf.load import Load

_PATIENCE_S = 30.0


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


def request(url: str, picture: Path) -> bytes:
    """The bytes of one POST of a picture to `url`."""
    parts = urlsplit(url)
    body = picture.read_bytes()
    kind = mimetypes.guess_type(picture.name)[0] or "image/unknown"
    head = f"POST {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def drive(url: str, pictures: Sequence[Path], load: Load, *, seconds: float, warm_up: float = 0.5) -> Answered:
    """Post the pictures in turn to `url` for `warm_up` and then `seconds`, of which the latter count."""
    return asyncio.run(_Drive(url, pictures, seconds, warm_up).run(load))


class _Connection:
    """A connection that is opened when it is needed, again after a failure."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError, EOFError or TimeoutError."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                if self._streams and self._streams[0].at_eof():
                    self.close()  # the server closed an idle connection
                if self._streams is None:
                    self._streams = await asyncio.open_connection(*self._address)
                reader, writer = self._streams
                writer.write(request)
                status, *headers = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
                lengths = [line for line in headers if line.lower().startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0].partition(b":")[2]))
                if b"connection: close" in map(bytes.lower, headers):
                    self.close()
                return int(status.split()[1]), body
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass(frozen=True)
class _Reply:
    """One request: since when somebody waited, when its answer was there (seconds), and the answer or the failure."""

    since: float
    done: float
    body: bytes = b""
    failure: str = ""


class _Drive:
    def __init__(self, url: str, pictures: Sequence[Path], seconds: float, warm_up: float) -> None:
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._requests = itertools.cycle([request(url, picture) for picture in pictures])
        self._seconds, self._warm_up = seconds, warm_up
        self._replies: list[_Reply] = []

    async def run(self, load: Load) -> Answered:
        begin = time.perf_counter() + self._warm_up
        end = begin + self._seconds
        if load.request_rate:
            await self._open_loop(load.request_rate, begin)
            counted = [reply for reply in self._replies if reply.since >= begin]
            end = max([end, *(reply.done for reply in counted)])  # what comes late makes the rate no better
        else:
            await asyncio.gather(*(self._closed_loop(end) for _ in range(load.concurrency or 0)))
            counted = [reply for reply in self._replies if begin <= reply.done < end]
        good = [reply for reply in counted if not reply.failure]
        return Answered(
            seconds=end - begin,
            latencies=[1e3 * (reply.done - reply.since) for reply in good],
            answers=[json.loads(reply.body) for reply in good],
            failed=Counter(reply.failure for reply in counted if reply.failure),
        )

    async def _closed_loop(self, end: float) -> None:
        connection = _Connection(self._host, self._port)
        while (now := time.perf_counter()) < end:
            await self._ask(connection, now)
        connection.close()

    async def _open_loop(self, rate: float, begin: float) -> None:
        idle: list[_Connection] = []

        async def ask(due: float) -> None:
            connection = idle.pop() if idle else _Connection(self._host, self._port)
            await self._ask(connection, due)
            idle.append(connection)

        async with asyncio.TaskGroup() as asked:
            for due in self._arrivals(rate, begin):
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asked.create_task(ask(due))
        for connection in idle:
            connection.close()

    def _arrivals(self, rate: float, begin: float) -> Iterable[float]:
        """A Poisson process given how many come: independent of each other, and exactly the rate asked for."""
        chance = random.Random(0)  # noqa: S311 - the same arrivals in every round
        for start, length in ((begin - self._warm_up, self._warm_up), (begin, self._seconds)):
            yield from sorted(start + length * chance.random() for _ in range(round(rate * length)))

    async def _ask(self, connection: _Connection, since: float) -> None:
        body, failure = b"", ""
        try:
            status, body = await connection.post(next(self._requests))
            if status != 200:
                failure = f"status {status}: {body[:200].decode(errors='replace')}"
        except (OSError, EOFError) as error:
            failure = f"{type(error).__name__} {error}".strip()
        self._replies.append(_Reply(since, time.perf_counter(), body, failure))
