"""What was fetched so far, bounded: alone, and together with what all requests hold."""

from __future__ import annotations

from io import BytesIO

from gateway.http.memory import Share
from gateway.problems import Failure


class Taken:
    """At most `limit` bytes, taken from the `share` of the request as they come, should there be one."""

    def __init__(self, limit: int, share: Share | None) -> None:
        self._limit = limit
        self._share = share
        self._body = BytesIO()

    def require(self, size: int) -> None:
        """Refuse what would be too large.

        Raises:
            Failure: fetch_too_large, overloaded.
        """
        if self._body.tell() + size > self._limit:
            raise Failure("fetch_too_large", f"the limit is {self._limit:,} bytes")
        if self._share:
            self._share.require(size)

    def write(self, data: bytes | memoryview) -> None:
        """A piece came.

        Raises:
            Failure: as `require`.
        """
        self.require(len(data))
        if self._share:
            self._share.take(len(data))
        self._body.write(data)

    def all(self) -> bytes:
        """Everything."""
        return self._body.getvalue()
