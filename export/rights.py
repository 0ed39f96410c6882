"""Who may read what is published: everybody.

Triton runs as a user of its own, and a published version that it cannot read fails every release at its next start. So
the rule is about the rights of "others", whoever looks: root may read everything and would notice nothing. It is about
files and folders alone: links are not followed, and a file that is linked elsewhere is not opened.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

_FILE, _FOLDER = 0o444, 0o555


def closed(place: Path, *, deep: bool = True) -> list[Path]:
    """The files and folders, at `place` and, if `deep`, below it, that others cannot read or enter.

    Raises:
        OSError: `place` is not there.
    """
    return [path for path, _ in _closed(place, deep)]


def is_closed(place: Path) -> bool:
    """Whether others cannot read this file or enter this folder; what is below it is not looked at.

    Raises:
        OSError: `place` is not there.
    """
    return bool(closed(place, deep=False))


def open_up(place: Path, *, deep: bool = True) -> list[Path]:
    """Let everybody read `place` and what is below it; returns what was changed. No other right is touched.

    Raises:
        OSError: `place` is not there, or its rights are not ours to change.
    """
    changed = []
    for path, mode in _closed(place, deep):
        if stat.S_ISREG(mode) and path.lstat().st_nlink > 1:
            raise PermissionError(errno.EPERM, "it is linked elsewhere, and would be open there too", path)
        path.chmod(stat.S_IMODE(mode) | _wanted(mode))
        if is_closed(path):
            raise PermissionError(errno.EPERM, "this file system keeps its rights", str(path))
        changed.append(path)
    return changed


WHY = "not everybody may read it, so perhaps not Triton, and that fails every release at its next start"


def remedy(place: Path) -> str:
    """What a person has to do."""
    return f"chmod -R a+rX {shlex.quote(str(place))}"


def _wanted(mode: int) -> int:
    return _FOLDER if stat.S_ISDIR(mode) else _FILE


def _closed(place: Path, deep: bool) -> Iterator[tuple[Path, int]]:
    """Places and their modes, a folder before what is in it: who opens it can go on."""
    mode = place.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    if ~mode & _wanted(mode) & 0o007:
        yield place, mode
    if deep and stat.S_ISDIR(mode):
        with contextlib.suppress(PermissionError):  # closed for us as well, and named already
            for path in sorted(place.glob("[!.]*")):  # nobody reads what is hidden
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    yield from _closed(path, deep)
