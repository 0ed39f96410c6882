"""The routing file, followed. A bad edit keeps the last good routing, and says so.

Polled, not watched: inotify does not see through bind mounts.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from pathlib import Path

from contract import parse_release_name
from contract.routing import Routing

_POLL_S = 0.4
logger = logging.getLogger("gateway.routing")


class RoutingFile:
    """The last good routing of a file, kept current by `follow`. No file at the start is the default routing.

    `error` says what is wrong with the file as it is now; `since` is when `routing` came into force (ISO 8601, UTC).
    """

    def __init__(self, path: Path, pipeline: str) -> None:
        self._path = path
        self._pipeline = pipeline
        self.routing = Routing()
        self.error = ""
        self.since = _now()
        self._seen = self._taken = self._read()
        if path.exists():
            self._take(self._seen)

    async def follow(self) -> None:
        """Look at the file for ever. What it says counts once it was read twice: an edit may be half-way through."""
        while True:
            await asyncio.sleep(_POLL_S)
            read = await asyncio.to_thread(self._read)
            if read == self._seen and read != self._taken:
                self._take(read)
            self._seen = read

    def _read(self) -> Routing | str:
        """The routing, or what is wrong with the file."""
        try:
            routing = Routing.read(self._path)
        except FileNotFoundError:
            return f"{self._path} is missing"
        except (OSError, ValueError, RecursionError) as error:
            return " ".join(str(error).split())
        for name in routing.releases():
            parsed = parse_release_name(name)
            if parsed is None or parsed[0] != self._pipeline:
                return f"{self._path}: {name} is no release of the pipeline {self._pipeline}"
        return routing

    def _take(self, read: Routing | str) -> None:
        self._taken = read
        if isinstance(read, str):
            self.error = read
            logger.warning("bad routing, the last good one stays", extra={"fields": {"reason": read}})
            return
        self.error = ""
        if read != self.routing:
            self.routing, self.since = read, _now()
        logger.info("routing", extra={"fields": {"routing": read.model_dump(exclude_none=True)}})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
