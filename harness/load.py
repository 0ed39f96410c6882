"""Many HTTP requests to one server, cheap enough to share the machine with what they load.

Raw connections that are kept, requests as ready-made bytes, answers read later.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, cast

import uvloop


def post(host: str, path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of one POST."""
    lines = (f"POST {path} HTTP/1.1", f"Host: {host}", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode() + body


class Response(NamedTuple):
    """What came back; the lines of its head in small letters."""

    status: int
    head: list[bytearray]
    body: bytes


class Connection(asyncio.Protocol):
    """One request at a time over a connection that is kept."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[Response] | None = None

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be written to."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def connection_lost(self, error: Exception | None) -> None:
        """Whoever waits for an answer gets none."""
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or EOFError("the connection was closed without an answer"))

    def data_received(self, data: bytes) -> None:
        """A piece of an answer, maybe its last one."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not self._answer or self._answer.done():
            return
        lines = head.lower().split(b"\r\n")
        lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        if lengths and len(body) >= lengths[0]:
            if b"connection: close" in lines:
                self.close()
            self._answer.set_result(Response(int(head[9:12]), lines, bytes(body)))

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        assert self._transport is not None
        self._transport.write(data)

    async def ask(self, request: bytes, patience_s: float) -> Response:
        """Send a request, and wait so long for its answer.

        Raises:
            OSError, EOFError: there was none.
        """
        if not self.is_open:
            raise EOFError("the connection was closed")
        self._received.clear()
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self.write(request)
        timer = loop.call_later(patience_s, self.connection_lost, TimeoutError(f"no answer within {patience_s:g} s"))
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Leave, whatever is under way."""
        if self._transport:
            self._transport.abort()


class Pool:
    """Connections to one server: opened where none is idle."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """One that nobody else uses.

        Raises:
            OSError: nobody listens.
        """
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection

    def give(self, connection: Connection) -> None:
        """One that is used no more."""
        if connection.is_open:
            self._idle.append(connection)

    def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop().close()


class Reply(NamedTuple):
    """How a request ended, in seconds since the load began; without an answer, the status is 0, and the body says why.

    It was `due`, its first byte was `sent`, and the last one of the answer was there: `done`.
    """

    due: float
    sent: float
    done: float
    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body."""
        return self.body.decode(errors="replace")


class Sender:
    """Sends requests to one server, in turn and again. An answer that takes longer than `patience_s` is lost."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes], patience_s: float) -> None:
        self._pool = Pool(host, port)
        self._requests = itertools.cycle(requests)
        self._patience_s = patience_s

    def closed(self, connections: int, seconds: float) -> list[Reply]:
        """Each connection sends its next request once the last one was answered, for so many seconds."""
        return self._run(self._closed(connections, seconds))

    def open(self, arrivals: Iterable[float]) -> list[Reply]:
        """Requests are due so many seconds after the begin, whether or not earlier ones were answered."""
        return self._run(self._open(arrivals))

    def _run(self, work: Coroutine[Any, Any, None]) -> list[Reply]:
        self._replies: list[Reply] = []
        self._began = time.monotonic()
        uvloop.run(work)
        return self._replies

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _closed(self, connections: int, seconds: float) -> None:
        async def ask_on() -> None:
            while (now := self._now()) < seconds:
                await self._ask(now)

        await asyncio.gather(*(ask_on() for _ in range(connections)))
        self._pool.close()

    async def _open(self, arrivals: Iterable[float]) -> None:
        async with asyncio.TaskGroup() as asked:
            for due in arrivals:
                if (wait := due - self._now()) > 0:
                    await asyncio.sleep(wait)
                asked.create_task(self._ask(due))
        self._pool.close()

    async def _ask(self, due: float) -> None:
        sent = due
        try:
            connection = await self._pool.take()
            sent = self._now()
            answer = await connection.ask(next(self._requests), self._patience_s)
            self._replies.append(Reply(due, sent, self._now(), answer.status, answer.body))
            self._pool.give(connection)
        except (OSError, EOFError) as error:
            why = f"{type(error).__name__} {error}".strip()
            self._replies.append(Reply(due, sent, self._now(), 0, why.encode()))
