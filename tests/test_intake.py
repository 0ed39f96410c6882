"""Bodies that are large, many, slow, or made to be slow to read: what they hold is bounded, and others are answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.requests import Request
from starlette.types import Message

from gateway.auth.api_keys import hash_of
from gateway.http.body import Picture, read_batch, read_picture
from gateway.http.forms import Form
from gateway.http.json_body import Cut
from gateway.http.memory import Memory, Share
from gateway.problems import Failure
from gateway.settings import Settings
from tests.conftest import GatewayProcess, free_endpoint, http, wait_for
from tests.raw_http import HEAD, connect, receive
from tests.test_problems import BOUNDARY, IMAGE, JSON, assert_problem, part
from triton_runtime.server import Endpoint

MIB = 2**20
END = b"--x--\r\n"


# ---- what all hold together ----


def test_the_largest_that_is_being_received_makes_room_for_a_smaller_one() -> None:
    memory, ended = Memory(100), []

    def growing(name: str) -> Callable[[Callable[[], Failure]], None]:
        return lambda why: ended.append((name, why().code))

    with memory.share() as complete, memory.share() as large, memory.share() as middle, memory.share() as small:
        complete.take(40)  # it waits for its answer: nothing is had by ending it
        large.begin(growing("large"))
        middle.begin(growing("middle"))
        small.begin(growing("small"))
        large.take(30)
        middle.take(20)
        small.take(10)
        with pytest.raises(Failure, match=r"overloaded: .*: 100 bytes are held already"):
            large.take(1)  # it is the largest itself
        with pytest.raises(Failure, match="overloaded"):
            memory.share().require(30)
        memory.share().require(29)
        assert ended == []
        small.take(1)
        assert (ended, large.held, memory.held) == ([("large", "overloaded")], 0, 71)
        middle.take(20)
        small.take(10)
        assert ended == [("large", "overloaded"), ("middle", "overloaded")]
        assert memory.held == 61
        small.stop()
        with pytest.raises(Failure, match="overloaded"):
            complete.take(40)
    assert memory.held == 0


def test_however_many_are_large_a_small_one_is_let_in() -> None:
    memory = Memory(512 * MIB)
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            share = stack.enter_context(memory.share())
            share.begin(lambda why: None)
            with contextlib.suppress(Failure):
                for _ in range(320):
                    share.take(2**16)
        assert memory.held >= 500 * MIB
        stack.enter_context(memory.share()).take(40_000)
        assert memory.held <= 512 * MIB


@pytest.fixture(scope="module")
def narrow(triton: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with little room, and much time."""
    limits = {"max_body_bytes": 8 * MIB, "max_held_bytes": 32 * MIB, "deadline_s": 100, "max_deadline_s": 100}
    log = tmp_path_factory.mktemp("narrow") / "log"
    with GatewayProcess(triton, log, **limits, body_timeout_s=100, headers_timeout_s=100) as process:
        wait_for(process.is_ready)
        yield process


def held(gateway: GatewayProcess) -> float:
    return gateway.gauges()["gateway_held_bytes"]


def declare(gateway: GatewayProcess, length: int) -> socket.socket:
    connection = connect(gateway.port)
    connection.sendall(HEAD + f"Content-Length: {length}\r\n\r\n".encode())
    return connection


