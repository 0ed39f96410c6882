"""Deadlines, clients that leave, and more requests than can be answered: through the gateway, on a real Triton."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from gateway.carried import Carried, Disconnect
from gateway.http.deadline import TIMEOUT_HEADER, Bounded
from gateway.http.middleware import RequestContext
from gateway.metrics import Metrics
from gateway.problems import Failure
from perf.generator import Generator
from perf.overload import share_kept
from tests.conftest import EXAMPLES, GatewayProcess, free_endpoint, http, wait_for
from tests.test_dispatch import inferred
from tests.test_problems import IMAGE, assert_problem
from triton_runtime.server import Endpoint, TritonServer


def head(length: int, timeout_ms: int) -> bytes:
    lines = ("POST /v1/predict HTTP/1.1", "Host: x", "Content-Type: image/jpeg", f"Content-Length: {length}")
    return "\r\n".join([*lines, f"{TIMEOUT_HEADER}: {timeout_ms}", "", ""]).encode()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "1e3", "soon", "", "3600001", "99999999", "²"])
def test_a_timeout_that_is_none_is_refused(client: httpx.Client, jpeg: bytes, value: str) -> None:
    headers = [(b"Content-Type", b"image/jpeg"), (TIMEOUT_HEADER.encode(), value.encode())]
    assert_problem(client.post("/v1/predict", content=jpeg, headers=headers), "invalid_request")


def test_what_cannot_be_met_is_a_typed_error(client: httpx.Client, jpeg: bytes) -> None:
    assert client.post("/v1/predict", content=jpeg, headers={**IMAGE, TIMEOUT_HEADER: "30000"}).status_code == 200
    hopeless = {**IMAGE, TIMEOUT_HEADER: "2"}
    answers = [client.post("/v1/predict", content=jpeg, headers=hopeless) for _ in range(50)]
    codes = {answer.json()["code"] for answer in answers}
    # On a busy machine the body itself may take longer; now and then one is let in, and finds that it is so.
    assert codes - {"body_timeout", "deadline_exceeded"} == {"overloaded"}


@pytest.mark.parametrize(("asked", "cap", "expected"), [(400, 30, 0.4), (3_600_000, 0.6, 0.6)])
def test_the_time_counts_from_the_head_and_has_a_cap(
    triton: Endpoint, tmp_path: Path, asked: int, cap: float, expected: float
) -> None:
    with (
        GatewayProcess(triton, tmp_path / "log", max_deadline_s=cap) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection,
    ):
        started = time.monotonic()
        connection.sendall(head(5000, asked) + b"\xff\xd8")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert expected - 0.01 <= time.monotonic() - started < 10  # timers may round down


def test_server_timing_adds_up(client: httpx.Client, jpeg: bytes) -> None:
    header = client.post("/v1/predict", content=jpeg, headers=IMAGE).headers["Server-Timing"]
    parts = {name: float(value) for name, value in (entry.split(";dur=") for entry in header.split(", "))}
    assert list(parts) == ["read", "admit", "queue", "preprocess", "infer", "postprocess", "total"]
    assert sum(parts.values()) - parts["total"] == pytest.approx(parts["total"], abs=0.1)


@pytest.mark.parametrize("more", [0, 400_000], ids=["small", "large"])
def test_clients_that_leave_cost_triton_nothing(
    gateway: GatewayProcess, triton: Endpoint, jpeg: bytes, more: int
) -> None:
    jpeg += bytes(more)  # which belongs to no picture, and harms none
    wait_for(gateway.is_at_rest)
    before = inferred(triton, "classifier")
    connections = [socket.create_connection(("127.0.0.1", gateway.port), timeout=30) for _ in range(100)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda each: each.sendall(head(len(jpeg), 30_000) + jpeg), connections))
    for connection in connections:
        connection.close()
    wait_for(gateway.is_at_rest)
    assert inferred(triton, "classifier") - before < 60
    assert '"code": "client_gone"' in gateway.log.read_text()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("ending", ["client_gone", "deadline_exceeded"])
def test_work_that_was_ended_leaves_nothing_in_memory(ending: str) -> None:
    """At once, as in `test_a_picture_is_let_go_of_with_its_request`."""
    disconnect = Disconnect()
    request = Request({"type": "http", "state": {}})
    Carried(disconnect).put_into(request.scope)
    there: weakref.ref[Disconnect] | None = None

    async def work() -> None:
        nonlocal there
        picture = Disconnect()  # anything that can be watched
        there = weakref.ref(picture)
        with Bounded(request, 0.05 if ending == "deadline_exceeded" else None, lambda: Failure(ending, "late")):
            asyncio.get_running_loop().call_later(0.1, disconnect.happen)
            await asyncio.sleep(60)

    async def main() -> None:
        code = ""
        try:
            await work()
        except Failure as failure:
            code = failure.code
        assert code == ending
        await asyncio.sleep(0)  # asyncio itself keeps what it woke the task with until the task waits again
        assert there is not None and there() is None

    asyncio.run(main())


@pytest.mark.usefixtures("without_collector")
def test_a_body_that_breaks_off_leaves_nothing_in_memory() -> None:
    """Likewise."""
    scope: Scope = {"type": "http", "method": "POST", "path": "/", "scheme": "http", "headers": [], "state": {}}
    there: weakref.ref[Disconnect] | None = None
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal there
        chunk = Disconnect()  # anything that can be watched
        there = weakref.ref(chunk)
        await receive()

    async def receive() -> Message:
        Carried.of(scope).refusal = Failure("malformed_request", "the body has no end")
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(RequestContext(app, Metrics())(scope, receive, send))
    assert sent[0]["status"] == 400
    assert there is not None and there() is None


@pytest.fixture(scope="module")
def narrow(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A Triton whose steps let one call wait."""
    root = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("narrow") / "model_repository"))
    for file in root.glob("defect_*/config.pbtxt"):
        text = file.read_text()
        limited = text.replace("dynamic_batching {", "dynamic_batching {\n  default_queue_policy { max_queue_size: 1 }")
        assert limited != text
        file.write_text(limited)
    with TritonServer(root, free_endpoint()) as server:
        server.wait_until_ready()
        yield server.endpoint


