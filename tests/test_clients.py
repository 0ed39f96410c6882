"""Clients as they exist: what stock tools send, byte for byte or with the tool itself where it is installed."""

from __future__ import annotations

import base64
import gzip
import json
import re
import select
import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urljoin

import httpx
import psutil
import pytest
from PIL import Image

from gateway.auth.api_keys import hash_of
from tests.conftest import EXAMPLES, ROOT, GatewayProcess, free_endpoint, free_port, http, wait_for
from tests.raw_http import HEAD, connect, is_closed, receive
from tests.test_problems import assert_problem
from triton_runtime.server import Endpoint

POST = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
IMAGE = b"Content-Type: image/jpeg\r\n"
OFFERS = {
    "Java": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n",
    "Apache's HttpClient 5.4": b"Upgrade: TLS/1.2\r\nConnection: Upgrade\r\n",
    "TLS": b"Upgrade: TLS/1.0, HTTP/1.1\r\nConnection: keep-alive, upgrade\r\n",
    "two": b"upgrade: websocket\r\nUpgrade: h2c\r\nConnection: upgrade\r\nConnection: keep-alive\r\n",
}


def program(name: str) -> str:
    """Where it is; the test is skipped where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, data: bytes = b"") -> str:
    """What a program prints; curl and Java work through the tests' own process environment."""
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def is_answer(response: httpx.Response) -> bool:
    return response.status_code == 200 and bool(response.json()["label"])


# ---- an offer to go on with another protocol ----


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("piece", [1, 1000, 2**20], ids=["bytes", "pieces", "whole"])
def test_an_offered_protocol_is_ignored_and_the_request_answered(
    gateway: GatewayProcess, jpeg: bytes, offer: str, framing: str, piece: int
) -> None:
    length, body = b"Content-Length: %d\r\n\r\n" % len(jpeg), jpeg
    if framing == "chunks":
        length, body = b"Transfer-Encoding: chunked\r\n\r\n", chunked(jpeg, 5000)
    sent = POST + IMAGE + OFFERS[offer] + length + body
    if piece == 1:  # the head, byte by byte
        pieces = [sent[i : i + 1] for i in range(400)] + [sent[400:]]
    else:
        pieces = [sent[i : i + piece] for i in range(0, len(sent), piece)]
    with connect(gateway.port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):  # the connection is kept
            for data in pieces:
                connection.sendall(data)
            assert is_answer(receive(connection))
        connection.sendall(sent * 3 + b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + OFFERS[offer] + b"\r\n")
        answers = b""
        while not answers.endswith(b'{"status":"live"}'):
            answers += connection.recv(2**16)
        assert answers.count(b"HTTP/1.1 200 OK") == 4


def test_a_large_body_after_an_offer_is_read_whole(gateway: GatewayProcess) -> None:
    body = bytes(7 * 2**20)
    with connect(gateway.port) as connection:
        connection.sendall(POST + IMAGE + OFFERS["Java"] + b"Content-Length: %d\r\n\r\n" % len(body))
        connection.sendall(body)
        assert_problem(receive(connection), "image_unsupported")
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive(connection).status_code == 200


