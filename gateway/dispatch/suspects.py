"""Pictures that end the process which works on them: suspected, tried alone, refused, and remembered for a while.

A picture is suspect when it was in a call that may have ended a process. It is then tried: alone, right after the
processes that are known there answered golden pictures, one suspect of a release at a time. Should a process die of it
again, it is guilty, unless another call found that process dead in the meantime. A trial goes on though its client
left.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from contract import Manifest
from gateway.triton.deaths import DEAD_S, steps_of

SUSPECT = 2
"""Marks from which a picture is tried. The death of a step's process is as many; the loss of a whole server, which ends
for many reasons and with many pictures in it, is one."""
GUILTY = 3
"""Marks from which one that is lost with its server, on trial, is guilty."""
_REMEMBERED_S = 600.0
_MOST_REMEMBERED = 10_000
_MOST_ABANDONED = 64


@dataclass(eq=False)
class Record:
    """What is held against a picture, over all its requests, calls and releases."""

    marks: int = 0
    ended: set[str] = field(default_factory=set)
    """What it is guilty of having ended: steps, by their digests, or a release."""

    @property
    def is_suspect(self) -> bool:
        """Whether it has to be tried."""
        return self.marks >= SUSPECT

    def mark(self, marks: int) -> None:
        """It was in a call that may have ended a process or a server."""
        self.marks += marks

    def acquit(self) -> None:
        """It was answered, or another one did it."""
        self.marks = 0

    def forbids(self, release: Manifest) -> bool:
        """Whether it ended what this release runs on."""
        return bool(self.ended) and not self.ended.isdisjoint((release.name, *steps_of(release)))


class Records:
    """The records of the pictures that were marked lately, by their content."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, tuple[Record, float]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether there are any: nearly never, so no picture has to be hashed."""
        now = time.monotonic()
        while self._kept and next(iter(self._kept.values()))[1] < now:
            self._kept.popitem(last=False)
        return bool(self._kept)

    def of(self, picture: bytes) -> Record:
        """The record of a picture; a clean one where nothing is held against it."""
        if not self:
            return Record()
        found = self._kept.get(digest_of(picture))
        return found[0] if found else Record()

    def keep(self, digest: bytes) -> Record:
        """The record of the picture with this digest, which is remembered for a while from now on."""
        record = self._kept.pop(digest, (Record(), 0.0))[0]
        self._kept[digest] = record, time.monotonic() + _REMEMBERED_S
        if len(self._kept) > _MOST_REMEMBERED:
            self._kept.popitem(last=False)
        return record


class AbandonedCalls:
    """The calls that were abandoned lately: how they ended nobody heard, and it may have been with a process."""

    def __init__(self) -> None:
        self._calls: deque[tuple[str, str, float, list[bytes]]] = deque(maxlen=_MOST_ABANDONED)

    def add(self, server: str, release: str, sent: float, pictures: Iterable[bytes]) -> None:
        """A call that was sent then (monotonic seconds) was abandoned just now."""
        self._calls.append((server, release, sent, [digest_of(picture) for picture in pictures]))

    def take(self, server: str, release: str) -> list[bytes]:
        """The digests of the pictures that may have caused the death that was just met."""
        since = time.monotonic() - DEAD_S
        found = [call for call in self._calls if call[:2] == (server, release)]
        for call in found:
            self._calls.remove(call)
        return [picture for *_, sent, pictures in found if sent > since for picture in pictures]


def digest_of(picture: bytes) -> bytes:
    """What a picture is known again by."""
    return hashlib.blake2b(picture, digest_size=16).digest()
