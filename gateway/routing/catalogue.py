"""The releases of all replicas, as the router and the pages see them: as if there were one Triton."""

from __future__ import annotations

import time
from dataclasses import replace

from contract import Manifest
from gateway.triton.fleet import Fleet, Replica
from gateway.triton.inventory import NOT_YET_ON, Known

_WAIT_FOR_OTHERS_S = 10.0
"""So long a release that is new waits for the replicas that do not have it yet: the first would get all the load."""


class Catalogue:
    """What there is, over all replicas that can be reached; while none can, what there was."""

    def __init__(self, fleet: Fleet, pipeline: str) -> None:
        self._fleet = fleet
        self.pipeline = pipeline
        self._first_seen: dict[str, float] = {}
        self._admitted: set[str] = set()
        self._known: tuple[Known, ...] = ()
        self._known_of: tuple[object, ...] | None = None
        """What `_known` was put together from; None where time alone may change it."""

    @property
    def triton_version(self) -> str | None:
        """Triton's version; None while none can be reached."""
        return next((version for each in self._fleet.replicas if (version := each.releases.triton_version)), None)

    @property
    def newest_number(self) -> int:
        """The highest that was ever seen: up to there, what is not here was retired."""
        return max((replica.releases.newest_number for replica in self._fleet.replicas), default=0)

    @property
    def known(self) -> tuple[Known, ...]:
        """Every release, oldest first."""
        replicas = self._fleet.replicas
        if len(replicas) == 1:
            return replicas[0].releases.known
        # Each request asks, so what did not change is not put together again.
        made_of = tuple(
            (each.url, each.is_available, each.has_joined, each.releases.known, each.releases.judgements)
            for each in replicas
        )
        if made_of != self._known_of:
            self._known = self._merge(replicas)
            self._known_of = made_of if self._admitted.issuperset(self._first_seen) else None
        return self._known

    def find(self, name: str) -> Known | None:
        """The release of this name, whether or not it may answer."""
        return next((known for known in self.known if known.name == name), None)

    def active(self) -> list[Manifest]:
        """The releases that may answer, newest first."""
        return [known.manifest for known in reversed(self.known) if known.manifest and not known.reason]

    def coming(self) -> list[Known]:
        """The releases that may answer in a moment."""
        return [known for known in self.known if known.is_coming]

    def _merge(self, replicas: list[Replica]) -> tuple[Known, ...]:
        replicas = [replica for replica in replicas if replica.is_available] or replicas
        numbers = {known.name: known.number for replica in replicas for known in replica.releases.known}
        self._admitted &= numbers.keys()
        self._first_seen = {name: since for name, since in self._first_seen.items() if name in numbers}
        return tuple(self._merged(name, replicas) for name in sorted(numbers, key=numbers.__getitem__))

    def _merged(self, name: str, replicas: list[Replica]) -> Known:
        here = {replica.url: known for replica in replicas if (known := replica.releases.find(name))}
        able = [known for known in here.values() if known.manifest and not known.reason]
        if not able:
            url, known = next((each for each in here.items() if each[1].is_coming), next(iter(here.items())))
            return replace(known, reason=f"{url}: {known.reason}")
        if any(known.manifest != able[0].manifest for known in able):
            return replace(able[0], reason="the servers hold different releases of this name")
        since = self._first_seen.setdefault(name, time.monotonic())
        joined = [replica for replica in replicas if replica.has_joined]
        lacking = [replica.url for replica in joined if not replica.serves(name)]
        if not lacking or time.monotonic() - since > _WAIT_FOR_OTHERS_S:
            self._admitted.add(name)
        return able[0] if name in self._admitted else replace(able[0], reason=f"{NOT_YET_ON}{', '.join(lacking)}")
