"""Every row of the table of errors is provoked on a real gateway, over a real socket.

What a healthy Triton never does, a proxy before it does (tests/tampering.py); a bug in the gateway is put there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.app import create_app
from gateway.auth.api_keys import hash_of
from gateway.problems import PROBLEMS
from gateway.settings import Settings
from tests.conftest import GatewayProcess, free_endpoint, free_port, http, wait_for
from tests.raw_http import HEAD, connect, exchange, receive
from tests.ssrf.servers import Server, drip, response
from tests.tampering import FAULTS, TamperingProxy
from tests.test_preprocessing import bad_pictures
from tests.test_problems import BAD_REQUESTS, IMAGE, assert_problem
from triton_runtime.server import Endpoint

KEY = "a key of the test"


@dataclass(frozen=True)
class Scene:
    """A good gateway, one whose Triton shows faults and that may fetch pictures from `web`, one that is strict and has
    no Triton; and a good picture."""

    good: httpx.Client
    faulty: httpx.Client
    strict: GatewayProcess
    web: str
    jpeg: bytes
    folder: Path
    triton: Endpoint


PLACES = {
    "/page": response(b"<html>", kind="text/html"),
    "/gone": response(b"", status="404 Not Found"),
    "/busy": response(b"", status="503 Service Unavailable"),
    "/never": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.1),
}


def fetching(web: Server, jpeg: bytes) -> dict[str, object]:
    """Settings with which pictures are fetched from `web` and from a bucket."""
    return {
        "deadline_s": 1.5,
        "image_hosts": f"http://127.0.0.1:{web.port},s3://parcels",
        "image_private_networks": "127.0.0.0/8",
        "image_timeout_s": 0.5,
        "max_body_bytes": len(jpeg),
    }


def without_obstore(patch: pytest.MonkeyPatch, folder: Path) -> dict[str, object]:
    """Hide the package from processes that start from now on. No settings."""
    (folder / "obstore.py").write_text("raise ModuleNotFoundError('obstore')")
    patch.setenv("PYTHONPATH", str(folder))
    return {}


@pytest.fixture(scope="module")
def scene(
    triton: Endpoint, client: httpx.Client, jpeg: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("errors")
    key = f'[[keys]]\nclient = "slow"\nsha256 = "{hash_of("slow")}"\nrate = 1\n'
    (folder / "keys.toml").write_text(key)
    limits = {
        "api_keys": f"test:{hash_of(KEY)}",
        "api_keys_file": folder / "keys.toml",
        "max_body_bytes": 2048,
        "body_timeout_s": 0.5,
        "headers_timeout_s": 0.5,
        "max_connections": 4,
    }
    with (
        TamperingProxy(triton) as proxy,
        Server(response(b"x" * (len(jpeg) + 1)), PLACES) as web,
        pytest.MonkeyPatch.context() as patch,
        GatewayProcess(free_endpoint(), folder / "strict.log", **limits) as strict,
        GatewayProcess(
            proxy.endpoint, folder / "faulty.log", **without_obstore(patch, folder), **fetching(web, jpeg)
        ) as faulty,
        httpx.Client(base_url=faulty.url, timeout=30) as to_faulty,
    ):
        wait_for(faulty.is_ready)
        yield Scene(client, to_faulty, strict, f"http://127.0.0.1:{web.port}", jpeg, folder, triton)


def post(scene: Scene, body: bytes, headers: dict[str, str] | None = None, query: str = "") -> httpx.Response:
    return scene.good.post(f"/v1/predict{query}", content=body, headers=IMAGE if headers is None else headers)


def spoilt(scene: Scene, code: str, query: str = "") -> httpx.Response:
    headers = {**IMAGE, "X-Request-ID": code}
    return scene.faulty.post(f"/v1/predict{query}", content=scene.jpeg, headers=headers)


def crashing(scene: Scene) -> httpx.Response:
    """Another picture than the others', which go on being answered."""
    headers = {**IMAGE, "X-Request-ID": "image_crashes_server", "X-Timeout-Ms": "30000"}
    return scene.faulty.post("/v1/predict", content=scene.jpeg[:-1], headers=headers)


def located(scene: Scene, url: str) -> httpx.Response:
    return scene.faulty.post("/v1/predict", json={"image_url": url})


def strict(scene: Scene, head: bytes, *rest: bytes) -> httpx.Response:
    return exchange(scene.strict.port, head + f"X-API-Key: {KEY}\r\n".encode(), *rest)


