"""Writing into a live model repository: a file or a folder is there whole, or not at all, also after a crash.

Everything is written and flushed in a staging folder beside the repository (same file system, never seen by
Triton, which takes any folder whose name starts with a digit for a version), and then renamed into place. Everybody
may read what is written, whatever the umask of who writes (`export.rights`).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from export import rights


class Staging:
    """The staging folder of one repository, locked against other writers while open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    @classmethod
    @contextlib.contextmanager
    def beside(cls, repository: Path) -> Iterator[Staging]:
        """Open the staging folder beside `repository`; wait while another process has it open.

        What an interrupted run left behind is removed.
        """
        folder = repository.resolve().parent / f".{repository.resolve().name}.staging"
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _empty(folder)
            yield cls(folder)
            _empty(folder)
        finally:
            os.close(lock)

    def write_file(self, target: Path, content: bytes, *, later_than_ns: int = 0) -> None:
        """Create or replace one file, dated now or, if that is later, just after `later_than_ns`."""
        staged = self._place() / target.name
        _write(staged, content)
        if staged.stat().st_mtime_ns <= later_than_ns:
            os.utime(staged, ns=(later_than_ns + 1_000_000_000,) * 2)
        _make(target.parent)
        os.replace(staged, target)
        _flush(target.parent)

    def write_folder(self, target: Path, files: Mapping[str, bytes]) -> None:
        """Create a folder with these files, named relative to it.

        Raises:
            OSError: `target` exists and is not empty.
        """
        staged = self._place() / target.name
        _make(staged)
        for name, content in files.items():
            path = staged / name
            _make(path.parent)
            _write(path, content)
            _flush(path.parent)
        _flush(staged)
        _make(target.parent)
        os.rename(staged, target)
        _flush(target.parent)

    def remove_folder(self, target: Path) -> None:
        """Remove a folder and what is in it."""
        os.rename(target, self._place() / target.name)
        _flush(target.parent)

    def _place(self) -> Path:
        """A new folder in this one. Numbered: an error that names it says the same each time it is met."""
        place = self.folder / str(next(self._numbers))
        place.mkdir()
        return place


def _empty(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:  # nothing of ours, but it must not be in everybody's way
            leftover.unlink()


def _make(folder: Path) -> None:
    """Make a folder, and those above it, where there is none."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        rights.open_up(folder, deep=False)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        rights.open_up(path)
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
