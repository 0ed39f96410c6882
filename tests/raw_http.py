"""HTTP by hand: what a well-behaved client library would never send."""

from __future__ import annotations

import http.client
import socket

import httpx

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    return connection


def receive(connection: socket.socket) -> httpx.Response:
    """One answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


def exchange(port: int, *pieces: bytes) -> httpx.Response:
    """Send bytes as they are; the answer to them."""
    with connect(port) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return receive(connection)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed; waits for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
