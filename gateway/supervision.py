"""Background tasks that nobody waits for: none of them ends unseen.

What is to go on forever goes on after an exception, too: it is logged, counted and, after a moment, tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
logger = logging.getLogger("gateway.supervision")

failures: Counter[str] = Counter()
"""Exceptions of the tasks of this process, by the task's name."""


class Tasks:
    """The background tasks of one owner, who closes them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many are running."""
        return len(self._running)

    def repeat(self, name: str, work: Callable[[], Awaitable[bool | None]]) -> None:
        """Do `work` again and again, until it returns True."""
        self._start(_repeat(name, work))

    def once(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` once."""

        async def run() -> None:
            try:
                await work()
            except Exception:
                failed(name)

        self._start(run())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel what is running."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def failed(name: str) -> None:
    """Log and count the exception that is being handled."""
    failures[name] += 1
    logger.exception("background task failed", extra={"fields": {"task": name}})


async def _repeat(name: str, work: Callable[[], Awaitable[bool | None]]) -> None:
    pause = _FIRST_PAUSE_S
    while True:
        try:
            if await work():
                return
            pause = _FIRST_PAUSE_S
        except Exception:
            failed(name)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
