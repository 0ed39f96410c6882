"""The time that a request has, and what ends its work early: no time left, or a client that left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from starlette.requests import Request

from gateway.carried import Carried
from gateway.problems import Failure
from gateway.settings import Settings

TIMEOUT_HEADER = "X-Timeout-Ms"
TIMEOUT_PARAMETER = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1, "maximum": 3_600_000},
    "description": "Milliseconds that an answer is of use for, from the request's head on; capped by the service.",
    "example": 800,
}


def deadline_of(request: Request, settings: Settings) -> float:
    """When the answer is of no use any more, in monotonic seconds.

    A client that names no time is not held to one while it is still sending: ask again once its request is there.

    Raises:
        Failure: invalid_request.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return time.monotonic() + settings.deadline_s
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 7 and 1 <= int(text) <= 3_600_000):
        raise Failure("invalid_request", f"{TIMEOUT_HEADER}: expected whole milliseconds from 1 to 3600000")
    return Carried.of(request.scope).started + min(int(text) / 1000, settings.max_deadline_s)


class Bounded:
    """`with Bounded(request):` ends the work of this block when the client closes its connection, or the time is over.

    Args:
        request: whose client it is.
        seconds: how long the block may take; None: as long as it likes.
        late: makes what it fails with after that.
        more: asked when the time is over: how many seconds more it may take.

    Raises:
        Failure: client_gone, or the one for the time.
    """

    def __init__(
        self,
        request: Request,
        seconds: float | None = None,
        late: Callable[[], Failure] | None = None,
        more: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._disconnect = Carried.of(request.scope).disconnect
        self._seconds, self._late, self._more = seconds, late, more
        self._timer: asyncio.TimerHandle | None = None
        self._why: Callable[[], Failure] | None = None
        """Makes the failure that the block ended with. A failure that was kept here would be part of a reference cycle:
        it holds the traceback, with the variables of each frame, and so the picture."""

    def __enter__(self) -> Bounded:
        """Begin the block."""
        if self._disconnect.has_happened:
            raise _gone()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._disconnect.then = self._on_disconnect
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self._seconds), self._on_time)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the block; a cancellation that came from here becomes its failure."""
        self._disconnect.then = None
        if self._timer is not None:
            self._timer.cancel()
        if self._why is not None and kind is asyncio.CancelledError and not self._task.uncancel():
            raise self._why() from None

    def _on_disconnect(self) -> None:
        self.end(_gone)

    def _on_time(self) -> None:
        assert self._late is not None
        if (seconds := self._more()) > 0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_time)
        else:
            self.end(self._late)

    def end(self, why: Callable[[], Failure]) -> None:
        """End the block before its time, with what `why` makes."""
        if self._why is None:
            self._why = why
            self._task.cancel()


def _gone() -> Failure:
    return Failure("client_gone", "the connection was closed")
