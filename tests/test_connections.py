"""Clients that are slow, endless or many: each is cut off within its bound, and the others are answered meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.http.connection import MAX_AHEAD, MAX_HEAD, MAX_HEADERS, MAX_PIECES, MAX_TARGET, MIN_PIECE
from tests.conftest import ROOT, GatewayProcess, free_endpoint, free_port, http, wait_for
from tests.raw_http import HEAD, connect, exchange, is_closed, receive
from tests.test_problems import assert_problem

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    limits = {"headers_timeout_s": 1, "body_timeout_s": 1, "send_timeout_s": 1, "max_connections": 20}
    with GatewayProcess(free_endpoint(), tmp_path_factory.mktemp("strict") / "log", **limits) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def nothing_stays_open(strict: GatewayProcess) -> Iterator[None]:
    """After whatever a test did, only the connection that asks is open."""
    yield
    wait_for(lambda: connections(strict) == 1)


def connections(gateway: GatewayProcess) -> int:
    return int(gateway.gauges()["gateway_connections"])


def trickle(connection: socket.socket, data: bytes, seconds: float) -> None:
    """Send a byte now and then, until the other side answers or closes."""
    deadline = time.monotonic() + seconds
    for number in data:
        assert time.monotonic() < deadline, f"still open after {seconds} s"
        with contextlib.suppress(ConnectionError):
            connection.sendall(bytes([number]))
        if select.select([connection], [], [], 0.05)[0]:
            return
    raise AssertionError("all was taken")


def answers(connection: socket.socket) -> int:
    """How many come until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(2**16):
            received += data
    return received.count(b"HTTP/1.1 200")


# ---- slow ----


@pytest.mark.parametrize(
    ("sent", "rest", "code"),
    [
        (b"", GET + b"X: " + b"a" * 1000, "headers_timeout"),
        (GET + b"\r\n", GET + b"X: " + b"a" * 1000, "headers_timeout"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"a" * 1000, "body_timeout"),
        (CHUNKED, b"1\r\na\r\n" * 200, "body_timeout"),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"T: t\r\n" * 200, "body_timeout"),
    ],
    ids=["head", "second head", "body", "chunks", "trailers"],
)
def test_a_client_that_trickles_is_cut_off(strict: GatewayProcess, sent: bytes, rest: bytes, code: str) -> None:
    with connect(strict.port) as connection:
        connection.sendall(sent)
        if sent.startswith(GET):
            assert receive(connection).status_code == 200
        trickle(connection, rest, 5)
        assert_problem(receive(connection), code)
        assert is_closed(connection)


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"], ids=["nothing", "blank lines"])
def test_an_idle_connection_is_closed(strict: GatewayProcess, sent: bytes) -> None:
    with connect(strict.port) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_blank_lines_do_not_keep_a_connection_open(strict: GatewayProcess) -> None:
    with connect(strict.port) as connection:
        connection.sendall(GET + b"\r\n")
        assert receive(connection).status_code == 200
        trickle(connection, b"\r\n" * 200, 5)
        assert is_closed(connection)


def test_a_body_that_nobody_asked_for_does_not_go_on_for_ever(strict: GatewayProcess) -> None:
    with connect(strict.port) as connection:
        connection.sendall(GET + b"Content-Length: 1000000\r\n\r\n")
        assert receive(connection).status_code == 200
        trickle(connection, b"a" * 1000, 5)
        assert is_closed(connection)


def test_a_client_that_takes_no_answers_is_disconnected(strict: GatewayProcess) -> None:
    request = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(strict.port, receive_buffer=4096) as connection:
        connection.sendall(request * 20)
        wait_for(lambda: connections(strict) == 2)
        wait_for(lambda: connections(strict) == 1, 20)


# ---- long ----


def test_the_bounds_of_a_head_are_let_through(strict: GatewayProcess) -> None:
    target = b"/errors/" + b"a" * (MAX_TARGET - 8)
    assert_problem(exchange(strict.port, b"GET " + target + b" HTTP/1.1\r\n\r\n"), "not_found")
    assert_problem(exchange(strict.port, b"GET " + target + b"a HTTP/1.1\r\n\r\n"), "uri_too_long")
    many = b"A: b\r\n" * (MAX_HEADERS - 1)
    assert exchange(strict.port, GET + many + b"\r\n").status_code == 200
    assert_problem(exchange(strict.port, GET + many + b"A: b\r\n\r\n"), "headers_too_large")
    size = MAX_HEAD - len(b"/health/live") - len(b"Host: x\r\n") - len(b"A: \r\n")
    assert exchange(strict.port, GET + b"A: " + b"a" * size + b"\r\n\r\n").status_code == 200
    assert_problem(exchange(strict.port, GET + b"A: " + b"a" * (size + 1) + b"\r\n\r\n"), "headers_too_large")


