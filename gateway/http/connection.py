"""One HTTP connection, bounded: what uvicorn leaves open to a client that is slow, endless, or speaks no HTTP.

An offer to go on with another protocol is ignored, as HTTP lets a server do: the parser alone would end the request
there, before its body.

Uvicorn bounds neither the size of a request's head nor the time that it takes, lets trailers into the headers, and
answers what it cannot read in plain text. Here each of these is a `Failure` that takes the way of every other: it is
left in what the request carries (`Carried.refusal`), and answered, counted and logged there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from array import array
from typing import Any, NoReturn, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.auth.middleware import is_open
from gateway.carried import Carried, Disconnect
from gateway.http.coalescing import Joined
from gateway.http.draining import Draining
from gateway.metrics import Metrics
from gateway.problems import Failure
from gateway.settings import Settings

MAX_HEAD = 16 * 1024
"""Bytes of a request line with its headers; likewise of what is neither head nor body (trailers, chunk extensions)."""
MAX_TARGET = 4 * 1024
"""Bytes of a request's path with its query."""
MAX_HEADERS = 100
MAX_PIECES, MIN_PIECE = 1000, 64
"""Pieces of a body in what is read from a connection at once; more must be so many bytes on average. A read brings up
to 256 KB, with a chunk for each byte 43,000 pieces, and nothing else happens meanwhile."""
LINGER_S, LINGER_BODIES = 5.0, 4
"""A connection that is to be closed while a body still comes is kept for so long without anything, and what comes is
dropped, as much as so many of the largest bodies: closing at once would reset it, and who is still sending would never
see the answer."""
SPARED_S = 1.0
"""A connection without a request is not ended for another one before it was idle for so long: a request may be on
its way."""
MAX_AHEAD = 100
"""Requests that are sent before the one in front of them was answered; each is parsed at once, and kept."""
logger = logging.getLogger("gateway.connection")
_UNREADABLE = "it cannot be read as HTTP/1.1"


