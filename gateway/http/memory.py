"""How much of the memory the pictures of all requests may take together, from their first byte to their answer.

A limit for each body bounds nothing where there may be a thousand of them. What counts is what came, not what was
announced: who declares much and sends nothing takes no room. Where there is none left, the largest of those that are
still being received makes room for a smaller one, so that large uploads, slow ones above all, shut no small ones out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric

from gateway.metrics import gauge
from gateway.problems import Failure


class Memory:
    """What all requests hold; `limit` and `held` are in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._growing: dict[Share, Callable[[Callable[[], Failure]], None]] = {}
        """Those that are being received, and what ends that."""

    def share(self) -> Share:
        """One request's part, for the length of a `with` block."""
        return Share(self)

    def gauges(self) -> Iterator[Metric]:
        """For the page of metrics."""
        yield gauge("gateway_held_bytes", "Bytes of bodies and pictures that requests hold.", self.held)

    def begin(self, share: Share, end: Callable[[Callable[[], Failure]], None]) -> None:
        """A share may have to make room: `end` ends its request with a failure."""
        self._growing[share] = end

    def stop(self, share: Share) -> None:
        """It need not any more."""
        self._growing.pop(share, None)

    def largest(self) -> Share | None:
        """Who would have to make room."""
        return max(self._growing, key=lambda share: share.held, default=None)

    def end(self, share: Share) -> None:
        """Have it make room."""
        self._growing.pop(share)(lambda: _full("a smaller request needed the room"))
        share.give_back(share.held)


class Share:
    """What one request holds, in bytes; all of it is given back at the end of its block."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.held = 0

    def __enter__(self) -> Share:
        """Begin the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what is held."""
        self.stop()
        self.give_back(self.held)

    def begin(self, end: Callable[[Callable[[], Failure]], None]) -> None:
        """The request is being received from now on, and `end` ends it with a failure."""
        self._memory.begin(self, end)

    def stop(self) -> None:
        """It was received."""
        self._memory.stop(self)

    def require(self, size: int) -> None:
        """Refuse what could not be taken, as far as can be told.

        Raises:
            Failure: overloaded.
        """
        if self._memory.held + size > self._memory.limit:
            self._larger(size)

    def take(self, size: int) -> None:
        """Hold so many bytes more, and have larger requests make room where there is none.

        Raises:
            Failure: overloaded.
        """
        memory = self._memory
        while memory.held + size > memory.limit:
            memory.end(self._larger(size))
        self.held += size
        memory.held += size

    def _larger(self, size: int) -> Share:
        """Who makes room for so many bytes more."""
        other = self._memory.largest()
        if other is None or other.held <= self.held + size:
            raise _full(f"{self._memory.held:,} bytes are held already")
        return other

    def give_back(self, size: int) -> None:
        """Hold so many bytes less."""
        self.held -= size
        self._memory.held -= size


def _full(why: str) -> Failure:
    return Failure("overloaded", f"there is no memory for it: {why}")
