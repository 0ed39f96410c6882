"""What uvicorn asks of a connection, done better.

The head of a response and its body, which it writes one after the other, go out together; and a connection is not
closed while the other side is still sending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Joined:
    """A transport that sends every other write at once, together with the one before it: one system call for both.

    What no second one comes for is sent when the event loop goes on. Before it is closed `linger` is asked, once:
    where it is true, whoever gave it closes the connection later.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        linger: Callable[[], bool] = lambda: False,
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._linger = linger
        self._is_closed = False
        self._held = b""

    def write(self, data: bytes) -> None:
        """Send `data` with what was held, or hold it."""
        if self._held:
            self._held += data
            self._flush()
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send what was written, then close: later, if the other side is still sending and this is the first time."""
        was_closed, self._is_closed = self._is_closed, True
        self._flush()
        if was_closed or not self._linger():
            self._transport.close()

    def finish(self) -> None:
        """Send what was written, then close."""
        self._is_closed = True
        self.close()

    def is_closing(self) -> bool:
        """Whether it was closed, or is about to be."""
        return self._is_closed or self._transport.is_closing()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's own."""
        return getattr(self._transport, name)