def test_many_large_uploads_at_once_take_bounded_memory(narrow: GatewayProcess, jpeg: bytes) -> None:
    """Forty times 7 MiB: 280 MiB come, 32 MiB may be held."""
    process = psutil.Process(narrow.process.pid)

    def is_answered() -> None:
        answer = http.post(f"{narrow.url}/v1/predict", content=jpeg, headers=IMAGE, timeout=60)
        assert answer.status_code == 200, answer.text

    is_answered()
    before = process.memory_info().rss
    most = 0
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(declare(narrow, 7 * MIB)) for _ in range(40)]
        for _ in range(28):
            for connection in slow:
                connection.sendall(bytes(MIB // 4 - 100))  # a little is missing in the end
            is_answered()
            assert held(narrow) <= 32 * MIB
            most = max(most, process.memory_info().rss)
        assert held(narrow) > 7 * MIB, "some go on"
        refused = [connection for connection in slow if _is_readable(connection)]
        assert 30 < len(refused) < 40, "at most four of 7 MiB go on"
        for connection in refused:
            answer = receive(connection)
            assert_problem(answer, "overloaded")
            assert answer.headers["Retry-After"] == "1"
        # The rest of a refused body is thrown away, and the connection serves the next request.
        refused[0].sendall(bytes(28 * 100) + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive(refused[0]).status_code == 200
    assert most - before < 100 * MIB
    wait_for(lambda: held(narrow) == 0)  # they left in the middle
    is_answered()


def _is_readable(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(20)


def test_who_declares_much_and_sends_nothing_takes_no_room(narrow: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(declare(narrow, 8 * MIB))
        answer = http.post(f"{narrow.url}/v1/predict", content=bytes(8 * MIB), headers=IMAGE, timeout=60)
        assert_problem(answer, "image_unsupported")
        assert held(narrow) == 0


def test_what_has_no_room_is_refused_before_it_is_sent(narrow: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(declare(narrow, 8 * MIB)).sendall(bytes(7 * MIB))
        wait_for(lambda: held(narrow) == 28 * MIB)
        assert_problem(receive(stack.enter_context(declare(narrow, 8 * MIB))), "overloaded")


def test_a_slow_upload_makes_room_for_a_faster_one(narrow: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(declare(narrow, 8 * MIB)) for _ in range(4)]
        for connection in slow:
            connection.sendall(bytes(8 * MIB - 1))
        wait_for(lambda: held(narrow) == 32 * MIB - 4)
        answer = http.post(f"{narrow.url}/v1/predict", content=bytes(4 * MIB), headers=IMAGE, timeout=60)
        assert_problem(answer, "image_unsupported")
        (ended,) = [connection for connection in slow if _is_readable(connection)]
        assert_problem(receive(ended), "overloaded")


@pytest.mark.parametrize("kind", ["bytes", "json", "form", "batch"])
def test_whatever_was_sent_nothing_is_held_afterwards(narrow: GatewayProcess, jpeg: bytes, kind: str) -> None:
    text, predict = base64.b64encode(jpeg).decode(), f"{narrow.url}/v1/predict"
    for picture, encoded in ((jpeg, text), (b"?", "?")):
        if kind == "bytes":
            http.post(predict, content=picture, headers=IMAGE, timeout=60)
        elif kind == "json":
            http.post(predict, json={"image": encoded}, timeout=60)
        elif kind == "form":
            http.post(predict, files={"image": picture}, timeout=60)
        else:
            http.post(f"{predict}/batch", json={"items": [{"image": encoded}, {}, {"image": text}]}, timeout=60)
    assert held(narrow) == 0


def test_there_is_room_for_a_body_or_the_gateway_does_not_start() -> None:
    Settings(max_body_bytes=MIB, max_held_bytes=2 * MIB)
    with pytest.raises(ValueError, match="at least twice GATEWAY_MAX_BODY_BYTES, 2097152"):
        Settings(max_body_bytes=MIB, max_held_bytes=2 * MIB - 1)
    with pytest.raises(ValueError, match="at least twice GATEWAY_MAX_BODY_BYTES, 1073741824"):
        Settings(max_body_bytes=512 * MIB)  # the default does not grow with it


# ---- nothing else waits for one body ----


def _picture() -> bytes:
    return os.urandom(2**16) * 320


def _text() -> bytes:
    return base64.b64encode(_picture()[: 15 * MIB - 4096])


def _of(what: str, entries: int = 10**6) -> bytes:
    return json.dumps({str(i): what for i in range(entries)}).encode()


SLOW: dict[str, tuple[dict[str, str], Callable[[], bytes]]] = {
    "bytes": (IMAGE, lambda: bytes(20 * MIB)),
    "form": (BOUNDARY, lambda: part("image", _picture()[:-200], "p.jpg") + END),
    "form, like boundaries": (BOUNDARY, lambda: part("image", b"\r\n--" * (5 * MIB - 100), "p.jpg") + END),
    "form, line ends": (BOUNDARY, lambda: part("image", b"\r" * (20 * MIB - 200), "p.jpg") + END),
    "form, metadata": (BOUNDARY, lambda: part("image", b"x", "p.jpg") + part("metadata", _of("x")) + END),
    "form, file of metadata": (BOUNDARY, lambda: part("metadata", _of("x"), "m.json") + END),
    "form, parts": (BOUNDARY, lambda: part("image", b"x", "p.jpg") * 250_000 + END),
    "json": (JSON, lambda: b'{"image": "' + _text() + b'"}'),
    "json, escapes": (JSON, lambda: b'{"image": "' + _text()[: 19 * MIB].replace(b"/", b"\\/") + b'"}'),
    "json, only escapes": (JSON, lambda: b'{"image": "' + b"\\u0041" * (3 * MIB) + b'"}'),
    "json, no base64": (JSON, lambda: b'{"image": "' + _text() + b'!"}'),
    "json, numbers": (JSON, lambda: b'{"x": [' + b"1," * (10 * MIB - 10) + b"1]}"),
    "json, nested": (JSON, lambda: b'{"x": [' + b"[]," * (6 * MIB) + b"1]}"),
    "json, fields": (JSON, lambda: _of("x")),
    "json, metadata": (JSON, lambda: b'{"image": "", "metadata": ' + _of("x") + b"}"),
    "json, bad metadata": (JSON, lambda: b'{"image": "", "metadata": ' + _of("x" * 1025, 10_000) + b"}"),
    "json, bad metadata at the limit": (JSON, lambda: b'{"metadata": {' + b'"":[],' * 20_000 + b'"":[]}}'),
    "json, strings": (JSON, lambda: b'{"x": [' + b'"\\n",' * (4 * MIB - 10) + b"1]}"),
    "batch": (JSON, lambda: b'{"items": [' + b",".join([b'{"image": "' + _text()[: 600 * 1024] + b'"}'] * 32) + b"]}"),
    "batch, numbers": (JSON, lambda: b'{"items": [' + b"1," * (10 * MIB - 10) + b"1]}"),
    "batch, fields at the limit": (JSON, lambda: b'{"items": [' + _of("x", 40_000) + b"]}"),
    "batch, bad metadata at the limit": (JSON, lambda: b'{"items": [{"metadata": {' + b'"":[],' * 10**5 + b'"":[]}}]}'),
}


def _request(headers: dict[str, str], body: bytes, chunk: int = 2**18) -> Request:
    """A request whose body is there in pieces, as large as the connection may hand them on."""
    chunks = iter([body[at : at + chunk] for at in range(0, len(body), chunk)])

    async def receive() -> Message:
        await asyncio.sleep(0)
        piece = next(chunks, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": pairs}
    return Request({**scope, "state": {}}, receive)


async def _read(request: Request, share: Share, is_batch: bool) -> list[Picture | Failure]:
    settings = Settings(body_timeout_s=3600)
    try:
        if is_batch:
            return await read_batch(request, settings, time.monotonic() + 3600, share, lambda _: None)
        return [await read_picture(request, settings, time.monotonic() + 3600, share)]
    except Failure as failure:
        return [failure]


async def _longest_turn(request: Request, is_batch: bool) -> float:
    """The longest that nothing else could run, in seconds of this thread's processor time: others do not count."""
    longest, last = 0.0, time.thread_time()

    async def watch() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    with Memory(2**29).share() as share:
        await _read(request, share, is_batch)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    watching.cancel()
    return longest


@pytest.fixture(scope="module")
def decoding() -> float:
    """How long it takes on this machine to decode the base64 of a 20 MiB body at once."""
    text = _text()
    began = time.thread_time()
    base64.b64decode(text, validate=True)
    return time.thread_time() - began


@pytest.mark.parametrize("case", SLOW)
def test_no_body_holds_the_process_up(case: str, decoding: float) -> None:
    headers, make = SLOW[case]
    body = make()
    assert len(body) <= 20 * MIB or case == "json, metadata"
    turns = (asyncio.run(_longest_turn(_request(headers, body), case.startswith("batch"))) for _ in range(3))
    assert any(turn < decoding / 4 for turn in turns)


def test_a_body_is_in_memory_once_and_not_in_pieces() -> None:
    """A body of single bytes takes no more than any other."""
    request = _request(IMAGE, bytes(300_000), chunk=1)
    memory = Memory(2**29)
    with memory.share() as share:
        (picture,) = asyncio.run(_read(request, share, False))
        assert isinstance(picture, Picture)
        assert memory.held == len(picture.data) == 300_000


# ---- pictures that are cut out of JSON ----


def _decoded(document: bytes, most: int = MIB) -> dict[str, bytes]:
    """What the pictures of a flat document become."""

    async def decode() -> dict[str, bytes]:
        cut = Cut(document, most)
        with Memory(2**29).share() as share:
            return {name: await cut.decode(text, share) for name, text in json.loads(cut.rest).items()}

    return asyncio.run(decode())


def test_a_picture_is_the_same_however_its_base64_is_written() -> None:
    chance = random.Random(3)
    for size in (0, 1, 2, 3, 3000, 3072, 3073, 9215, 9216, 9217, 196_607, 196_608, 196_609, 400_000):
        picture = chance.randbytes(size)
        plain = base64.b64encode(picture)
        for text in (
            plain,
            plain.replace(b"/", b"\\/"),
            plain.replace(b"+", b"\\u002b").replace(b"=", b"\\u003D"),
            b"".join(b"\\u%04x" % byte for byte in plain),
        ):
            for form in (
                b'{"image":"%b"}',
                b'{ "image"\n:\t "%b" , "image_2": ""}',
                b'{"image_2": "", "image": "%b"}',
                b'{"image"' + b" " * 200 + b":" + b"\r\n" * 200 + b'"%b"}',
            ):
                assert _decoded(form % text)["image"] == picture


@pytest.mark.parametrize("size", [3000, 60_000, 400_000])
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (b"!", "invalid_base64"),
        (b"AAA", "invalid_base64"),
        (b"AA==AAAA", "invalid_base64"),
        (b"AA==" + b"A" * 2**19, "invalid_base64"),
        (b"\\u0021aaa", "invalid_base64"),
        (b"AAAA\\nAAAA", "invalid_base64"),
        (b"AAAA\\r\\n", "invalid_base64"),
        (b"AAAA\\u000aAAAA", "invalid_base64"),
        ("ä".encode(), "invalid_base64"),
        (b"\\u00e4", "invalid_base64"),
        (b"AAAA\n", "invalid_json"),
        (b"AAA\\q", "invalid_json"),
    ],
)
def test_what_is_no_base64_is_told_as_ever(end: bytes, code: str, size: int) -> None:
    document = b'{"image": "%b%b"}' % (base64.b64encode(bytes(size)), end)
    with Memory(2**29).share() as share:
        (failure,) = asyncio.run(_read(_request(JSON, document), share, False))
    assert isinstance(failure, Failure)
    assert failure.code == code, failure


def test_only_a_picture_is_cut_out() -> None:
    long = "A" * 200_000
    most = 10_000
    for document in (
        {"image_url": long},
        {"Image": long},
        {"metadata": {"note": f'"image": "{long}'}},
        {f'x"image": "{long}': 1},
        [long],
    ):
        with pytest.raises(Failure, match="invalid_request: body: the limit beside its pictures is 10,000 bytes"):
            Cut(json.dumps(document).encode(), most)
    for document in ({"image": long}, {"a": {"image": long}}, {"items": [{"image": long}, {"image": long}]}):
        assert "A" * 9 not in Cut(json.dumps(document).encode(), most).rest.decode()
    # In metadata there may be that key, too. What is short enough to be a value is one; what is not, is none cut out.
    value = {"metadata": {"image": "\U0001f4e6" * 1024}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert json.loads(Cut(text.encode(), 20_000).rest) == value


def test_a_long_text_in_metadata_is_no_picture(client: httpx.Client, jpeg: bytes) -> None:
    picture = base64.b64encode(jpeg).decode()
    body = {"image": picture, "metadata": {"image": picture}}
    assert_problem(client.post("/v1/predict", json=body), "invalid_metadata")
    body["metadata"] = {"image": "A" * 1024}
    answer = client.post("/v1/predict", json=body)
    assert answer.json()["metadata"] == body["metadata"], answer.text


def test_a_form_is_the_same_however_it_arrives(jpeg: bytes) -> None:
    metadata = json.dumps({"a": "\r\n--x", "b": "ä"}, ensure_ascii=False).encode()
    picture = jpeg + b"\r\n--\r\n--x\r--x--" + bytes(200_000) + b"\r\n-"
    body = part("image", picture, "p.jpg") + part("metadata", metadata) + part("model_version", b"v9") + END
    expected = {"data": picture, "metadata": json.loads(metadata), "pin": "v9", "url": None}
    for chunk in (1, 7, 1000, 2**16, 2**16 + 1, 2**20):
        with Memory(2**29).share() as share:
            (read,) = asyncio.run(_read(_request(BOUNDARY, body, chunk), share, False))
        assert {name: getattr(read, name, read) for name in expected} == expected


# ---- who is over the rate ----


def test_a_batch_over_the_rate_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nclient = "shelf"\nsha256 = "{hash_of("gwk_x")}"\nrate = 0.01\n')
    body = b'{"items": [' + b"{}," * 20 + b"{}]}"
    head = b"POST /v1/predict/batch HTTP/1.1\r\nHost: x\r\nX-API-Key: gwk_x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    limits = {"body_timeout_s": 100, "deadline_s": 100, "max_deadline_s": 100, "api_keys_file": keys}
    with GatewayProcess(free_endpoint(), tmp_path / "log", **limits) as gateway, connect(gateway.port) as connection:
        connection.sendall(head + body)
        first = receive(connection)
        assert (first.status_code, len(first.json()["results"])) == (200, 21)
        connection.sendall(head)  # and nothing of the body
        answer = receive(connection)
        assert_problem(answer, "rate_limited")
        assert int(answer.headers["Retry-After"]) == pytest.approx(2100, abs=60)


def form_of(content: bytes, end: bytes = b"\r\n--b--\r\n") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + content + end


@pytest.mark.usefixtures("without_collector")
def test_a_form_is_let_go_of_with_its_request() -> None:
    """The parser knows the form and the form the parser: until Python looked for cycles, megabytes of each stayed."""

    async def read() -> weakref.ref[Form]:
        form = Form("multipart/form-data; boundary=b", {"image": 10_000})
        await form.write(form_of(b"x" * 5000))
        form.close()
        form.require_whole()
        return weakref.ref(form)

    assert asyncio.run(read())() is None


def test_a_form_that_ends_early_is_refused(client: httpx.Client, jpeg: bytes) -> None:
    """Else its last part would be missing in silence."""
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    early = b'\r\n--b\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n{"parcel": "A-17"}'
    assert client.post("/v1/predict", content=form_of(jpeg), headers=headers).status_code == 200
    assert_problem(client.post("/v1/predict", content=form_of(jpeg, early), headers=headers), "invalid_multipart")