def test_an_offer_changes_no_bound(gateway: GatewayProcess) -> None:
    head = b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + OFFERS["Java"]
    for rest, code in (
        (b"A: b\r\n" * 100, "headers_too_large"),
        (b"A: " + b"a" * 2**14 + b"\r\n", "headers_too_large"),
        (b"Content-Length: x\r\n", "malformed_request"),
    ):
        with connect(gateway.port) as connection:
            connection.sendall(head + rest + b"\r\n")
            assert_problem(receive(connection), code)
    with connect(gateway.port) as connection:
        connection.sendall(b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert_problem(receive(connection), "malformed_request")
        assert is_closed(connection)


def test_curl_may_offer_http_2(gateway: GatewayProcess, tmp_path: Path) -> None:
    curl, url = program("curl"), f"{gateway.url}/v1/predict"
    large = tmp_path / "large"
    large.write_bytes(EXAMPLES[0].read_bytes() + bytes(3 * 2**20))  # of this size curl waits for 100 Continue
    same = ["--http2", "-sS", "-w", "%{http_version} ", "-H", "Content-Type: image/jpeg"]
    for picture in (EXAMPLES[0], large):
        printed = run(curl, *same, "--data-binary", f"@{picture}", url, "--next", *same, "--data-binary",
                      f"@{picture}", url)  # fmt: skip
        assert printed.count('"metadata"') == 2 and printed.count("}1.1 ") == 2, printed


def test_javas_client_is_answered(gateway: GatewayProcess, tmp_path: Path) -> None:
    java = program("java")
    batch = tmp_path / "batch.json"
    pictures = [{"image": base64.b64encode(picture.read_bytes()).decode()} for picture in EXAMPLES]
    batch.write_text(json.dumps({"items": pictures * 4}))
    source = ROOT / "tests/clients/Client.java"
    printed = run(java, source, f"{gateway.url}/v1/predict", "image/jpeg", *EXAMPLES, EXAMPLES[0])
    assert [line[:12] for line in printed.splitlines()] == ["200 HTTP_1_1"] * (len(EXAMPLES) + 1), printed
    printed = run(java, source, f"{gateway.url}/v1/predict/batch", "application/json", batch, batch)
    assert printed.count('"metadata"') == 2 * 4 * len(EXAMPLES), printed[:500]


# ---- connections that are kept ----


def test_an_unused_connection_is_kept_as_long_as_the_settings_say(tmp_path: Path) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with (
        GatewayProcess(free_endpoint(), tmp_path / "log") as usual,
        GatewayProcess(free_endpoint(), tmp_path / "short", keep_alive_s=0.5) as short,
        connect(usual.port) as kept,
        connect(short.port) as closed,
    ):
        for connection in (kept, closed):
            connection.sendall(request)
            assert receive(connection).status_code == 200
        assert is_closed(closed)
        time.sleep(7)  # uvicorn's own limit is 5 s
        kept.sendall(request)
        assert receive(kept).status_code == 200


# ---- answers to who is still sending ----


@pytest.mark.parametrize("case", ["declared", "chunks", "malformed"])
def test_who_is_still_sending_reads_the_refusal(gateway: GatewayProcess, case: str) -> None:
    """30 MiB, written as a simple client does it: all of it, and only then the answer is read."""
    pieces = {
        "declared": (HEAD + b"Content-Length: %d\r\n\r\n" % (30 * 2**20), bytes(2**20)),
        "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + bytes(2**20) + b"\r\n"),
        "malformed": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nx", bytes(2**20)),
    }
    head, piece = pieces[case]
    with connect(gateway.port) as connection:
        connection.sendall(head)
        for _ in range(30):
            connection.sendall(piece)
            time.sleep(0.01)
        answer = receive(connection)
        assert_problem(answer, "malformed_request" if case == "malformed" else "body_too_large")
        assert answer.headers["Connection"] == "close"
        assert is_closed(connection)


def _sends_until_reset(connection: socket.socket, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            connection.sendall(bytes(1000))
            time.sleep(0.05)
    except ConnectionError:
        return True
    return False


def test_who_sends_on_and_on_is_cut_off(tmp_path: Path) -> None:
    with (
        GatewayProcess(free_endpoint(), tmp_path / "log", send_timeout_s=1) as gateway,
        connect(gateway.port) as connection,
    ):
        connection.sendall(HEAD + b"Content-Length: 100000000000\r\n\r\n")
        assert_problem(receive(connection), "body_too_large")
        assert is_closed(connection), "its half of the connection"
        assert _sends_until_reset(connection, 100)


# ---- where the picture is, and what it is called ----


def form(*parts: tuple[str, bytes]) -> bytes:
    """Parts as they are, each with its headers."""
    return b"".join(b"--x\r\n%b\r\n\r\n%b\r\n" % (head.encode(), data) for head, data in parts) + b"--x--\r\n"


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
NAMES = {
    "urllib3 1.x": "Content-Disposition: form-data; name=\"image\"; filename*=utf-8''gr%C3%BC%C3%9Fe.jpg",
    "C#": "Content-Disposition: form-data; name=image; filename=p.jpg; filename*=utf-8''p.jpg",
    "in pieces": 'Content-Disposition: form-data; name="image"; FileName*0="a"; FileName*1="b.jpg"',
    "Go's CreatePart": 'Content-Disposition: form-data; name="image"\r\nContent-Type: image/jpeg',
    "type first": 'content-type: Image/JPEG\r\ncontent-disposition: form-data; name="image"',
    "bytes": 'Content-Disposition: form-data; name="image"\r\nContent-Type: application/octet-stream',
    "neither": 'Content-Disposition: form-data; name="image"',
}


@pytest.mark.parametrize("case", NAMES)
def test_a_part_that_is_a_picture_is_the_file(client: httpx.Client, jpeg: bytes, case: str) -> None:
    body = form((NAMES[case], jpeg), ('Content-Disposition: form-data; name="metadata"', b'\xef\xbb\xbf{"a": 1}'))
    answer = client.post("/v1/predict", content=body, headers=MULTIPART)
    assert is_answer(answer), answer.text
    assert answer.json()["metadata"] == {"a": 1}


@pytest.mark.parametrize("media_type", ["", "application/x-www-form-urlencoded", "a form"])
@pytest.mark.parametrize(
    ("body", "name"), [(b"RIFF\0\0\0\0WAVEfmt ", "WAV"), (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC")]
)
def test_a_file_of_another_kind_is_named_however_it_comes(
    client: httpx.Client, body: bytes, name: str, media_type: str
) -> None:
    if media_type == "a form":
        answer = client.post("/v1/predict", content=form((NAMES["neither"], body)), headers=MULTIPART)
    else:
        answer = client.post("/v1/predict", content=body, headers={"Content-Type": media_type} if media_type else {})
    assert name in assert_problem(answer, "image_unsupported")["detail"]


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "TIFF"])
def test_a_part_that_says_nothing_is_the_file_if_it_begins_as_one(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/predict", content=form((NAMES["neither"], pictures()[kind])), headers=MULTIPART)
    assert is_answer(answer), answer.text


def test_a_file_name_in_the_place_of_a_picture_is_told_what_to_send(client: httpx.Client) -> None:
    body = form(('Content-Disposition: form-data; name="image"', b"parcel.jpg"))
    problem = assert_problem(client.post("/v1/predict", content=body, headers=MULTIPART), "invalid_request")
    assert "curl -F image=@parcel.jpg" in problem["detail"]


def test_a_byte_order_mark_and_null_say_nothing(client: httpx.Client, jpeg: bytes) -> None:
    picture = base64.b64encode(jpeg).decode()
    whole = {"image": picture, "image_url": None, "metadata": None, "model_version": None}
    mark, headers = b"\xef\xbb\xbf", {"Content-Type": "application/json; charset=utf-8"}
    for request in (whole, {"image": picture}):
        answer = client.post("/v1/predict", content=mark + json.dumps(request).encode(), headers=headers)
        assert is_answer(answer), answer.text
        assert answer.json()["metadata"] == {}
    batch = client.post("/v1/predict/batch", content=mark + json.dumps({"items": [whole]}).encode(), headers=headers)
    assert batch.json()["results"][0]["answer"]["label"], batch.text
    null = client.post("/v1/predict", files={"image": jpeg}, data={"metadata": "null"})
    assert null.json()["metadata"] == {}, null.text
    located = {**whole, "image": None, "image_url": "https://x.test/p.jpg"}
    assert_problem(client.post("/v1/predict", json=located), "url_not_allowed")
    assert_problem(client.post("/v1/predict", json={**whole, "image": None}), "invalid_request")
    assert_problem(client.post("/v1/predict", json={**whole, "metadata": []}), "invalid_metadata")


# ---- bodies whose type says nothing ----


KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
UNTYPED = ["", "application/octet-stream", "application/x-www-form-urlencoded", "text/plain", "binary/octet-stream"]


def pictures() -> dict[str, bytes]:
    """The first example in every format that is taken."""
    made = {}
    with Image.open(EXAMPLES[0]) as picture:
        for kind in KINDS:
            picture.save(file := BytesIO(), kind)
            made[kind] = file.getvalue()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_pictures_own_header_decides_whatever_the_type_says(client: httpx.Client, kind: str) -> None:
    picture = pictures()[kind]
    for media_type in UNTYPED:
        for method in ("POST", "PUT"):
            for content in (picture, iter([picture[:5], picture[5:]])):  # with a length, and in chunks
                headers = {"Content-Type": media_type} if media_type else {}
                answer = client.request(method, "/v1/predict", content=content, headers=headers)
                assert is_answer(answer), answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"image": ""}', "looks like JSON: send application/json"),
        (b"\xef\xbb\xbf [1]", "looks like JSON"),
        (b"--x\r\nContent-Disposition: form-data", "looks like a form: send multipart/form-data"),
        (b"image=AAAA&metadata=x", "send such a file, as image/jpeg"),
        (b"\xff\xd8", "send such a file, as image/jpeg"),
        (b"/9j/4AAQSkZJRg", "looks like base64"),
    ],
)
def test_what_is_refused_for_its_type_says_what_to_send(client: httpx.Client, body: bytes, said: str) -> None:
    for media_type in ("", "application/x-www-form-urlencoded", "text/plain"):
        for content in (body, iter([body[:1], body[1:]])):
            headers = {"Content-Type": media_type} if media_type else {}
            answer = client.post("/v1/predict", content=content, headers=headers)
            problem = assert_problem(answer, "unsupported_media_type")
            assert said in problem["detail"] and (media_type or "no content type") in problem["detail"]
            assert answer.headers["Accept-Encoding"] == "gzip"
    assert_problem(client.post("/v1/predict", content=iter([])), "missing_body")


