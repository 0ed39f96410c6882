"""A real TCP proxy that can become a black hole: connections stay open, and nothing passes any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Self

_CHUNK = 65536


class Proxy:
    """Passes connections to `port` of this machine on to `target`. Use as a context manager."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self._is_open = True
        self._connections: list[asyncio.StreamWriter] = []
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_listening.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def swallow(self) -> None:
        """Pass nothing on from now on; close nothing."""
        self._is_open = False

    def open(self) -> None:
        """Pass on what connects from now on. What was swallowed stays lost, as behind a firewall that forgot it."""
        self._is_open = True

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self._is_listening.set()
        await self._ended.wait()
        server.close()
        for writer in self._connections:
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(writer)
        if not self._is_open:
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._connections.append(server_writer)
        with contextlib.suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.gather(self._pass(reader, server_writer), self._pass(server_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if not self._is_open:
                    return  # and never again for this connection
                writer.write(data)
                await writer.drain()
            writer.close()
