"""The time that a request has, and what ends it early: a client that left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from gateway.errors import Failure
from gateway.settings import Settings

HEADER = "X-Timeout-Ms"

OPENAPI_PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1, "maximum": 3_600_000},
    "description": "Milliseconds that an answer is of use for, from the request's head on; capped by the service.",
    "example": 800,
}


def deadline(request: Request, settings: Settings) -> float:
    """When the answer is of no use any more, in monotonic seconds.

    Raises:
        Failure: invalid_request.
    """
    text = request.headers.get(HEADER)
    if text is None:
        return float(request.state.started) + settings.deadline_s
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 7 and 1 <= int(text) <= 3_600_000):
        raise Failure("invalid_request", f"{HEADER}: expected whole milliseconds from 1 to 3600000")
    return float(request.state.started) + min(int(text) / 1000, settings.max_deadline_s)


@contextlib.asynccontextmanager
async def ended_by_leaving(request: Request) -> AsyncIterator[None]:
    """Cancel this block when the client closes its connection. The body must have been read.

    Raises:
        Failure: client_gone.
    """
    worker = asyncio.current_task()
    assert worker is not None
    has_left = False

    async def listen() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        worker.cancel()

    listener = asyncio.create_task(listen())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left or worker.uncancel():
            raise
        raise Failure("client_gone", "the connection was closed") from None
    finally:
        listener.cancel()
