"""Bad input, through every form: each case has its documented status and code, and the server goes on answering."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from gateway.http.connection import LINGER_BODIES
from gateway.problems import PROBLEMS
from tests.conftest import GatewayProcess
from tests.offline import PREPROCESSING
from tests.test_preprocessing import bad_pictures, png_header

LIMIT = 8 * 2**20
JSON, IMAGE = {"Content-Type": "application/json"}, {"Content-Type": "image/jpeg"}
BOUNDARY = {"Content-Type": "multipart/form-data; boundary=x"}


def assert_problem(response: httpx.Response, code: str) -> dict[str, Any]:
    """The response is the problem `code`, complete and consistent with the table."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem = dict(response.json())
    assert problem["code"] == code, problem
    kind = PROBLEMS[code]
    assert response.status_code == problem["status"] == kind.status
    assert problem["type"] == f"/errors/{code}"
    assert problem["title"] == kind.title
    assert problem["advice"] == kind.advice
    assert (problem["retryable"], problem["fault"], problem["step"]) == (kind.retryable, kind.fault, kind.step)
    assert problem["detail"]
    assert problem["request_id"] == response.headers["X-Request-ID"]
    assert "Traceback" not in response.text
    return problem


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--x\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


def with_metadata(text: str) -> bytes:
    return f'{{"image": "{encoded(png_header(10, 10))}", "metadata": {text}}}'.encode()


BAD_REQUESTS: dict[str, tuple[str, dict[str, str], bytes]] = {
    "no body": ("missing_body", {}, b""),
    "no body, JSON": ("missing_body", JSON, b""),
    "no body, form": ("missing_body", BOUNDARY, b""),
    "no body, picture": ("missing_body", IMAGE, b""),
    "no content type": ("unsupported_media_type", {"Content-Type": ""}, b"x"),
    "no gzip": ("invalid_encoding", {**IMAGE, "Content-Encoding": "gzip"}, b"x"),
    "text": ("unsupported_media_type", {"Content-Type": "text/plain"}, b"x"),
    "URL-encoded form": ("unsupported_media_type", {"Content-Type": "application/x-www-form-urlencoded"}, b"image=x"),
    "a content type like a picture's": ("unsupported_media_type", {"Content-Type": "imagejpeg"}, b"x"),
    "broken JSON": ("invalid_json", JSON, b'{"image": '),
    "not UTF-8": ("invalid_json", JSON, b'{"image": "\xff\xfe"}'),
    "deeply nested JSON": ("invalid_json", JSON, b"[" * 100_000),
    "an array": ("invalid_request", JSON, b"[]"),
    "null": ("invalid_request", JSON, b"null"),
    "no image": ("invalid_request", JSON, b"{}"),
    "a number for the image": ("invalid_request", JSON, b'{"image": 7}'),
    "an unknown field": ("invalid_request", JSON, b'{"image": "", "imgae": ""}'),
    "broken base64": ("invalid_base64", JSON, b'{"image": "a!b"}'),
    "base64 without padding": ("invalid_base64", JSON, b'{"image": "abcde"}'),
    "base64 that is not ASCII": ("invalid_base64", JSON, '{"image": "äöü="}'.encode()),
    "a data URL": ("invalid_base64", JSON, b'{"image": "data:image/png;base64,AAAA"}'),
    "an empty image": ("image_empty", JSON, b'{"image": ""}'),
    "nested metadata": ("invalid_metadata", JSON, with_metadata('{"a": {"b": 1}}')),
    "a list in metadata": ("invalid_metadata", JSON, with_metadata('{"a": [1]}')),
    "metadata that is no object": ("invalid_metadata", JSON, with_metadata('"a"')),
    "NaN in metadata": ("invalid_metadata", JSON, with_metadata('{"a": NaN}')),
    "infinity in metadata": ("invalid_metadata", JSON, with_metadata('{"a": 1e999}')),
    "an empty key": ("invalid_metadata", JSON, with_metadata('{"": 1}')),
    "a long key": ("invalid_metadata", JSON, with_metadata(json.dumps({"k" * 65: 1}))),
    "a long value": ("invalid_metadata", JSON, with_metadata(json.dumps({"k": "v" * 1025}))),
    "much metadata": ("invalid_metadata", JSON, with_metadata(json.dumps({str(i): "v" * 1000 for i in range(5)}))),
    "a form without boundary": ("invalid_multipart", {"Content-Type": "multipart/form-data"}, b"--x--"),
    "a form that is none": ("invalid_multipart", BOUNDARY, b"hello"),
    "a picture and a location": ("invalid_request", JSON, b'{"image": "", "image_url": "https://x.test/"}'),
    "null for the location": ("invalid_request", JSON, b'{"image_url": null}'),
    "a list of locations": ("invalid_request", JSON, b'{"image_url": ["https://x.test/"]}'),
    "a location, where none is allowed": ("url_not_allowed", JSON, b'{"image_url": "https://x.test/p.jpg"}'),
    "a location that is none": ("url_not_allowed", JSON, b'{"image_url": ""}'),
    "a form with a picture and a location": (
        "invalid_request",
        BOUNDARY,
        part("image", b"x", "p.jpg") + part("image_url", b"https://x.test/") + b"--x--\r\n",
    ),
    "a form with a location, where none is allowed": (
        "url_not_allowed",
        BOUNDARY,
        part("image_url", b"https://x.test/") + b"--x--\r\n",
    ),
    "a form with a file for the location": (
        "invalid_request",
        BOUNDARY,
        part("image_url", b"https://x.test/", "url.txt") + b"--x--\r\n",
    ),
    "a form cut off": ("invalid_multipart", BOUNDARY, part("image", b"x", "p.jpg")[:30]),
    "a form without image": ("invalid_request", BOUNDARY, part("metadata", b"{}") + b"--x--\r\n"),
    "an image that is no file": ("invalid_request", BOUNDARY, part("image", b"x") + b"--x--\r\n"),
    "an unknown part": ("invalid_request", BOUNDARY, part("picture", b"x", "p.jpg") + b"--x--\r\n"),
    "two images": ("invalid_request", BOUNDARY, part("image", b"x", "p.jpg") * 2 + b"--x--\r\n"),
    "many parts": ("invalid_multipart", BOUNDARY, part("image", b"x", "p.jpg") * 50 + b"--x--\r\n"),
    "an empty file": ("image_empty", BOUNDARY, part("image", b"", "p.jpg") + b"--x--\r\n"),
    "bad metadata in a form": (
        "invalid_metadata",
        BOUNDARY,
        part("image", b"x", "p.jpg") + part("metadata", b"{oops") + b"--x--\r\n",
    ),
}