def test_curl_sends_a_picture_in_each_of_its_ways(gateway: GatewayProcess) -> None:
    curl, url, file = program("curl"), f"{gateway.url}/v1/predict", EXAMPLES[0]
    ways: list[tuple[list[str | Path], bytes]] = [
        (["--data-binary", f"@{file}"], b""),
        (["-T", file], b""),
        (["-T", "-"], file.read_bytes()),
        (["-F", f"image=@{file}"], b""),
        (["-F", f"image=<{file};type=image/jpeg"], b""),
    ]
    for arguments, data in ways:
        printed = run(curl, "-sS", *arguments, url, data=data)
        assert '"label"' in printed, (arguments, printed)


def test_node_sends_a_stream(gateway: GatewayProcess) -> None:
    script = """
    const { openAsBlob } = require('fs');
    (async () => {
        const file = await openAsBlob(process.argv[2]);
        const options = { method: 'POST', body: file.stream(), duplex: 'half' };
        const answer = await fetch(process.argv[1], options);
        console.log(answer.status, await answer.text());
    })();
    """
    printed = run(program("node"), "-e", script, f"{gateway.url}/v1/predict", EXAMPLES[0])
    assert printed.startswith("200 ") and '"label"' in printed, printed


# ---- compressed bodies ----


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
def test_a_compressed_body_is_read(client: httpx.Client, jpeg: bytes, encoding: str) -> None:
    as_json = json.dumps({"image": base64.b64encode(jpeg).decode(), "metadata": {"a": 1}}).encode()
    as_form = form(('Content-Disposition: form-data; name="image"; filename="p.jpg"', jpeg))
    bodies = [("image/jpeg", jpeg), ("application/json", as_json), (MULTIPART["Content-Type"], as_form), ("", jpeg)]
    for media_type, body in bodies:
        headers = {"Content-Encoding": encoding, **({"Content-Type": media_type} if media_type else {})}
        packed = gzip.compress(body, mtime=0)
        for content in (packed, iter([packed[:1], packed[1:7], packed[7:]])):
            assert is_answer(answer := client.post("/v1/predict", content=content, headers=headers)), answer.text
    batch = gzip.compress(b'{"items": [%b]}' % as_json, mtime=0)
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    answer = client.post("/v1/predict/batch", content=batch, headers=headers)
    assert answer.json()["results"][0]["answer"]["label"], answer.text


