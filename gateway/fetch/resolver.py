"""A host name -> every address it has, asked once.

By DNS alone. `getaddrinfo` would block a thread that no timeout ends, and read /etc/hosts, whose names are this
machine's and never a client's business. Nor are search domains tried: a listed name is the whole name.
"""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.resolver

from gateway.fetch.location import Address
from gateway.problems import Failure


class Resolver:
    """Asks the name servers of /etc/resolv.conf, or those that are given: `address` or `address:port`, with commas."""

    def __init__(self, nameservers: str = "") -> None:
        self._resolver = dns.asyncresolver.Resolver(configure=not nameservers)
        if nameservers:
            self._resolver.nameservers = parse_nameservers(nameservers)

    async def addresses(self, host: str) -> list[Address]:
        """Every address, IPv4 first. The caller limits the time.

        Raises:
            Failure: fetch_failed, the name has none or nobody could say.
        """
        name = dns.name.from_text(host)
        answers = await asyncio.gather(*(self._ask(name, kind) for kind in ("A", "AAAA")), return_exceptions=True)
        found = [address for answer in answers if not isinstance(answer, BaseException) for address in answer]
        if found:
            return found
        for answer in answers:
            if isinstance(answer, dns.exception.DNSException):
                raise Failure("fetch_failed", f"{host} could not be looked up ({type(answer).__name__})") from answer
            if isinstance(answer, BaseException):
                raise answer
        raise Failure("fetch_failed", f"{host} has no address")

    async def _ask(self, name: dns.name.Name, kind: str) -> list[Address]:
        try:
            answer = await self._resolver.resolve(name, kind, search=False, raise_on_no_answer=False)
        except dns.resolver.NXDOMAIN:
            return []
        return [ip_address(record.address) for record in answer]


def parse_nameservers(text: str) -> list[dns.nameserver.Nameserver]:
    """The name servers that a setting lists.

    Raises:
        ValueError: an entry is no address with or without a port.
    """
    places = [urlsplit(f"//{item.strip()}") for item in text.split(",") if item.strip()]
    return [dns.nameserver.Do53Nameserver(str(ip_address(place.hostname or "")), place.port or 53) for place in places]