@pytest.fixture(autouse=True)
def still_answers(client: httpx.Client, jpeg: bytes) -> Iterator[None]:
    """After whatever a test sent, a good picture is answered."""
    yield
    assert client.post("/v1/predict", content=jpeg, headers=IMAGE).status_code == 200


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_has_a_code(client: httpx.Client, case: str) -> None:
    code, headers, body = BAD_REQUESTS[case]
    assert_problem(client.post("/v1/predict", content=body, headers=headers), code)


@pytest.mark.parametrize("form", ["json", "form", "bytes"])
@pytest.mark.parametrize("case", [name for name in bad_pictures() if name != "no bytes"])
def test_a_bad_picture_has_the_code_of_the_preprocessing(client: httpx.Client, case: str, form: str) -> None:
    code, data = bad_pictures()[case]
    if form == "json":
        response = client.post("/v1/predict", json={"image": encoded(data)})
    elif form == "form":
        response = client.post("/v1/predict", files={"image": ("p.jpg", data)})
    else:
        response = client.post("/v1/predict", content=data, headers=IMAGE)
    assert_problem(response, code)


def test_every_code_of_the_preprocessing_is_in_the_table() -> None:
    assert set(PREPROCESSING.PictureError.CODES) <= set(PROBLEMS)


# ---- bodies over their limit ----


@pytest.mark.parametrize("headers", [JSON, IMAGE, BOUNDARY])
@pytest.mark.parametrize("chunked", [False, True])
def test_fifty_megabytes_are_refused(client: httpx.Client, headers: dict[str, str], chunked: bool) -> None:
    data = (part("image", b"", "p.jpg")[:-2] if headers is BOUNDARY else b"") + bytes(50 * 2**20)
    pieces = (data[i : i + 2**16] for i in range(0, len(data), 2**16))
    response = client.post("/v1/predict", content=pieces if chunked else data, headers=headers)
    assert_problem(response, "body_too_large")


def test_the_limit_itself_is_let_through(client: httpx.Client) -> None:
    assert_problem(client.post("/v1/predict", content=bytes(LIMIT), headers=IMAGE), "image_unsupported")
    assert_problem(client.post("/v1/predict", content=bytes(LIMIT + 1), headers=IMAGE), "body_too_large")


def test_a_declared_length_over_the_limit_is_refused_before_anything_is_read(gateway: GatewayProcess) -> None:
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {LIMIT + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(head.encode())  # and not a byte of the body
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_an_endless_body_is_cut_off(gateway: GatewayProcess) -> None:
    """No more is taken than the limit, a few times that much for whoever reads no answer while it sends, and what the
    sockets hold; then the connection is closed."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + bytes(2**16) + b"\r\n"
    sent = 0
    with (
        socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(head)
        while sent < 20 * LIMIT:
            connection.sendall(piece)
            sent += len(piece)
            time.sleep(0.001)
    assert sent < (2 + LINGER_BODIES) * LIMIT


def test_a_client_that_leaves_half_way_harms_nobody(gateway: GatewayProcess) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
            connection.sendall(head + bytes(100))


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01"]
)
def test_what_is_no_http_is_a_problem(gateway: GatewayProcess, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(garbage)
        answer = HTTPResponse(connection)
        answer.begin()
        response = httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
        assert_problem(response, "malformed_request")
        assert connection.recv(1) == b""  # and the connection is closed


# ---- other paths and methods ----


@pytest.mark.parametrize("path", ["/v2", "/v2/predict", "/v1/predict/", "/errors/nope", "/..%2f..%2fetc/passwd"])
def test_an_unknown_path_is_a_problem(client: httpx.Client, path: str) -> None:
    assert_problem(client.get(path, follow_redirects=False), "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/predict"), ("DELETE", "/predict"), ("POST", "/version")])
def test_a_wrong_method_is_a_problem_that_names_the_right_ones(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert_problem(response, "method_not_allowed")
    assert response.headers["Allow"]
