"""Pictures that end the process which works on them: suspected, tried alone, refused, and remembered for a while.

Triton says which process of a step died, but says the same to the call that ended it and to each that finds it dead
later. So what tells them apart is when a call was sent: before the death was known, or after it.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

import contract
from contract import Manifest

SUSPECT = 2
"""Marks from which a picture goes alone, and no other suspect beside it. The death of a step's process is as many; that
of a whole server, which ends for many reasons and with many pictures in it, is one."""
GUILTY = 3
"""Marks from which a picture that was alone in its call is not sent again."""
_ONE_DEATH_S = 1.0
"""A process that was found dead so long ago, and is dead again, was started anew in between."""
_REMEMBERED_S = 600.0
_MOST_REMEMBERED = 10_000


class Deaths:
    """The processes that died: for each, when that was first and last met with."""

    def __init__(self) -> None:
        self._met: dict[tuple[str, str, str], tuple[float, float]] = {}

    def may_be_due_to(self, server: str, release: Manifest, process: str, sent: float) -> bool:
        """Whether a call that was sent then (monotonic seconds) may have ended the process that it failed with."""
        key = server, blamed(release, process), process
        now = time.monotonic()
        first, last = self._met.get(key, (now, now))
        if sent > last + _ONE_DEATH_S:
            first = now
        self._met[key] = first, now
        return sent <= first


class Remembered:
    """What was found guilty, by its content and by what it ended."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[bytes, str], float] = OrderedDict()

    def add(self, picture: bytes, release: Manifest, process: str) -> None:
        """Remember a picture: for all releases with the step whose process it ended; without one, for this release."""
        key = _digest(picture), blamed(release, process)
        self._until[key] = time.monotonic() + _REMEMBERED_S
        self._until.move_to_end(key)
        if len(self._until) > _MOST_REMEMBERED:
            self._until.popitem(last=False)

    def has(self, picture: bytes, release: Manifest) -> bool:
        """Whether a picture is known to end what this release runs on."""
        now = time.monotonic()
        while self._until and next(iter(self._until.values())) < now:
            self._until.popitem(last=False)
        if not self._until:  # nearly always: hashing every picture would cost more than all the rest here
            return False
        digest = _digest(picture)
        return any((digest, what) in self._until for what in _whatever_runs(release))


def _digest(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=16).digest()


def _whatever_runs(release: Manifest) -> list[str]:
    return [release.name, *(pin.digest for pin in release.steps.values())]


def blamed(release: Manifest, process: str) -> str:
    """The digest of the step that a process belongs to; the release's name where it is none of its steps.

    Triton names the processes of all versions of a step alike.
    """
    for step, pin in release.steps.items():
        if process.startswith(f"{contract.step_model(release.pipeline, step)}_"):
            return pin.digest
    return release.name
