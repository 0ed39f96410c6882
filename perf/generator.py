"""HTTP load on a gateway, cheap enough to share the machine with it: raw sockets, prepared requests.

Closed: each connection sends its next request once the last was answered, which finds the capacity. Open: requests come
when they come, whether or not earlier ones were answered, as real clients do.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import uvloop

_PATIENCE_S = 10.0
"""For an answer beyond its deadline; what takes longer counts as lost."""


@dataclass
class Load:
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

    def record(self, status: int, body: bytes, seconds: float) -> None:
        """One request ended; status 0: without an answer."""
        if status == 200:
            self.answered_s.append(seconds)
            return
        self.refused_s.append(seconds)
        try:
            self.codes[json.loads(body)["code"] if status else "lost"] += 1
        except (ValueError, KeyError, TypeError):
            self.codes["untyped"] += 1


class _Connection(asyncio.Protocol):
    """One request at a time over a connection that is kept."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def connection_lost(self, _: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result((0, b""))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not self._answer or self._answer.done():
            return
        lines = head.lower().split(b"\r\n")
        lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        if lengths and len(body) >= lengths[0]:
            if b"connection: close" in lines:
                self.close()
            self._answer.set_result((int(head[9:12]), bytes(body)))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection ended, or the patience."""
        assert self._transport is not None
        self._received.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await asyncio.wait_for(self._answer, _PATIENCE_S)
        except TimeoutError:
            self.close()
            return 0, b""

    def close(self) -> None:
        if self._transport:
            self._transport.close()


class Generator:
    """Load on one gateway, with these pictures, each with the same deadline."""

    def __init__(self, host: str, port: int, pictures: Sequence[bytes], deadline_s: float) -> None:
        self._address = host, port
        self._deadline_s = deadline_s
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: image/jpeg\r\n"
            f"X-Timeout-Ms: {round(deadline_s * 1000)}\r\nContent-Length: "
        )
        self._requests = [f"{head}{len(picture)}\r\n\r\n".encode() + picture for picture in pictures]
        self._idle: list[_Connection] = []

    def closed(self, connections: int, seconds: float) -> Load:
        """Each connection one request after the other."""

        async def work() -> Load:
            load = self._load(seconds)
            ends = time.monotonic() + seconds

            async def ask_on() -> None:
                while time.monotonic() < ends:
                    await self._ask(load)

            await asyncio.gather(*(ask_on() for _ in range(connections)))
            return load

        return self._run(work)

    def open(self, rate: float, seconds: float) -> Load:
        """So many requests a second on average, at times that do not depend on each other (Poisson)."""

        async def work() -> Load:
            load = self._load(seconds)
            chance = random.Random(0)  # noqa: S311 - arrivals, no secret
            loop = asyncio.get_running_loop()
            begins = due = loop.time()
            asking = set()
            while due < begins + seconds:
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                task = asyncio.create_task(self._ask(load))
                asking.add(task)
                task.add_done_callback(asking.discard)
                due += chance.expovariate(rate)
            await asyncio.gather(*asking)
            return load

        return self._run(work)

    def _load(self, seconds: float) -> Load:
        return Load(seconds, self._deadline_s)

    def _run(self, work: Callable[[], Awaitable[Load]]) -> Load:
        async def all_of_it() -> Load:
            try:
                return await work()
            finally:
                while self._idle:
                    self._idle.pop().close()

        before = time.process_time()
        load = uvloop.run(all_of_it())
        load.generator_s = time.process_time() - before
        return load

    async def _ask(self, load: Load) -> None:
        request = self._requests[load.offered % len(self._requests)]
        load.offered += 1
        started = time.monotonic()
        try:
            connection = await self._connection()
        except OSError:
            load.record(0, b"", time.monotonic() - started)
            return
        started = time.monotonic()
        status, body = await connection.ask(request)
        load.record(status, body, time.monotonic() - started)
        if connection.is_open:
            self._idle.append(connection)

    async def _connection(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
        return connection
