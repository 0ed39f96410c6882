"""Everything below a folder, whatever somebody put there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def below(folder: Path) -> Iterator[Path]:
    """Files, folders and links below a folder, at any depth. Links are not followed.

    What cannot be looked at is left out: what others closed or just removed, and what lies so deep that its path is too
    long for the system (`rglob` would raise an error for all of it).
    """
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))
