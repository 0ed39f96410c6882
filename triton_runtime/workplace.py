"""The folder of a running server, and what one that was killed left behind.

In the checkout, where that can be written, and not among the temporary files: cleaners remove there what is ten days
old, and where nothing may be executed (`noexec`) a step's process cannot be started. It is locked for as long as its
owner lives, and a server that starts removes those in the checkout that nobody has locked, with their shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from triton_runtime.installation import SHARED_MEMORY_FOLDER
from triton_runtime.stubs import servers_since

PLACE = Path(__file__).resolve().parent.parent / ".cache" / "triton"
_ENVIRONMENTS = Path("/tmp")  # noqa: S108  # where Triton makes them, whatever TMPDIR says
_STARTING_S = 60.0
"""A server has made it by then."""


class Workplace:
    """A new folder; `name` is also what the names of the server's shared memory begin with."""

    def __init__(self, place: Path = PLACE) -> None:
        self.name = f"triton_{os.getpid()}_{time.monotonic_ns()}_"
        try:
            place.mkdir(parents=True, exist_ok=True)
            sweep(place)
            self.folder = self._make(place)
        except OSError:  # a checkout that belongs to somebody else
            self.folder = self._make(Path(tempfile.gettempdir()))
        self._since = time.time()
        self._is_removed = False

    def _make(self, place: Path) -> Path:
        """The folder, which has its name only once it is locked: a server that starts meanwhile would remove it."""
        unlocked = place / f".{self.name}"
        unlocked.mkdir(mode=0o700)
        self._lock = os.open(unlocked, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return unlocked.rename(place / self.name)

    def remove(self) -> None:
        """Once the server has ended; a second time does nothing."""
        if self._is_removed:
            return
        self._is_removed = True
        _remove(self.folder)
        os.close(self._lock)
        others = servers_since()
        for folder in _ENVIRONMENTS.glob("python_env_*"):
            # Triton makes one at its start, for packed environments, which nothing here has, and removes it when it
            # ends. One that was killed leaves it; one whose folder somebody else removed crashes at its end.
            with contextlib.suppress(OSError):
                found = folder.stat()
                is_anothers = any(_may_have_made(since, found) for since in others)
                if _may_have_made(self._since, found) and found.st_uid == os.geteuid() and not is_anothers:
                    folder.rmdir()  # only where it is empty


def sweep(place: Path = PLACE) -> None:
    """Remove what servers left whose owners were killed."""
    for folder in place.glob("triton_*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(lock)


def _may_have_made(since: float, folder: os.stat_result) -> bool:
    """Whether a server that began then may have made the folder."""
    return -1 <= folder.st_mtime - since < _STARTING_S


def _remove(folder: Path) -> None:
    for segment in SHARED_MEMORY_FOLDER.glob(f"{folder.name}*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
