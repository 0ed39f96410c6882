"""One GET over HTTP to addresses that were checked: to the end of the picture, to a redirect, or to a failure.

By httpcore, because it does so little: it knows no redirects, cookies, proxies, environment or decompression that one
would have to switch off, and takes the parts of a URL as they are. Every connection serves one request and is closed:
kept ones would outlive the answer of the name server that they were checked by.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpcore

from gateway import __version__
from gateway.fetch.location import Address, Web
from gateway.fetch.taken import Taken
from gateway.problems import Failure

_REDIRECTS = (301, 302, 303, 307, 308)
_NO_CONNECTION = (httpcore.NetworkError, httpcore.TimeoutException)


_LATER = {408, 425, 429}
"""Not the location's fault: the same request may be answered later."""
_MAX_RETRY_AFTER_S = 60

_PICTURE = re.compile(r"image/[a-z0-9.+-]+|(?:application|binary)/octet-stream")  # the last is S3's default


@dataclass(frozen=True)
class Redirect:
    """Where the server says that the picture is: as it was sent, not yet looked at."""

    location: str


async def get(location: Web, addresses: Sequence[Address], tls: ssl.SSLContext, taken: Taken) -> bytes | Redirect:
    """Fetch into `taken`. The certificate must be the host's. The caller limits the time.

    Raises:
        Failure: fetch_refused, fetch_failed, fetch_unsupported, fetch_too_large or overloaded.
    """
    host, scheme, target = (part.encode("ascii") for part in (location.host, location.scheme, location.target))
    headers: dict[bytes | str, bytes | str] = {
        "Host": location.authority,
        "User-Agent": f"parcel-defect-gateway/{__version__}",
        "Accept": "image/*, application/octet-stream",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    connection = httpcore.AsyncHTTPConnection(
        httpcore.Origin(scheme, host, location.port), tls, network_backend=_Pinned(addresses)
    )
    url = httpcore.URL(scheme=scheme, host=host, port=location.port, target=target)
    try:
        async with connection, connection.stream("GET", url, headers=headers) as response:
            return await _read(location, response, taken)
    except (*_NO_CONNECTION, httpcore.ProtocolError, ssl.SSLError) as error:
        # Only what TLS says is told: an operating system's message may name an address of this network.
        reason = f": {error}" if isinstance(error.__context__, ssl.SSLError) else f" ({type(error).__name__})"
        raise Failure("fetch_failed", f"{location.origin} gave no answer{reason}") from error


async def _read(location: Web, response: httpcore.Response, taken: Taken) -> bytes | Redirect:
    # A header that was sent twice is joined, so that no second value hides behind a good first one.
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if response.status in _REDIRECTS and "location" in headers:
        return Redirect(headers["location"])
    if response.status != 200:
        raise _refusal(location, response.status, headers.get("retry-after", ""))
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _PICTURE.fullmatch(kind):
        raise Failure("fetch_unsupported", f"{location.origin} sent {kind[:64] or 'no content type'}, not image/*")
    if (encoding := headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise Failure("fetch_unsupported", f"{location.origin} sent it compressed ({encoding[:64]})")
    declared = headers.get("content-length", "")
    if declared.isdigit():
        taken.require(int(declared))
    async for chunk in response.aiter_stream():
        taken.write(chunk)
    return taken.all()


def _refusal(location: Web, status: int, retry_after: str) -> Failure:
    """What an answer without a picture means: that there is none to be had, or none now."""
    answered = f"{location.origin} answered with status {status}"
    if status < 500 and status not in _LATER:
        return Failure("fetch_refused", answered)
    seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0
    return Failure("fetch_failed", answered, min(seconds, _MAX_RETRY_AFTER_S) or None)


class _Pinned(httpcore.AnyIOBackend):
    """Connects to the addresses that were checked, whatever the host is called: no name is looked up again."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """The first that takes the connection; one that does not answer holds the next up for half a second."""
        for address in self._addresses[:-1]:
            try:
                async with asyncio.timeout(0.5):
                    return await super().connect_tcp(str(address), port)
            except (*_NO_CONNECTION, TimeoutError):
                continue
        return await super().connect_tcp(str(self._addresses[-1]), port)
