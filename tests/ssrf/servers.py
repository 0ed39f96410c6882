"""HTTP servers on loopback addresses that count who came, and answer as told, byte by byte."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

Answer = bytes | Callable[[socket.socket], None]
"""Raw bytes of a response, or what to do with the connection."""


def response(body: bytes, *headers: str, status: str = "200 OK", kind: str = "image/jpeg") -> bytes:
    """A complete response; without `kind` it has no content type."""
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        *([f"Content-Type: {kind}"] if kind else []),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Server:
    """Serves `answers` by path on one address; every other path gets `default`. Used as a context manager."""

    def __init__(
        self,
        default: bytes,
        answers: Mapping[str, Answer] | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.default, self.answers, self._tls = default, answers or {}, tls
        self.connections = 0
        self.heads: list[str] = []
        """Request line and headers of every request that was read."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=64)
        self.port = self._listener.getsockname()[1]
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            stream = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            with contextlib.closing(stream):
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (piece := stream.recv(4096)):
                        return
                    head += piece
                self.heads.append(head.decode("latin-1"))
                answer = self.answers.get(self.heads[-1].split(" ")[1], self.default)
                if callable(answer):
                    answer(stream)
                else:
                    stream.sendall(answer)


def drip(first: bytes, piece: bytes, seconds: float) -> Callable[[socket.socket], None]:
    """`first`, then `piece` at an interval, until the client is gone."""

    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            time.sleep(seconds)
            connection.sendall(piece)

    return send
