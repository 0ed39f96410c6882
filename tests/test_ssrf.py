"""Tricks against pictures by location: a real name server, real sockets, and canaries that must stay silent."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import psutil
import pytest

from gateway.fetch.allowed import is_public
from gateway.fetch.fetcher import Fetcher
from gateway.problems import Failure
from gateway.settings import Settings
from tests.conftest import wait_for
from tests.ssrf.corpus import (
    CHAINS,
    FAILED,
    GONE,
    INVALID,
    LITERALS,
    NAMES,
    REACHABLE,
    REDIRECTS,
    REFUSED,
    TEXTS,
    TIMEOUT,
    TOO_LARGE,
    UNANSWERED,
    UNSUPPORTED,
)
from tests.ssrf.nameserver import NameServer, Records
from tests.ssrf.servers import Answer, Server, drip, response

Fetch = Callable[[str], str]
PICTURE = b"the bytes of a picture"
FETCHED = "fetched"
LIMIT = 64 * 1024
CANARIES = ("127.0.0.1", "127.0.0.2", "::1")
LOOPBACK = "127.0.0.0/8,::1/128"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"


@dataclass
class Network:
    """What a trick plays with."""

    names: NameServer
    start: Server
    canaries: list[Server]
    run: asyncio.Runner

    @property
    def port(self) -> int:
        return self.canaries[0].port

    @property
    def seen(self) -> int:
        return sum(canary.connections for canary in self.canaries)

    def fill(self, text: str) -> str:
        return text.replace("{port}", str(self.port)).replace("{start}", str(self.start.port))

    def fetcher(self, hosts: str, networks: str = "", seconds: float = 5.0) -> Fetch:
        """A function that fetches with these settings, and says with which code that failed."""
        settings = Settings(
            image_hosts=self.fill(hosts),
            image_private_networks=networks,
            image_nameservers=self.names.address,
            image_timeout_s=seconds,
            max_body_bytes=LIMIT,
        )

        async def make() -> Fetcher:
            return Fetcher(settings)

        fetcher = self.run.run(make())

        def fetch(url: str) -> str:
            try:
                data = self.run.run(fetcher.fetch(self.fill(url), 60))
            except Failure as failure:
                if "127." in failure.detail and "127." not in url:
                    return f"{failure.code}, which tells an address of this network"
                return failure.code
            assert data == PICTURE
            return FETCHED

        return fetch


def redirect(target: str) -> bytes:
    return response(b"", f"Location: {target}", status="302 Found")


def at_length(text: str) -> bytes:
    return HEAD + f"Content-Length: {text}\r\n\r\n".encode()


def flood(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(bytes(65536))


def stall(first: bytes) -> Callable[[socket.socket], None]:
    """`first`, and nothing until the client has had enough."""

    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        connection.recv(1)

    return send


# What start.test answers, and the code of it.
ANSWERS: dict[str, tuple[Answer, str]] = {
    "larger than the limit, and says so": (at_length(str(LIMIT + 1)) + bytes(LIMIT + 1), TOO_LARGE),
    "says that it is huge": (at_length("99999999999999999999"), TOO_LARGE),
    "larger than the limit, in chunks": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + bytes(0x8000) + b"\r\n8000\r\n" + bytes(0x8000)
        + b"\r\n1\r\n0\r\n0\r\n\r\n",
        TOO_LARGE,
    ),
    "without end": (flood, TOO_LARGE),
    "without a byte": (stall(b""), TIMEOUT),
    "a status line that never ends": (drip(b"HTTP/1.1 200 O", b"K", 0.02), TIMEOUT),
    "headers that never end, slowly": (drip(HEAD, b"X-More: 1\r\n", 0.02), TIMEOUT),
    "headers that never end, fast": (drip(HEAD + b"X: ", b"x" * 65536, 0), FAILED),
    "interim responses forever": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), TIMEOUT),
    "a body that trickles": (drip(at_length("5000"), b"x", 0.02), TIMEOUT),
    "a body that stops": (stall(at_length("5000") + b"x" * 10), TIMEOUT),
    "a body that ends early": (at_length("5000") + b"x" * 10, FAILED),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nsecrets", FAILED),
    "a length that is no number": (at_length("0x10") + bytes(16), FAILED),
    "a chunk that is none": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", FAILED),
    "gzip as transfer encoding": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", FAILED),
    "a bomb": (response(gzip.compress(bytes(2**24)), "Content-Encoding: gzip"), UNSUPPORTED),
    "compressed twice": (response(b"x", "Content-Encoding: identity", "Content-Encoding: br"), UNSUPPORTED),
    "a page": (response(b"<html>", kind="text/html"), UNSUPPORTED),
    "a page that redirects": (response(b"<meta http-equiv=refresh>", "Refresh: 0", kind="text/html"), UNSUPPORTED),
    "JSON": (response(b'{"AccessKeyId": "..."}', kind="application/json"), UNSUPPORTED),
    "plain text": (response(b"root:x:0:0", kind="text/plain; charset=utf-8"), UNSUPPORTED),
    "no type": (response(PICTURE, kind=""), UNSUPPORTED),
    "two types": (response(PICTURE, "Content-Type: text/html"), UNSUPPORTED),
    "nothing there": (response(b"", status="404 Not Found"), GONE),
    "a created picture": (response(PICTURE, "Location: /ok", status="201 Created"), GONE),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", GONE),
    "a part": (response(PICTURE, status="206 Partial Content"), GONE),
    "a choice": (response(b"", "Location: /ok", status="300 Multiple Choices"), GONE),
    "a redirect to nowhere": (response(b"", status="302 Found"), GONE),
    "two redirects": (response(b"", "Location: /ok", "Location: /ok", status="302 Found"), INVALID),
    "a demand for a password": (response(b"", "WWW-Authenticate: Basic", status="401 Unauthorized"), GONE),
    "a demand of a proxy": (response(b"", "Proxy-Authenticate: NTLM", status="407 Unauthorized"), GONE),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", FAILED),
    "HTTP/0.9": (PICTURE, FAILED),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", FAILED),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46", FAILED),
    "nothing": (b"", FAILED),
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    names: dict[str, Records | tuple[Records, ...] | str] = {
        "photos.test": [("A", "127.0.0.1")],
        "start.test": [("A", "127.0.0.1")],
        "moves.names.test": ([("A", "127.0.0.1")], [("A", "127.0.0.2")]),
        "moves-in.names.test": ([("A", "127.0.0.2")], [("A", "127.0.0.1")]),
        "moves-on-a-redirect.test": ([("A", "127.0.0.1")], [("A", "127.0.0.2")]),
        **{f"{name}.names.test": records for name, records in NAMES.items()},
        **{f"{name}.names.test": records for name, (records, _) in UNANSWERED.items()},
    }
    answers: dict[str, Answer] = {"/ok": response(PICTURE)}
    with contextlib.ExitStack() as stack:
        canaries = [stack.enter_context(Server(response(PICTURE), address=CANARIES[0]))]
        for address in CANARIES[1:]:
            canaries.append(stack.enter_context(Server(response(PICTURE), address=address, port=canaries[0].port)))
        start = stack.enter_context(Server(response(b"", status="404 Not Found"), answers))
        run = stack.enter_context(asyncio.Runner())
        network = Network(stack.enter_context(NameServer(names)), start, canaries, run)
        for source, target in {**CHAINS, **{at(case): target for case, (target, _) in REDIRECTS.items()}}.items():
            answers[source] = redirect(network.fill(target))
        answers.update({at(case): answer for case, (answer, _) in ANSWERS.items()})
        yield network


@pytest.fixture(scope="module")
def reads_text(network: Network) -> Fetch:
    """One host and one bucket are listed, and every loopback address is permitted."""
    return network.fetcher("http://photos.test:{port}, s3://parcels", LOOPBACK)


@pytest.fixture(scope="module")
def publicly(network: Network) -> Fetch:
    """The names are listed, nothing else is permitted."""
    return network.fetcher("http://*.names.test:{port}")


@pytest.fixture(scope="module")
def on_loopback(network: Network) -> Fetch:
    """The names are listed and every loopback address is permitted."""
    return network.fetcher("http://*.names.test:{port}", LOOPBACK)


@pytest.fixture(scope="module")
def from_start(network: Network) -> Fetch:
    """What redirects is listed and permitted; the names are listed."""
    return network.fetcher("http://start.test:{start}, http://*.names.test:{port}", "127.0.0.1/32")


@pytest.fixture(scope="module")
def impatiently(network: Network) -> Fetch:
    """The server that misbehaves is listed and permitted; it has 0.4 s."""
    return network.fetcher("http://start.test:{start}", "127.0.0.1/32", seconds=0.4)


def at(case: str) -> str:
    return f"/{urllib.parse.quote(case, safe='')}"


# ---- the text of a location ----


@pytest.mark.parametrize("case", TEXTS)
def test_a_location_is_read_in_one_way_or_not_at_all(network: Network, reads_text: Fetch, case: str) -> None:
    url, code = TEXTS[case]
    before = network.seen
    assert reads_text(url) == code
    assert network.seen == before


@pytest.mark.parametrize(
    "url", ["http://photos.test:{port}/", "HTTP://PHOTOS.Test:{port}", "http://photos.test:{port}?x"]
)
def test_the_listed_host_itself_is_fetched(network: Network, reads_text: Fetch, url: str) -> None:
    before = network.seen
    assert reads_text(url) == FETCHED
    assert network.seen == before + 1


# ---- where a name leads ----


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_name_does_not_open_this_network(network: Network, publicly: Fetch, name: str) -> None:
    before = network.seen
    assert publicly(f"http://{name}.names.test:{{port}}/") == REFUSED
    assert network.seen == before


@pytest.mark.parametrize("name", REACHABLE)
def test_the_canaries_would_notice(network: Network, on_loopback: Fetch, name: str) -> None:
    """The same locations with the same name server, once their addresses are permitted."""
    before = network.seen
    assert on_loopback(f"http://{name}.names.test:{{port}}/") == FETCHED
    assert network.seen == before + 1


@pytest.mark.parametrize("host", LITERALS)
def test_a_listed_address_must_be_public_as_well(network: Network, host: str) -> None:
    before = network.seen
    assert network.fetcher(f"http://{host}:{{port}}")(f"http://{host}:{{port}}/") == REFUSED
    assert network.seen == before


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]"])
def test_a_listed_address_that_is_permitted_is_fetched(network: Network, host: str) -> None:
    assert network.fetcher(f"http://{host}:{{port}}", LOOPBACK)(f"http://{host}:{{port}}/") == FETCHED


@pytest.mark.parametrize("name", UNANSWERED)
def test_a_name_without_an_address_is_a_failure(network: Network, name: str) -> None:
    fetch = network.fetcher("http://*.names.test:{port}", LOOPBACK, seconds=0.4)
    assert fetch(f"http://{name}.names.test:{{port}}/") == UNANSWERED[name][1]


def test_a_name_is_asked_for_once_and_that_answer_is_used(network: Network) -> None:
    """The name server names 127.0.0.1, then 127.0.0.2: the check and the connection see the same answer."""
    fetch = network.fetcher("http://*.names.test:{port}", "127.0.0.1/32")
    seen = [canary.connections for canary in network.canaries]
    assert fetch("http://moves.names.test:{port}/") == FETCHED
    assert network.names.asked["moves.names.test", "A"] == 1
    assert network.names.asked["moves.names.test", "AAAA"] == 1
    assert fetch("http://moves.names.test:{port}/") == REFUSED
    assert fetch("http://moves-in.names.test:{port}/") == REFUSED
    assert fetch("http://moves-in.names.test:{port}/") == FETCHED
    assert [canary.connections for canary in network.canaries] == [seen[0] + 2, seen[1], seen[2]]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((text, True) for text in ("8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.0", "172.15.255.255")),
        *((text, True) for text in ("172.32.0.0", "169.253.255.255", "192.0.1.0", "198.17.255.255", "198.20.0.0")),
        *((text, True) for text in ("223.255.255.255", "2606:4700::1111", "2a00:1450:4001:800::200e", "2001:200::1")),
        *((text, False) for text in ("100.127.255.255", "172.16.0.0", "198.19.255.255", "224.0.0.0", "192.0.0.8")),
        *((text, False) for text in ("1fff::1", "4000::1", "2001:1ff:ffff::1", "2002:ffff::1", "3fff:fff::1")),
    ],
)
def test_what_counts_as_public(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


# ---- redirects ----


@pytest.mark.parametrize("case", REDIRECTS)
def test_a_redirect_is_held_to_the_same_rules(network: Network, from_start: Fetch, case: str) -> None:
    before = network.seen, network.start.connections
    assert from_start("http://start.test:{start}" + at(case)) == REDIRECTS[case][1]
    assert network.seen == before[0]
    assert 1 <= network.start.connections - before[1] <= 4


def test_three_redirects_are_followed(network: Network, from_start: Fetch) -> None:
    assert from_start("http://start.test:{start}/chain-2") == FETCHED


def test_a_redirect_to_the_same_name_is_looked_up_and_checked_again(network: Network) -> None:
    fetch = network.fetcher("http://moves-on-a-redirect.test:{start}", "127.0.0.1/32")
    assert fetch("http://moves-on-a-redirect.test:{start}/chain-4") == REFUSED
    assert network.names.asked["moves-on-a-redirect.test", "A"] == 2


# ---- answers ----


@pytest.mark.parametrize("case", ANSWERS)
def test_a_bad_answer_has_a_code_and_an_end(network: Network, impatiently: Fetch, case: str) -> None:
    began = time.monotonic()
    assert impatiently("http://start.test:{start}" + at(case)) == ANSWERS[case][1]
    assert time.monotonic() - began < 5  # of 0.4 s; a loaded machine needs longer


def test_nothing_is_sent_that_was_not_asked_for(network: Network, from_start: Fetch) -> None:
    network.start.answers["/cookie"] = response(b"", "Set-Cookie: a=b", "Location: /ok?a=%20b", status="302 Found")
    network.start.answers["/ok?a=%20b"] = response(PICTURE)
    assert from_start("http://start.test:{start}/cookie") == FETCHED
    line, *headers = network.start.heads[-1].split("\r\n")
    assert line == "GET /ok?a=%20b HTTP/1.1"
    names = [header.partition(":")[0] for header in headers if header]
    assert names == ["Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"]
    assert network.fill("Host: start.test:{start}") in headers


def test_no_connection_is_left_open(network: Network, impatiently: Fetch) -> None:
    process = psutil.Process()
    before = len(process.net_connections("tcp"))
    for case in ("without a byte", "without end", "a body that stops", "JSON", "nothing there"):
        impatiently("http://start.test:{start}" + at(case))
    wait_for(lambda: len(process.net_connections("tcp")) <= before, 5)
