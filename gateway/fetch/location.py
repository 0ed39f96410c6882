"""What a client wrote as `image_url` -> its parts, or a refusal.

This is the only parser: resolver, connection and request line get the parts, never the text, so nothing behind it can
read the text in another way. It takes the small part of RFC 3986 that everybody reads alike, and refuses the rest
instead of repairing it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from gateway.problems import Failure

Address = IPv4Address | IPv6Address
DEFAULT_PORTS = {"https": 443, "http": 80}
MAX_LENGTH = 4096

_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?"
    rf"(?P<target>(?:/{_PCHAR}*)*(?:\?(?:{_PCHAR}|[/?])*)?)",
    re.ASCII | re.IGNORECASE,
)
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_OBJECT = re.compile(r"(?P<scheme>s3|gs)://(?P<bucket>[a-z0-9][a-z0-9._-]{1,61}[a-z0-9])/(?P<key>[^/].*)", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/-]+", re.ASCII)


@dataclass(frozen=True)
class Web:
    """A place to fetch from over HTTP. `host` is lower case, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as they go into the request line."""
    address: Address | None
    """The host, where it is written as an address."""

    @property
    def authority(self) -> str:
        """The value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """What may be told and logged of it: a path or a query may be secret."""
        return f"{self.scheme}://{self.authority}"


@dataclass(frozen=True)
class StoredObject:
    """An object in a bucket of an object store."""

    scheme: str
    bucket: str
    key: str

    @property
    def origin(self) -> str:
        """The bucket."""
        return f"{self.scheme}://{self.bucket}"


def parse(text: str) -> Web | StoredObject:
    """Parse a location.

    Raises:
        Failure: url_invalid.
    """
    if text.startswith(("s3://", "gs://")):
        return _parse_object(text)
    return parse_web(text)


def parse_web(text: str) -> Web:
    """Parse an absolute http or https URL.

    Raises:
        Failure: url_invalid.
    """
    match = _URL.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
        raise _invalid(_fault(text))
    scheme = match["scheme"].lower()
    host, address = _host(match["host"].lower())
    port = int(match["port"] or DEFAULT_PORTS[scheme])
    if port > 65535:
        raise _invalid("there is no such port")
    target = match["target"]
    return Web(scheme, host, port, target if target.startswith("/") else f"/{target}", address)


def _fault(text: str) -> str:
    """What keeps a text from being a URL that is taken."""
    if len(text) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH:,} characters"
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "it does not begin with https://" if text else "it is empty"
    if scheme.lower() not in DEFAULT_PORTS:
        return "its scheme is none of https, http, s3, gs"
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    host, _, port = authority.rpartition(":") if re.search(r":[^\]]*$", authority) else (authority, "", "80")
    if "@" in authority:
        return "it has a user or a password"
    if not host:
        return "it has no host"
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII):
        return "its port is no number from 1 to 65535"
    if re.search(r"[^A-Za-z0-9.:\[\]-]", host):
        return "its host has characters that no host name has (an international name is written as xn--...)"
    if "#" in rest:
        return "it has a fragment (#)"
    odd = re.search(rf"%(?![0-9A-Fa-f]{{2}})|(?!{_PCHAR}|[/?]|%).", rest[len(authority) :], re.ASCII | re.DOTALL)
    return f"{odd[0]!r} has to be percent-encoded" if odd else "it is not an absolute https URL as it is taken here"


def _host(text: str) -> tuple[str, Address | None]:
    """The canonical host, and the address that it is, if it is one."""
    try:
        if text.startswith("["):
            address: Address = IPv6Address(text[1:-1])
            return address.compressed, address
        # Browsers and C libraries take 127.1, 0x7f000001 and 017700000001 for addresses. Here they are nothing.
        if _NUMBER.fullmatch(text.rpartition(".")[2]):
            address = IPv4Address(text)
            return str(address), address
    except AddressValueError:
        raise _invalid("the host is an address in an unusual form") from None
    if len(text) > 253 or not _NAME.fullmatch(text):
        raise _invalid("the host is no plain name")
    return text, None


def _parse_object(text: str) -> StoredObject:
    match = _OBJECT.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None or not _KEY.fullmatch(match["key"]):
        raise _invalid("not a bucket and a key of letters, digits and plain punctuation")
    if {"", ".", ".."} & set(match["key"].split("/")):
        raise _invalid("a part of the key is empty, '.' or '..'")
    return StoredObject(match["scheme"], match["bucket"], match["key"])


def _invalid(why: str) -> Failure:
    return Failure("url_invalid", why)