def hurried(scene: Scene) -> httpx.Response:
    """The last of several requests of a client that may send one a second."""
    for _ in range(3):
        response = exchange(scene.strict.port, HEAD + b"X-API-Key: slow\r\nContent-Length: 1\r\n\r\nx")
    return response


def too_many(scene: Scene) -> httpx.Response:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(scene.strict.port))
        return strict(scene, HEAD, b"\r\n")


def stopped(scene: Scene) -> httpx.Response:
    """A body that takes longer than the gateway has when it is stopped."""
    gateway = GatewayProcess(free_endpoint(), scene.folder / "stopped.log", grace_s=1)
    with gateway, connect(gateway.port) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 "), "it is being read"
        gateway.process.terminate()
        return receive(connection)


def without_store(scene: Scene) -> httpx.Response:
    """An object store that does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
            "ALLOW_HTTP": "true",
            "ACCESS_KEY_ID": "access-key",
            "SECRET_ACCESS_KEY": "secret-key",
            "REGION": "eu-central-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        patch.delenv("PYTHONPATH")  # `without_obstore`
        gateway = GatewayProcess(scene.triton, scene.folder / "store.log", image_hosts="s3://parcels")
    with gateway:
        wait_for(gateway.is_ready)
        return http.post(f"{gateway.url}/v1/predict", json={"image_url": "s3://parcels/a.jpg"}, timeout=60)


def broken(_: Scene) -> httpx.Response:
    """A route with a bug; in this process, over the ASGI interface."""
    app = create_app(Settings())

    @app.get("/errors/bug/report")
    async def bug() -> None:
        raise ZeroDivisionError

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/errors/bug/report")

    return asyncio.run(ask())


CASES: dict[str, Callable[[Scene], httpx.Response]] = {
    "malformed_request": lambda scene: exchange(scene.strict.port, b"\x16\x03\x01\x02"),
    "headers_timeout": lambda scene: strict(scene, HEAD),
    "uri_too_long": lambda scene: strict(scene, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n", b"\r\n"),
    "headers_too_large": lambda scene: strict(scene, HEAD + b"X: " + b"a" * 20_000 + b"\r\n", b"\r\n"),
    "too_many_connections": too_many,
    "shutting_down": stopped,
    "missing_api_key": lambda scene: exchange(scene.strict.port, HEAD + b"\r\n"),
    "invalid_api_key": lambda scene: exchange(scene.strict.port, HEAD + b"X-API-Key: another\r\n\r\n"),
    "not_found": lambda scene: scene.good.get("/nothing"),
    "method_not_allowed": lambda scene: scene.good.get("/v1/predict"),
    "body_too_large": lambda scene: strict(scene, HEAD, b"Content-Length: 5000\r\n\r\n"),
    "body_timeout": lambda scene: strict(scene, HEAD, b"Content-Length: 1000\r\n\r\n"),
    "unknown_release": lambda scene: post(scene, scene.jpeg, query="?model_version=defect-v999"),
    "retired_release": lambda scene: spoilt(scene, "", "?model_version=defect-v8"),
    "release_unavailable": lambda scene: spoilt(scene, "", "?model_version=defect-v9"),
    "triton_unavailable": lambda scene: strict(scene, HEAD, b"Content-Length: 1\r\n\r\nx"),
    "rate_limited": hurried,
    "internal_error": broken,
    "url_invalid": lambda scene: located(scene, f"{scene.web}/a b"),
    "url_not_allowed": lambda scene: located(scene, "https://example.com/a.jpg"),
    "fetch_unsupported": lambda scene: located(scene, f"{scene.web}/page"),
    "fetch_too_large": lambda scene: located(scene, f"{scene.web}/large"),
    "fetch_refused": lambda scene: located(scene, f"{scene.web}/gone"),
    "fetch_failed": lambda scene: located(scene, f"{scene.web}/busy"),
    "fetch_store_failed": without_store,
    "fetch_timeout": lambda scene: located(scene, f"{scene.web}/never"),
    "fetch_not_installed": lambda scene: located(scene, "s3://parcels/a.jpg"),
    **{code: lambda scene, code=code: spoilt(scene, code) for code in FAULTS},
    "image_crashes_server": crashing,
    **{
        code: lambda scene, body=body, headers=headers: post(scene, body, headers)
        for code, headers, body in BAD_REQUESTS.values()
    },
    **{code: lambda scene, data=data: post(scene, data) for code, data in bad_pictures().values() if data},
}


@pytest.mark.parametrize("code", [code for code in PROBLEMS if code != "client_gone"])
def test_an_error_is_what_its_row_says(scene: Scene, code: str) -> None:
    response = CASES[code](scene)
    problem = assert_problem(response, code)
    page = scene.good.get(problem["type"]).json()
    seconds = page.pop("retry_after")
    assert page.items() <= problem.items()
    if problem["step"] != "fetch":  # where the client itself named the place
        assert not re.search(r"\d+\.\d+\.\d+\.\d+|StatusCode|UNAVAILABLE|INTERNAL|NOT_FOUND", problem["detail"])
    assert_typed(response, seconds)


def test_a_client_that_left_is_an_error_in_the_log_alone(scene: Scene) -> None:
    with connect(scene.strict.port) as connection:
        head = HEAD + f"X-API-Key: {KEY}\r\nX-Request-ID: gone\r\nContent-Length: 1000\r\n\r\n".encode()
        connection.sendall(head + b"x")
    wait_for(lambda: '"request_id": "gone"' in scene.strict.log.read_text())
    (line,) = [line for line in scene.strict.log.read_text().splitlines() if '"request_id": "gone"' in line]
    assert '"code": "client_gone"' in line
    assert scene.good.get("/errors/client_gone").json()["status"] == 499


def assert_typed(response: httpx.Response, seconds: int | None) -> None:
    """The headers that every error has; `seconds` is what its row says of trying again."""
    assert response.headers.get("Retry-After") == (str(seconds) if seconds else None)
    assert ("WWW-Authenticate" in response.headers) == (response.status_code == 401)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"


def test_codes_in_the_metrics_are_those_of_the_table(scene: Scene) -> None:
    for text in (scene.good.get("/metrics").text, http.get(f"{scene.strict.url}/metrics").text):
        codes = {
            part.partition('"')[0]
            for line in text.splitlines()
            if line.startswith("gateway_requests_total")
            for part in line.split('code="')[1:]
        }
        assert codes <= {"", *PROBLEMS}
    assert {"missing_api_key", "headers_timeout", "malformed_request"} <= codes


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("code", PROBLEMS)
def test_a_browser_gets_a_page(client: httpx.Client, code: str) -> None:
    page = client.get(f"/errors/{code}", headers=BROWSER)
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Vary"] == "Accept"
    kind = PROBLEMS[code]
    for text in (code, str(kind.status), kind.title, kind.fault, kind.step):
        assert text in page.text
    assert f"<a href='errors/{code}'>" in client.get("/errors", headers=BROWSER).text


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "text/html;q=0.1, application/json", "text/html;q=0", "", "x;;=,", "text/*"]
)
def test_a_program_gets_json(client: httpx.Client, accept: str) -> None:
    assert client.get("/errors/no_release", headers={"Accept": accept}).json()["code"] == "no_release"
    assert client.get("/errors", headers={"Accept": accept}).json()[0]["code"] == next(iter(PROBLEMS))


# ---- what HTTP servers tend to answer in their own words ----

NO_HTTP = {
    "bytes": b"\x00\x01\x02\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method of its own": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a chunk without length": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("case", NO_HTTP)
def test_what_is_no_http_is_a_problem(gateway: GatewayProcess, case: str) -> None:
    assert_problem(exchange(gateway.port, NO_HTTP[case]), "malformed_request")


@pytest.mark.parametrize("case", ["HTTP/0.9", "OPTIONS", "WebSocket"])
def test_what_is_not_for_us_is_a_problem(gateway: GatewayProcess, case: str) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n"
    request, code = {
        "HTTP/0.9": (b"GET /nothing\r\n\r\n", "not_found"),
        "OPTIONS": (b"OPTIONS /v1/predict HTTP/1.1\r\nHost: x\r\n\r\n", "method_not_allowed"),
        "WebSocket": (b"GET /v1/predict HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n", "method_not_allowed"),
    }[case]
    assert_problem(exchange(gateway.port, request), code)


def test_garbage_after_a_request_does_not_take_its_answer(gateway: GatewayProcess) -> None:
    with connect(gateway.port) as connection:
        connection.sendall(HEAD + b"Content-Length: 3\r\n\r\nabcGARBAGE\r\n\r\n")
        assert_problem(receive(connection), "image_unsupported")
        connection.settimeout(5)
        with contextlib.suppress(ConnectionError, socket.timeout):
            assert connection.recv(1) == b""