@pytest.mark.parametrize(
    ("encoding", "body", "code"),
    [
        ("br", b"x", "unsupported_media_type"),
        ("deflate", b"x", "unsupported_media_type"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "unsupported_media_type"),
        ("gzip", b"\xff\xd8\xff", "invalid_encoding"),
        ("gzip", gzip.compress(bytes(1000), mtime=0)[:-1], "invalid_encoding"),
        ("gzip", gzip.compress(bytes(1000), mtime=0) + b"x", "invalid_encoding"),
        ("gzip", gzip.compress(b"x", mtime=0) * 2, "invalid_encoding"),
        ("gzip", gzip.compress(bytes(2**18), mtime=0) + b"x", "invalid_encoding"),
        ("gzip", gzip.compress(b"", mtime=0), "missing_body"),
        ("gzip", b"", "missing_body"),
        ("gzip", gzip.compress(b"no picture", mtime=0), "image_unsupported"),
        ("gzip", gzip.compress(bytes(8 * 2**20 + 1), mtime=0), "body_too_large"),
        ("gzip", gzip.compress(bytes(8 * 2**20), mtime=0), "image_unsupported"),
    ],
)
def test_what_is_not_compressed_as_it_says_is_refused(
    client: httpx.Client, encoding: str, body: bytes, code: str
) -> None:
    headers = {"Content-Type": "image/jpeg", "Content-Encoding": encoding}
    answer = client.post("/v1/predict", content=body, headers=headers)
    assert_problem(answer, code)
    assert answer.headers.get("Accept-Encoding") == ("gzip" if code == "unsupported_media_type" else None)


