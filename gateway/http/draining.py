"""The time between a signal and the end of the listener: not ready any more, and still answering.

Whoever sends requests here learns of the end only after a while: a load balancer at its next health check, a cluster
when it has told all its nodes. Until then requests are accepted and answered, each with `Connection: close`.
"""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn

logger = logging.getLogger("gateway")
_TICK_S = 0.1


class Draining:
    """Whether it has begun. Health and connections look at it; `Server` begins it."""

    def __init__(self) -> None:
        self.has_begun = False


class Server(uvicorn.Server):
    """Uvicorn's server, which drains for `seconds` after the first signal. A second signal cuts that short."""

    def __init__(self, config: uvicorn.Config, draining: Draining, seconds: float) -> None:
        super().__init__(config)
        self._draining = draining
        self._seconds = seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._draining.has_begun and self._seconds:
            self._seconds = 0.0
        else:
            super().handle_exit(sig, frame)

    async def main_loop(self) -> None:
        """Until a signal comes, and for as long as draining takes."""
        await super().main_loop()
        self._draining.has_begun = True
        logger.info("draining", extra={"fields": {"seconds": self._seconds}})
        loop = asyncio.get_running_loop()
        since, ticks = loop.time(), 0
        while loop.time() - since < self._seconds:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            await self.on_tick(ticks)  # which keeps the Date of answers
