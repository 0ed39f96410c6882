"""Pictures by location, where all is well: the forms, TLS, object stores; and the bounds of time and number."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
import trustme

from gateway.fetch import objects
from gateway.fetch.fetcher import Fetcher
from gateway.fetch.location import parse
from gateway.http.memory import Memory
from gateway.problems import Failure
from gateway.settings import Settings
from tests.conftest import GatewayProcess, http, wait_for
from tests.offline import Offline
from tests.ssrf.nameserver import NameServer
from tests.ssrf.servers import Answer, Server, drip, response
from tests.test_problems import assert_problem
from triton_runtime.server import Endpoint

T = TypeVar("T")
LOOPBACK = "127.0.0.0/8"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[trustme.CA]:
    """An authority that everything started meanwhile trusts, as the operator of a private one would arrange it."""
    authority = trustme.CA()
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield authority


def tls(authority: trustme.CA, host: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(host).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    here = [("A", "127.0.0.1")]
    names = {"photos.test": here, "other.test": here, "half-dead.test": [("A", "127.0.0.9"), *here]}
    with NameServer(names) as server:
        yield server


@pytest.fixture(scope="module")
def plain(jpeg: bytes) -> Iterator[Server]:
    with Server(response(jpeg), {}) as server:
        yield server


@pytest.fixture(scope="module")
def secure(authority: trustme.CA, jpeg: bytes) -> Iterator[Server]:
    """A server with a certificate of photos.test, whatever it is asked for as."""
    with Server(response(jpeg), {}, tls=tls(authority, "photos.test")) as server:
        yield server


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run inside of an event loop what wants to be made in one."""

    async def main() -> T:
        return await work()

    return asyncio.run(main())


def settings(names: NameServer, hosts: str, **more: object) -> Settings:
    fields = {"image_hosts": hosts, "image_private_networks": LOOPBACK, "image_nameservers": names.address, **more}
    return Settings.model_validate(fields)


def fetch(settings: Settings, url: str, seconds: float = 10) -> bytes:
    return run(lambda: Fetcher(settings).fetch(url, seconds))


# ---- through the API ----


