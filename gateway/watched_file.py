"""A file that is followed: its last good content stays in force when an edit is bad, and `error` says what is wrong.

Polled, not watched: inotify does not see through bind mounts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

_POLL_S = 0.4
T = TypeVar("T")


class FollowedFile(Generic[T]):
    """What `read` makes of a file, kept current by calling `follow`. No file at the start is `default`.

    `error` says what is wrong with the file as it is now; `since` is when `value` came into force (ISO 8601, UTC).

    Args:
        path: the file.
        default: the value before a good one was read.
        read: the file's value; raises `ValueError` or `OSError` where it has none, with a message for people.
        describe: what to log of a value.
        name: of the logger, and of what is followed: `gateway.<name>`.
    """

    def __init__(
        self, path: Path, default: T, read: Callable[[Path], T], describe: Callable[[T], Any], name: str
    ) -> None:
        self.path = path
        self.value = default
        self.error = ""
        self._has_been_good = False
        self.since = _now()
        self._read_value, self._describe, self._name = read, describe, name
        self._logger = logging.getLogger(f"gateway.{name}")
        self._seen = self._taken = self._read()
        if path.exists():
            self._take(self._seen)

    async def follow(self) -> None:
        """Wait a moment, and look at the file. Content is adopted after two identical reads: an edit takes its time."""
        await asyncio.sleep(_POLL_S)
        read = await asyncio.to_thread(self._read)
        if read == self._seen and read != self._taken:
            self._take(read)
        self._seen = read

    def _read(self) -> _Bad | T:
        try:
            return self._read_value(self.path)
        except FileNotFoundError:
            return _Bad(f"{self.path} is missing")
        except (OSError, ValueError, RecursionError) as error:
            return _Bad(" ".join(str(error).split()))

    def _take(self, read: _Bad | T) -> None:
        self._taken = read
        if isinstance(read, _Bad):
            self.error = str(read)
            fields = {"reason": self.error}
            stays = "the last good one stays" if self._has_been_good else "there was no good one before"
            self._logger.warning(f"bad {self._name}, {stays}", extra={"fields": fields})
            return
        self.error, self._has_been_good = "", True
        if read != self.value:
            self.value, self.since = read, _now()
        self._logger.info(self._name, extra={"fields": {self._name: self._describe(read)}})


class _Bad(str):
    """Why a file has no value."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