def bounded(settings: Settings, metrics: Metrics, draining: Draining) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one of for each connection."""
    attributes = {"settings": settings, "metrics": metrics, "draining": draining}
    return type("BoundedConnection", (Connection,), attributes)


def reserve_files(settings: Settings) -> None:
    """Have this process be allowed as many open files as there may be connections, and some.

    Raises:
        ValueError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * settings.max_connections + 100
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"GATEWAY_MAX_CONNECTIONS={settings.max_connections}: needs {needed} open files, allowed are {hard}"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Parser(HttpRequestParser):
    """Reads a request that offers another protocol as it would be without the offer.

    `Upgrade: h2c` is what Java's HttpClient and `curl --http2` send with each first request. The parser takes what
    comes after such a head for the other protocol; so it is given the head once more, and then the body.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._head_without_offer = connection.head_without_offer

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Read on."""
        while True:
            try:
                return super().feed_data(data)
            except HttpParserUpgrade as offer:
                data = memoryview(data)[offer.args[0] :]
                super().feed_data(self._head_without_offer())

    def offers_upgrade(self) -> bool:
        """Whether the request that was begun offers another protocol."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"


class Connection(HttpToolsProtocol):
    """A connection; made by uvicorn."""

    parser: _Parser

    settings: Settings
    metrics: Metrics
    draining: Draining

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self.url = b""
        self._has_begun = False  # a request, of which not everything is there
        self._in_head = True
        self._idle_bytes = 0  # since the last progress: a head, a piece of a body, or a request that is complete
        self._timer: asyncio.TimerHandle | None = None
        self._is_broken = False
        self._lingers_until: float | None = None
        self._fault = _UNREADABLE
        self._pieces = self._piece_bytes = 0  # of bodies, in what was read last
        self._disconnect = Disconnect()
        self._idle_since = time.monotonic()
        self._is_one_too_many = False

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection that never sends anything is not kept either."""
        super().connection_made(cast(asyncio.Transport, Joined(transport, self.loop, self._linger)))
        self.metrics.connections.inc()
        if len(self.connections) > self.settings.max_connections and not self._make_room():
            self._is_one_too_many = True
            if len(self.connections) > 2 * self.settings.max_connections:
                transport.abort()  # refusing politely has its price, too
                return
        milliseconds = int(self.settings.send_timeout_s * 1000)
        with contextlib.suppress(OSError):  # it has left already
            # The kernel gives up on a client that is gone, or takes nothing of its answers.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        self.metrics.connections.dec()
        super().connection_lost(exc)
        self._disconnect.happen()

    def data_received(self, data: bytes) -> None:
        """Read on, within the bounds. One call brings a bounded piece, so only what comes in many is counted here."""
        if self._lingers_until is not None:
            self._idle_bytes += len(data)
            self._linger_on(self._lingers_until)
        if self._is_broken:
            return
        self._pieces = self._piece_bytes = 0
        self._idle_bytes += len(data)
        counted = self._idle_bytes
        super().data_received(data)
        if self._is_broken:
            return
        if self._in_head and self._idle_bytes and self._timer is None:
            self._start_timer()
        if self._idle_bytes == counted > MAX_HEAD:
            self._refuse(_too_long(self.url) if self._in_head else Failure("malformed_request", "the body has no end"))

    # ---- called by the parser ----

    def on_message_begin(self) -> None:
        """A request begins."""
        if len(self.pipeline) >= MAX_AHEAD:
            self._stop(f"more than {MAX_AHEAD} requests are sent ahead")
        super().on_message_begin()
        Carried(self._disconnect).put_into(self.scope)
        self._has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. A trailer is none: what a header decides was decided before the body."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete: begin to answer."""
        if self.parser.offers_upgrade():
            return  # it comes once more
        if self.parser.should_upgrade():
            self._stop("CONNECT is for proxies")
        self._in_head, self._idle_bytes = False, 0
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        refusal = None
        if len(self.url) > MAX_TARGET or size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            refusal = _too_long(self.url)
        self.url = self.url[:MAX_TARGET]
        super().on_headers_complete()
        if self.draining.has_begun:
            self.cycle.keep_alive = False  # with which the answer says `Connection: close`
        path, root = self.scope["path"], self.settings.root_path
        if root and path.startswith(f"{root}/"):
            self.scope["path"] = path[len(root) :]
        if self._is_one_too_many and not is_open(self.scope["path"]):
            self.cycle.keep_alive = False
            refusal = Failure("too_many_connections", f"the limit is {self.settings.max_connections:,}")
        if refusal:
            Carried.of(self.scope).refusal = refusal  # the task that answers was made just now, and has not run yet

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._idle_bytes = 0
        self._pieces += 1
        self._piece_bytes += len(body)
        if self._pieces > MAX_PIECES and self._piece_bytes < self._pieces * MIN_PIECE:
            self._stop(f"the body comes in chunks of less than {MIN_PIECE} bytes")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete. Its answer has a reader as long as the connection is there, so that is watched.

        Uvicorn stops reading at a large piece of a body until more of it is asked for: never, after the last one.
        """
        if self.parser.offers_upgrade():
            return
        self._has_begun, self._in_head, self._idle_bytes = False, True, 0
        self._stop_timer()
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()

    # ---- called by uvicorn ----

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser cannot read."""
        self._refuse(Failure("malformed_request", self._fault))

    def on_response_complete(self) -> None:
        """A request was answered. What is still missing of it has as long as a head."""
        self._idle_since = time.monotonic()
        super().on_response_complete()
        if not self._in_head and self._timer is None and not self.transport.is_closing():
            self._start_timer()

    def shutdown(self) -> None:
        """The gateway is being stopped. Over TLS an idle client would be waited for until it says goodbye."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(1, self.transport.abort)

    # ---- ours ----

    def head_without_offer(self) -> bytes:
        """The head that was read last, but for what offers another protocol."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    @property
    def _is_idle(self) -> bool:
        """Whether nothing was asked that is still to be answered, or to be sent."""
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and self._in_head and not self._has_begun and not self.transport.is_closing()

    def _make_room(self) -> bool:
        """End the connection that was idle longest; returns whether there was one."""
        others = (each for each in self.connections if isinstance(each, Connection) and each is not self)
        idle = min((each for each in others if each._is_idle), key=lambda each: each._idle_since, default=None)
        if idle is None or time.monotonic() - idle._idle_since < SPARED_S:
            return False
        cast(Joined, idle.transport).finish()
        return True

    def _stop(self, fault: str) -> NoReturn:
        """Have the parser stop: whatever it calls may say so, and `send_400_response` is called for it."""
        self._fault = fault
        raise ValueError(fault)

    def _refuse(self, failure: Failure) -> None:
        """Answer with a failure, read nothing more, and close."""
        self._is_broken = True
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            # A request is being answered. If it is complete, what failed is the next one, whose answer has to wait
            # for its turn: closing after this one says enough.
            if self.cycle.more_body:
                Carried.of(self.cycle.scope).refusal = failure
                self.cycle.message_event.set()
            else:
                self.metrics.request("unknown", "none", failure.code, 0.0)
                fields = {"code": failure.code, "detail": str(failure), "sent_ahead": len(self.pipeline) + 1}
                logger.warning("connection ended", extra={"fields": fields})
            self.cycle.keep_alive = False
            return
        super().on_message_begin()
        self.scope |= {"method": "", "path": "", "raw_path": b"", "query_string": b""}
        Carried.of(self.scope).refusal = failure
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.settings.headers_timeout_s, self._time_is_over)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_over(self) -> None:
        self._timer = None
        if self._in_head and self._has_begun:
            self._refuse(Failure("headers_timeout", f"not complete after {self.settings.headers_timeout_s:g} s"))
        else:
            cast(Joined, self.transport).finish()  # nothing was begun, or it was answered long ago

    def _linger(self) -> bool:
        """Whether to read on before closing after an answer: what was asked is still being sent."""
        if not (self._has_begun or self._is_broken):
            return False
        self._is_broken, self._idle_bytes = True, 0
        self._lingers_until = self.loop.time() + self.settings.send_timeout_s
        self.flow.resume_reading()
        if self.transport.can_write_eof():  # not over TLS; there the answer's head alone says that it is over
            self.transport.write_eof()
        self._linger_on(self._lingers_until)
        return True

    def _linger_on(self, until: float) -> None:
        self._stop_timer()
        if self._idle_bytes > LINGER_BODIES * self.settings.max_body_bytes:
            self.transport.abort()
            return
        self._timer = self.loop.call_at(min(until, self.loop.time() + LINGER_S), self.transport.abort)


def _too_long(url: bytes) -> Failure:
    if len(url) > MAX_TARGET:
        return Failure("uri_too_long", f"the limit is {MAX_TARGET:,} bytes")
    return Failure("headers_too_large", f"the limit is {MAX_HEAD:,} bytes and {MAX_HEADERS} headers")