@pytest.fixture(scope="module")
def fetching(
    triton: Endpoint, names: NameServer, plain: Server, secure: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway that takes pictures from both servers; it trusts the authority."""
    hosts = f"photos.test:{secure.port}, http://photos.test:{plain.port}"
    log = tmp_path_factory.mktemp("fetching") / "log"
    with GatewayProcess(
        triton,
        log,
        deadline_s=60,
        image_hosts=hosts,
        image_private_networks=LOOPBACK,
        image_nameservers=names.address,
        image_timeout_s=20,
    ) as process:
        wait_for(process.is_ready)
        yield process


@pytest.mark.parametrize("form", ["json", "form"])
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_picture_by_location_is_answered_like_one_that_was_sent(
    fetching: GatewayProcess, plain: Server, secure: Server, offline: Offline, jpeg: bytes, scheme: str, form: str
) -> None:
    url = f"{scheme}://photos.test:{(secure if scheme == 'https' else plain).port}/parcel.jpg?signature=%2Fabc"
    place, metadata = f"{fetching.url}/v1/predict", {"parcel": "A-17"}
    headers = {"X-Request-ID": f"by-location-{scheme}-{form}"}
    if form == "json":
        answer = http.post(place, json={"image_url": url, "metadata": metadata}, headers=headers, timeout=60)
    else:
        parts = {"image_url": (None, url), "metadata": (None, json.dumps(metadata))}
        answer = http.post(place, files=parts, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    label, scores = offline.answer(jpeg)
    assert answer.json()["label"] == label
    assert answer.json()["confidence"] == pytest.approx(scores[label], abs=1e-5)
    assert answer.json()["metadata"] == metadata
    lines = [json.loads(line) for line in fetching.log.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == headers["X-Request-ID"]]
    assert 0 < line["fetch_ms"] <= answer.json()["timing_ms"]["read"]
    assert "signature" not in fetching.log.read_text()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/none", "image_empty"),
        ("/page", "fetch_unsupported"),
        ("/204 No Content", "fetch_refused"),
        ("/403 Forbidden", "fetch_refused"),
        ("/410 Gone", "fetch_refused"),
        ("/429 Too Many Requests", "fetch_failed"),
        ("/503 Service Unavailable", "fetch_failed"),
    ],
)
def test_what_is_no_picture_is_a_problem(fetching: GatewayProcess, plain: Server, path: str, code: str) -> None:
    place = path.replace(" ", "-")
    kinds = {"/none": response(b""), "/page": response(b"<html>", kind="text/html")}
    plain.answers[place] = kinds.get(path) or response(b"", "Retry-After: 600", status=path[1:])
    url = f"http://photos.test:{plain.port}{place}"
    answer = http.post(f"{fetching.url}/v1/predict", json={"image_url": url}, timeout=60)
    assert_problem(answer, code)
    assert answer.headers.get("Retry-After") == ("60" if code == "fetch_failed" else None)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "it is empty"),
        ("images/parcel.jpg", "does not begin with https://"),
        ("ftp://photos.test/x", "its scheme"),
        ("https://user:secret@photos.test/x", "a user or a password"),
        ("https:///x", "no host"),
        ("https://photos.test:99999999/x", "its port"),
        ("https://photos.test:/x", "its port"),
        ("https://m\u00fcnchen.test/x", "characters that no host name has"),
        ("https://photos.test/a b", "' ' has to be percent-encoded"),
        ("https://photos.test/100%.jpg", "'%' has to be percent-encoded"),
        ("https://photos.test/x#top", "a fragment"),
        ("https://photos.test/" + "x" * 5000, "longer than 4,096 characters"),
    ],
)
def test_what_is_wrong_with_a_location_is_said(url: str, said: str) -> None:
    with pytest.raises(Failure, match=f"url_invalid: .*{said}") as caught:
        parse(url)
    assert "secret" not in caught.value.detail


def test_where_a_name_leads_is_not_told(fetching: GatewayProcess, plain: Server) -> None:
    """Neither by the problem of a host that refuses connections, nor by one of a place that is not listed."""
    for url in (f"http://photos.test:{plain.port}/closed", f"http://other.test:{plain.port}/"):
        plain.answers["/closed"] = b""
        problem = http.post(f"{fetching.url}/v1/predict", json={"image_url": url}, timeout=60).json()
        assert problem["code"] in ("fetch_failed", "url_not_allowed")
        assert "127.0.0" not in json.dumps(problem)


# ---- TLS ----


def test_the_host_of_the_location_is_who_must_answer(names: NameServer, secure: Server, jpeg: bytes) -> None:
    """The connection goes to an address; the certificate and the Host header are the name's."""
    hosts = f"photos.test:{secure.port}, other.test:{secure.port}, https://127.0.0.1:{secure.port}"
    assert fetch(settings(names, hosts), f"https://photos.test:{secure.port}/") == jpeg
    assert f"\r\nHost: photos.test:{secure.port}\r\n" in secure.heads[-1]
    before = len(secure.heads)
    for host in ("other.test", "127.0.0.1"):
        with pytest.raises(Failure, match=r"fetch_failed: .*certificate verify failed"):
            fetch(settings(names, hosts), f"https://{host}:{secure.port}/")
    assert len(secure.heads) == before, "not a byte of a request was sent"


def test_an_unknown_authority_is_refused(names: NameServer, authority: trustme.CA, jpeg: bytes) -> None:
    with Server(response(jpeg), tls=tls(trustme.CA(), "photos.test")) as server:
        with pytest.raises(Failure, match=r"fetch_failed: .*certificate verify failed"):
            fetch(settings(names, f"photos.test:{server.port}"), f"https://photos.test:{server.port}/")
        assert not server.heads


def test_a_redirect_does_not_leave_tls(names: NameServer, plain: Server, secure: Server, jpeg: bytes) -> None:
    plain.answers["/up"] = response(b"", f"Location: https://photos.test:{secure.port}/", status="301 Moved")
    secure.answers["/down"] = response(b"", f"Location: http://photos.test:{plain.port}/", status="301 Moved")
    both = settings(names, f"photos.test:{secure.port}, http://photos.test:{plain.port}")
    assert fetch(both, f"http://photos.test:{plain.port}/up") == jpeg
    before = plain.connections
    with pytest.raises(Failure, match="url_not_allowed"):
        fetch(both, f"https://photos.test:{secure.port}/down")
    assert plain.connections == before


@pytest.mark.parametrize("noise", [b"\x17\x03\x03\x00\x05noise", b"no TLS at all"])
def test_a_broken_tls_stream_is_a_failure(names: NameServer, secure: Server, noise: bytes) -> None:
    def answer(stream: ssl.SSLSocket) -> None:
        stream.sendall(response(bytes(2000))[:1000])
        os.write(stream.fileno(), noise)  # past TLS

    secure.answers["/noise"] = answer
    with pytest.raises(Failure, match="fetch_failed"):
        fetch(settings(names, f"photos.test:{secure.port}"), f"https://photos.test:{secure.port}/noise")


# ---- addresses, time, number ----


def test_the_next_address_is_tried(names: NameServer, jpeg: bytes, plain: Server) -> None:
    allowed = settings(names, f"http://half-dead.test:{plain.port}")
    assert fetch(allowed, f"http://half-dead.test:{plain.port}/") == jpeg


@pytest.mark.parametrize(("setting", "left"), [(0.3, 60.0), (60.0, 0.3)])
def test_a_fetch_ends_with_its_time_or_the_requests(
    names: NameServer, plain: Server, setting: float, left: float
) -> None:
    plain.answers["/slow"] = drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", b"x", 0.02)
    slow = settings(names, f"http://photos.test:{plain.port}", image_timeout_s=setting)
    with pytest.raises(Failure, match=r"fetch_timeout: .* longer than 0.3 s"):
        fetch(slow, f"http://photos.test:{plain.port}/slow", left)


def test_no_more_are_fetched_at_once_than_the_setting_says(names: NameServer, plain: Server) -> None:
    plain.answers["/slow"] = drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", b"x", 0.02)
    before = plain.connections
    few = settings(names, f"http://photos.test:{plain.port}", image_fetches=2, image_timeout_s=0.5)

    async def work() -> list[str]:
        fetcher = Fetcher(few)
        fetches = [fetcher.fetch(f"http://photos.test:{plain.port}/slow", 10) for _ in range(6)]
        return [getattr(result, "code", "") for result in await asyncio.gather(*fetches, return_exceptions=True)]

    assert run(work) == ["fetch_timeout"] * 6
    assert plain.connections == before + 2


@pytest.mark.parametrize("declared", [True, False])
def test_what_is_fetched_counts_with_all_that_requests_hold(
    names: NameServer, plain: Server, jpeg: bytes, declared: bool
) -> None:
    plain.answers["/counted"] = (
        response(jpeg) if declared else b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg
    )
    allowed, url = settings(names, f"http://photos.test:{plain.port}"), f"http://photos.test:{plain.port}/counted"
    memory = Memory(2 * len(jpeg) - 1)
    with memory.share() as first, memory.share() as second:
        assert run(lambda: Fetcher(allowed).fetch(url, 10, first)) == jpeg
        assert memory.held == first.held == len(jpeg)
        with pytest.raises(Failure, match="overloaded"):
            run(lambda: Fetcher(allowed).fetch(url, 10, second))
    assert memory.held == 0


# ---- object stores ----

FILED = ("Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT", 'ETag: "x"')


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, jpeg: bytes) -> Iterator[Server]:
    """What both stores speak: GET of bucket and key. The process is pointed to it as an operator would do it."""
    answers: dict[str, Answer] = {
        "/parcels/a/b.jpg": response(jpeg, *FILED, kind="binary/octet-stream"),
        "/parcels/a%2Fb%2Ejpg": response(jpeg, *FILED),
        "/parcels/large": response(bytes(5000), *FILED),
        "/parcels/slow": drip(response(b"", *FILED).replace(b"Length: 0", b"Length: 900"), b"x", 0.02),
        "/parcels/denied": response(b"<Error/>", status="403 Forbidden", kind="application/xml"),
        "/parcels/broken": response(b"", status="500 Internal Server Error"),
    }
    with Server(response(b"<Error/>", status="404 Not Found", kind="application/xml"), answers) as server:
        url = f"http://127.0.0.1:{server.port}"
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "access-key",
            "AWS_SECRET_ACCESS_KEY": "secret-key",
            "AWS_REGION": "eu-central-1",
            "GOOGLE_BASE_URL": url,
            "GOOGLE_ALLOW_HTTP": "true",
            "GOOGLE_SKIP_SIGNATURE": "true",
        }.items():
            monkeypatch.setenv(name, value)
        objects._store.cache_clear()
        yield server
        objects._store.cache_clear()