def test_a_bomb_takes_no_more_than_a_body_may(gateway: GatewayProcess) -> None:
    """A thousandth of what it holds is sent."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(20)) + packer.flush()  # 320 MiB, of 8 that may be
    process = psutil.Process(gateway.process.pid)
    before, began = process.memory_info().rss, sum(process.cpu_times()[:2])
    headers = {"Content-Type": "image/jpeg", "Content-Encoding": "gzip"}
    for _ in range(5):
        assert_problem(http.post(f"{gateway.url}/v1/predict", content=bomb, headers=headers), "body_too_large")
    assert process.memory_info().rss - before < 40 * 2**20
    assert sum(process.cpu_times()[:2]) - began < 5
    assert gateway.gauges()["gateway_held_bytes"] == 0


# ---- slow uplinks ----


@pytest.fixture(scope="module")
def patient(triton: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Bodies have a second, predictions half a minute but for those of `hasty`."""
    limits = {"body_timeout_s": 1, "body_rate": 1000, "deadline_s": 2, "max_deadline_s": 60}
    with GatewayProcess(triton, tmp_path_factory.mktemp("patient") / "log", **limits) as process:
        wait_for(process.is_ready)
        yield process


def upload(gateway: GatewayProcess, data: bytes, pieces: int, every: float, *headers: bytes) -> httpx.Response:
    """Send a body in pieces, until it is answered."""
    with connect(gateway.port) as connection:
        head = b"".join(header + b"\r\n" for header in headers)
        connection.sendall(HEAD + head + b"Content-Length: %d\r\n\r\n" % len(data))
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            if select.select([connection], [], [], every)[0]:
                break
            connection.sendall(data[at : at + size])
        return receive(connection)


def test_a_body_that_comes_steadily_is_waited_for(patient: GatewayProcess, jpeg: bytes) -> None:
    """Longer than a body has, and than an answer may take."""
    assert is_answer(answer := upload(patient, jpeg, 40, 0.1)), answer.text
    timed = upload(patient, jpeg, 40, 0.1, b"X-Timeout-Ms: 60000")
    assert is_answer(timed), timed.text


def test_a_body_that_trickles_or_stops_is_not_waited_for(patient: GatewayProcess, jpeg: bytes) -> None:
    problem = assert_problem(upload(patient, jpeg[:200], 200, 0.1), "body_timeout")
    assert "in 1 s; it has 1 s, and longer while 1,000 bytes come each second" in problem["detail"]
    with connect(patient.port) as connection:  # what came fast at first earns nothing for later
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(900_000))
        assert_problem(receive(connection), "body_timeout")


def test_a_time_that_a_client_names_is_kept(patient: GatewayProcess, jpeg: bytes) -> None:
    problem = assert_problem(upload(patient, jpeg, 40, 0.1, b"X-Timeout-Ms: 1500"), "body_timeout")
    assert "within the time of X-Timeout-Ms" in problem["detail"]


# ---- monitors ----


@pytest.mark.parametrize(
    "path",
    ["/health", "/health/live", "/health/ready", "/version", "/metrics", "/docs", "/openapi.json", "/errors",
     "/errors/not_found", "/v1/releases", "/static-offline-docs/swagger-ui.css", "/nothing", "/v1/predict",
     "/errors/nothing"],
)  # fmt: skip
def test_head_is_get_without_a_body(gateway: GatewayProcess, client: httpx.Client, path: str) -> None:
    get = client.get(path)
    assert get.status_code == {"/nothing": 404, "/errors/nothing": 404, "/v1/predict": 405}.get(path, 200)
    with connect(gateway.port) as connection:
        for _ in range(2):  # nothing of a body is left on the connection
            connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += connection.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 %d " % get.status_code)
            assert answer.count(b"\r\n\r\n") == 1
            assert f"content-type: {get.headers['content-type']}".encode() in answer


def test_a_wrong_method_is_told_the_right_ones(client: httpx.Client) -> None:
    for path, methods in (("/v1/predict", "POST, PUT"), ("/predict", "POST, PUT"), ("/version", "GET, HEAD")):
        answer = client.delete(path)
        assert_problem(answer, "method_not_allowed")
        assert answer.headers["Allow"] == methods