def test_a_full_queue_in_triton_is_overload(narrow: Endpoint, jpeg: bytes, tmp_path: Path) -> None:
    """Two gateways do not know of each other: Triton's queue is what they share."""
    with (
        GatewayProcess(narrow, tmp_path / "one", deadline_s=30, group=1) as one,
        GatewayProcess(narrow, tmp_path / "two", deadline_s=30, group=1) as two,
        ThreadPoolExecutor(48) as pool,
    ):
        for gateway in (one, two):
            wait_for(gateway.is_ready)

        refused: list[httpx.Response] = []

        def ask_until_answered(number: int) -> httpx.Response:
            gateway = (one, two)[number % 2]
            while True:
                response = http.post(f"{gateway.url}/v1/predict", content=jpeg, headers=IMAGE, timeout=60)
                if response.status_code != 503:
                    return response
                refused.append(response)
                time.sleep(0.1)  # in earnest it would be what Retry-After says

        answered = list(pool.map(ask_until_answered, range(96)))
        assert {response.status_code for response in answered} == {200}
        for response in refused:
            assert_problem(response, "overloaded")
            assert int(response.headers["Retry-After"]) >= 1
        assert any("the queue of a step is full" in response.json()["detail"] for response in refused)
        for gateway in (one, two):
            wait_for(gateway.is_at_rest)
            assert "replica suspected" not in gateway.log.read_text()


def test_overload_is_refused_early_and_the_rest_is_answered(triton: Endpoint, tmp_path: Path) -> None:
    pictures = [path.read_bytes() for path in EXAMPLES]
    deadline_s = 1.0
    with GatewayProcess(triton, tmp_path / "log", log_level="error") as gateway:
        wait_for(gateway.is_ready)
        patient = Generator("127.0.0.1", gateway.port, pictures, 30.0)
        patient.closed(16, 1)
        capacity = patient.closed(16, 3)
        three = Generator("127.0.0.1", gateway.port, pictures, deadline_s).open(3 * capacity.goodput, 4)
        wait_for(gateway.is_at_rest)
        assert set(three.codes) <= {"overloaded", "deadline_exceeded"}
        assert three.codes["overloaded"] > 0.1 * three.offered
        assert sorted(three.refused_s)[len(three.refused_s) // 2] < deadline_s / 4
        assert share_kept([{"capacity": capacity, "3x": three}] * 2).middle > 0.3
        assert gateway.gauges()["gateway_calls_limit"] <= 16