BUCKETS = Settings(image_hosts="s3://parcels, gs://parcels")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_is_fetched_with_the_credentials_of_the_process(store: Server, jpeg: bytes, scheme: str) -> None:
    assert fetch(BUCKETS, f"{scheme}://parcels/a/b.jpg") == jpeg
    (head,) = store.heads
    assert ("Credential=access-key/" in head) == (scheme == "s3")
    assert "secret-key" not in head


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("s3://parcels/none", "fetch_refused"),
        ("s3://parcels/denied", "fetch_store_failed"),
        ("s3://parcels/broken", "fetch_store_failed"),
        ("gs://parcels/none", "fetch_refused"),
        ("s3://parcels/large", "fetch_too_large"),
        ("gs://parcels/large", "fetch_too_large"),
        ("s3://parcels/slow", "fetch_timeout"),
        ("gs://parcels/slow", "fetch_timeout"),
        ("s3://other/a/b.jpg", "url_not_allowed"),
    ],
)
def test_an_object_that_cannot_be_had_has_a_code(store: Server, url: str, code: str) -> None:
    with pytest.raises(Failure) as caught:
        fetch(BUCKETS.model_copy(update={"max_body_bytes": 4096}), url, 0.5)
    assert caught.value.code == code
    assert str(store.port) not in caught.value.detail, "the endpoint is the operator's business"


def test_without_the_extra_it_says_what_to_install(store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(Failure, match="fetch_not_installed: s3:// needs the package obstore"):
        fetch(BUCKETS, "s3://parcels/a/b.jpg")
    assert not store.heads


# ---- settings ----


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_hosts", "https://photos.test/parcels", "without a path"),
        ("image_hosts", "https://photos.test/", "without a path"),
        ("image_hosts", "user@photos.test", "expected"),
        ("image_hosts", "ftp://photos.test", "expected"),
        ("image_hosts", "photos.test, *.test", "two labels"),
        ("image_hosts", "*", "expected"),
        ("image_hosts", "127.1", "expected"),
        ("image_hosts", "s3://parcels/key", "without a key"),
        ("image_private_networks", "10.0.0.1/8", "host bits"),
        ("image_private_networks", "intranet", "network"),
        ("image_nameservers", "ns.test", "address"),
    ],
)
def test_a_wrong_setting_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"GATEWAY_{setting.upper()}", value)
    with pytest.raises(SystemExit, match=rf"GATEWAY_{setting.upper()}='.*{message}"):
        Settings.read()
