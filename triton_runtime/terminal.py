"""What `make serve` shows: on a terminal its stages with their time, and news, with what its parts log in a file;
elsewhere all of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

_MOST_BYTES = 64 << 20
"""Then a new file is begun, and the one before is kept beside it."""
_LAST_LINES_S = 2.0
_WATCHER = {
    "seen": "{drop} was dropped",
    "examining": "{drop} is examined",
    "check": "{drop}: {check}",
    "published": "{drop} is published as {release}",
    "refused": "{drop} is refused: {cause}",
    "gone": "{drop} was removed",
    "repaired": "{path}: {how}",
    "stray": "{path}: {cause}",
    "trouble": "{error}",
}
"""How its events are said."""


class Terminal:
    """Shows stages and news on standard error, and writes the lines of all parts to a file. Use as a context manager.

    Args:
        path: the file; what an earlier run left there is overwritten. None: the lines go where this process writes.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._lock = threading.Lock()
        self._is_in_stage = False
        self._pipes: list[int] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            os.close(pipe)  # a thread ends with the last process that writes
        for thread in self._threads:
            thread.join(_LAST_LINES_S)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Say what is going on, and on a terminal at its end how long it took."""
        if self.path is None:
            self._say(f"{what} ...")
            yield
            return
        began = time.monotonic()
        self._say(f"{what} ... ", end="")
        self._is_in_stage = True
        try:
            yield
        finally:
            was_alone, self._is_in_stage = self._is_in_stage, False
        took = f"{time.monotonic() - began:.1f} s"
        self._say(took if was_alone else f"{what}: {took}")

    def pipe(self) -> int | None:
        """A new pipe's end for a process to write to; None where its lines go where this process writes."""
        if self.path is None:
            return None
        ours, theirs = os.pipe()
        self._pipes.append(theirs)
        self._threads.append(threading.Thread(target=self._follow, args=(os.fdopen(ours, "rb"),), daemon=True))
        self._threads[-1].start()
        return theirs

    def _follow(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._write(line)
            if text := news(line):
                if self._is_in_stage:
                    self._is_in_stage = False
                    text = f"\n{text}"
                self._say(text)

    def _write(self, line: bytes) -> None:
        assert self.path is not None
        with self._lock, contextlib.suppress(OSError):  # a full disk keeps nobody from being served
            if self._file.tell() > _MOST_BYTES:
                self._file.close()
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                self._file = self.path.open("wb")
            self._file.write(line)
            self._file.flush()

    @staticmethod
    def _say(text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


def news(line: bytes) -> str:
    """What a line of the gateway's or the watcher's log says that somebody should see at once; else nothing."""
    try:
        said: dict[str, Any] = json.loads(line)
        if said["logger"] == "export.watch":
            return f"watcher: {_WATCHER[said['event']].format_map(said)}"
        if said["level"] in ("warning", "error", "critical"):
            rest = {k: v for k, v in said.items() if k not in ("time", "level", "logger", "message", "exception")}
            return f"gateway: {', '.join([said['message'], *(f'{key}: {value}' for key, value in rest.items())])}"
    except (ValueError, TypeError, KeyError):
        pass
    return ""
