"""A load: so many requests in flight, or so many begun a second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Exactly one of the two: `concurrency` requests in flight at any time, or `request_rate` begun a second."""

    concurrency: int | None = None
    request_rate: float | None = None

    def __str__(self) -> str:
        return self.short if self.request_rate else f"{self.short} in flight"

    @property
    def short(self) -> str:
        """For tables: `16` in flight, `10/s`."""
        return f"{self.request_rate:g}/s" if self.request_rate else str(self.concurrency)