# ---- browsers on other sites, and proxies ----


def test_browsers_on_other_sites_are_let_in_where_the_settings_say(
    triton: Endpoint, client: httpx.Client, jpeg: bytes, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nclient = "desk"\nsha256 = "{hash_of("gwk_x")}"\n')
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key,x-timeout-ms"}
    ours, other = {"Origin": "https://desk.example.com"}, {"Origin": "https://evil.example.com"}
    allows = "Access-Control-Allow-Origin"
    assert client.options("/v1/predict", headers={**ours, **ask}).status_code == 405, "off by default"
    assert allows not in client.post("/v1/predict", content=jpeg, headers=ours).headers
    origins = "https://desk.example.com, http://localhost:3000"
    with (
        GatewayProcess(triton, tmp_path / "log", cors_origins=origins, api_keys_file=keys) as gateway,
        httpx.Client(base_url=gateway.url, timeout=60) as browser,
    ):
        wait_for(gateway.is_ready)
        asked = browser.options("/v1/predict", headers={**ours, **ask})
        assert (asked.status_code, asked.headers[allows]) == (200, ours["Origin"])
        assert "x-timeout-ms" in asked.headers["Access-Control-Allow-Headers"]
        assert allows not in browser.options("/v1/predict", headers={**other, **ask}).headers
        for key, status in (({"X-API-Key": "gwk_x"}, 200), ({}, 401)):  # a refusal can be read, too
            answer = browser.post("/v1/predict", content=jpeg, headers={**ours, **key})
            assert (answer.status_code, answer.headers[allows]) == (status, ours["Origin"])
            assert "X-Request-ID" in answer.headers["Access-Control-Expose-Headers"]
            assert "Origin" in answer.headers["Vary"]
            assert allows not in browser.post("/v1/predict", content=jpeg, headers={**other, **key}).headers


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream gateway {{ server 127.0.0.1:{gateway}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 30m; proxy_http_version 1.1; proxy_set_header Connection "";
    location /parcels/ {{ proxy_pass http://gateway{rest}; }}
  }}
}}
"""


@pytest.mark.parametrize("rest", ["/", ""], ids=["the path is taken off", "the path is kept"])
def test_behind_a_path_of_nginx_everything_leads_on(triton: Endpoint, jpeg: bytes, tmp_path: Path, rest: str) -> None:
    nginx, port = program("nginx"), free_port()
    with GatewayProcess(triton, tmp_path / "log", root_path="/parcels") as gateway:
        wait_for(gateway.is_ready)
        config = tmp_path / "nginx.conf"
        config.write_text(NGINX.format(folder=tmp_path, gateway=gateway.port, port=port, rest=rest))
        with subprocess.Popen([nginx, "-c", config, "-p", tmp_path]) as proxy:
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                    wait_for(lambda: client.get("/parcels/health/ready").status_code == 200)
                    _leads_on(client, jpeg)
            finally:
                proxy.terminate()
        assert http.get(f"{gateway.url}/health/ready").status_code == 200, "asked directly, as by a health check"


def _leads_on(client: httpx.Client, jpeg: bytes) -> None:
    assert is_answer(client.post("/parcels/v1/predict", content=jpeg, headers={"Content-Type": "image/jpeg"}))
    page = client.get("/parcels/docs")
    base = urljoin(str(client.base_url), "/parcels/docs")
    links = re.findall(r"""(?:href|src)="([^"]+)"|url: '([^']+)'""", page.text)
    assert len(links) >= 4
    for link in links:
        assert client.get(urljoin(base, link[0] or link[1])).status_code == 200, link
    document = client.get("/parcels/openapi.json").json()
    assert document["servers"] == [{"url": "/parcels"}]
    refused = client.post("/parcels/v1/predict", content=b"x").json()
    assert refused["type"] == "/parcels/errors/unsupported_media_type"
    assert client.get(refused["type"]).json()["code"] == refused["code"]
    item = client.post("/parcels/v1/predict/batch", json={"items": [{}]}).json()["results"][0]["problem"]
    assert client.get(item["type"]).json()["code"] == item["code"]
    for path in ("/parcels/errors", refused["type"]):
        html = client.get(path, headers={"Accept": "text/html"}).text
        links = re.findall(r"href='([^']+)'", html)
        assert links
        for link in links[:3]:
            target = urljoin(urljoin(str(client.base_url), path), link)
            assert client.get(target).status_code == 200, target