@pytest.mark.parametrize(
    ("start", "piece", "code"),
    [
        (GET + b"A: ", b"a" * 1000, "headers_too_large"),
        (GET, b"A: b\r\n" * 200, "headers_too_large"),
        (b"GET /", b"a" * 1000, "uri_too_long"),
        (CHUNKED + b"1\r\na\r\n0\r\nT: ", b"a" * 1000, "malformed_request"),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"A: b\r\n" * 200, "malformed_request"),
        (CHUNKED + b"1;", b"a" * 1000, "malformed_request"),
    ],
    ids=["header", "headers", "path", "trailer", "trailers", "chunk extension"],
)
def test_what_has_no_end_is_cut_off(strict: GatewayProcess, start: bytes, piece: bytes, code: str) -> None:
    with connect(strict.port) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(piece)
                time.sleep(0.002)
        assert_problem(receive(connection), code)
        assert is_closed(connection)


def test_a_body_in_tiny_pieces_is_cut_off(strict: GatewayProcess) -> None:
    with connect(strict.port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(CHUNKED + b"1\r\na\r\n" * 20_000)
        answer = receive(connection)
        assert "chunks of less than 64 bytes" in assert_problem(answer, "malformed_request")["detail"]
        assert is_closed(connection)


@pytest.mark.parametrize(("pieces", "size"), [(MAX_PIECES, 1), (5000, 2 * MIN_PIECE)])
def test_a_body_in_small_pieces_is_taken(strict: GatewayProcess, pieces: int, size: int) -> None:
    body = (f"{size:x}\r\n".encode() + bytes(size) + b"\r\n") * pieces + b"0\r\n\r\n"
    assert_problem(exchange(strict.port, CHUNKED + body), "triton_unavailable")


def test_requests_sent_far_ahead_are_not_answered(strict: GatewayProcess) -> None:
    with connect(strict.port) as connection:
        connection.sendall((GET + b"\r\n") * (MAX_AHEAD - 1) + GET + b"Connection: close\r\n\r\n")
        assert answers(connection) == MAX_AHEAD
    with connect(strict.port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall((GET + b"\r\n") * 20_000)
        assert answers(connection) < 10_000
    wait_for(lambda: ended(strict))
    assert "requests are sent ahead" in ended(strict)[0]["detail"]
    metrics = http.get(f"{strict.url}/metrics").text
    assert 'gateway_requests_total{code="malformed_request",path="unknown",status="none"} 1.0' in metrics


def ended(gateway: GatewayProcess) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "connection ended"]


# ---- many ----


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with room for four, all of which wait for the rest of what they ask."""
    with GatewayProcess(free_endpoint(), tmp_path_factory.mktemp("full") / "log", max_connections=4) as gateway:
        yield gateway


def begin(gateway: GatewayProcess, stack: contextlib.ExitStack) -> socket.socket:
    """Send all but the last byte of a request."""
    connection = stack.enter_context(connect(gateway.port))
    connection.sendall(HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 100 "), "it is being read"
    connection.sendall(b"x")
    return connection


def test_one_connection_too_many_is_refused_and_the_others_and_health_are_not(full: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        busy = [begin(full, stack) for _ in range(4)]
        refused = http.post(f"{full.url}/v1/predict", content=b"x")
        assert_problem(refused, "too_many_connections")
        assert refused.headers["Connection"] == "close"
        for path in ("/health/live", "/version", "/metrics"):
            assert http.get(f"{full.url}{path}").status_code == 200
        beyond = [stack.enter_context(connect(full.port)) for _ in range(5)]
        assert is_closed(beyond[-1])
        for connection in busy:
            connection.sendall(b"x")
            assert_problem(receive(connection), "triton_unavailable")
    wait_for(lambda: connections(full) == 1)


def test_the_connection_that_is_unused_longest_makes_room(full: GatewayProcess) -> None:
    def is_admitted() -> bool:
        answer = http.post(f"{full.url}/v1/predict", content=b"x", headers={"Content-Type": "image/png"})
        return answer.json()["type"].endswith("triton_unavailable")

    with contextlib.ExitStack() as stack:
        silent, first, second, third = [stack.enter_context(connect(full.port)) for _ in range(4)]
        for connection in (first, second, third):
            connection.sendall(GET + b"\r\n")
            assert receive(connection).status_code == 200
        wait_for(is_admitted)
        assert is_closed(silent)
        begin(full, stack)  # in its place
        wait_for(is_admitted)
        assert is_closed(first)
        for connection in (second, third):
            connection.sendall(GET + b"\r\n")
            assert receive(connection).status_code == 200
    wait_for(lambda: connections(full) == 1)


def test_there_may_be_as_many_open_files_as_connections(tmp_path: Path) -> None:
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2100))}
    command, environment = [sys.executable, "-m", "gateway"], {**os.environ, "GATEWAY_PORT": str(free_port())}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, **limits) as gateway:
        assert gateway.stdout is not None
        assert b"starting" in gateway.stdout.readline()
        assert resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE) == (2100, 2100)
        gateway.terminate()
        assert gateway.wait(timeout=60) == 0, "a signal that comes while it starts is not lost"
    environment["GATEWAY_MAX_CONNECTIONS"] = "1001"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, **limits)
    assert run.stderr == "gateway: GATEWAY_MAX_CONNECTIONS=1001: needs 2102 open files, allowed are 2100\n"
