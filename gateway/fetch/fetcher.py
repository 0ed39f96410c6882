"""A location that a client sent, or was redirected to -> the bytes behind it.

Bounded in time, size and number. Each step of the way is looked up, checked and fetched by itself.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from urllib.parse import urljoin

from gateway.fetch import objects, web
from gateway.fetch.allowed import Allowed
from gateway.fetch.location import StoredObject, Web, parse, parse_web
from gateway.fetch.resolver import Resolver
from gateway.fetch.taken import Taken
from gateway.http.memory import Share
from gateway.problems import Failure
from gateway.settings import Settings

MAX_REDIRECTS = 3
_VISIBLE = re.compile(r"[!-\[\]-~]+")  # ASCII without controls, space and backslash


class Fetcher:
    """Fetches for every request of the process; off without `GATEWAY_IMAGE_HOSTS`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowed = Allowed.of(settings.image_hosts, settings.image_private_networks)
        self._places = asyncio.Semaphore(settings.image_fetches)
        if self._allowed.origins:
            self._resolver = Resolver(settings.image_nameservers)
            self._tls = ssl.create_default_context()  # what the system trusts; SSL_CERT_FILE names another file

    async def fetch(self, url: str, seconds: float, share: Share | None = None) -> bytes:
        """The bytes behind a location, not yet looked at, within `seconds` and within `GATEWAY_IMAGE_TIMEOUT_S`.

        They are taken from the `share` of the request as they come, should there be one.

        Raises:
            Failure: url_invalid, url_not_allowed, overloaded, or a code that begins with fetch_.
        """
        if not self._allowed.origins:
            raise Failure("url_not_allowed", "this service takes no pictures by location")
        location = parse(url)
        self._allowed.require_origin(location)
        seconds = min(seconds, self._settings.image_timeout_s)
        taken = Taken(self._settings.max_body_bytes, share)
        try:
            async with asyncio.timeout(seconds), self._places:
                if isinstance(location, StoredObject):
                    return await objects.get(location, taken)
                return await self._follow(location, taken)
        except TimeoutError:
            raise Failure("fetch_timeout", f"{location.origin} took longer than {seconds:.3g} s") from None

    async def _follow(self, location: Web, taken: Taken) -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            answer = await self._get(location, taken)
            if isinstance(answer, bytes):
                return answer
            location = self._redirected(location, answer.location)
        raise Failure("fetch_refused", f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, location: Web, taken: Taken) -> bytes | web.Redirect:
        """Look the host up once, check every address, and connect to these."""
        addresses = [location.address] if location.address else await self._resolver.addresses(location.host)
        for address in addresses:
            self._allowed.require_address(location, address)
        return await web.get(location, addresses, self._tls, taken)

    def _redirected(self, source: Web, target: str) -> Web:
        """The next location: by the same rules as the first, and not from https to http."""
        try:
            if not _VISIBLE.fullmatch(target):
                raise Failure("url_invalid", "characters that no URL has")
            location = parse_web(urljoin(f"{source.origin}{source.target}", target))
            self._allowed.require_origin(location)
            if (source.scheme, location.scheme) == ("https", "http"):
                raise Failure("url_not_allowed", "from https to http")
        except (Failure, ValueError) as error:
            # Where to is not told: it is between the operator and that host.
            code = error.code if isinstance(error, Failure) else "url_invalid"
            raise Failure(code, f"{source.origin} redirects to where this service does not go") from error
        return location
