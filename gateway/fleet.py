"""The Triton servers that answer, each followed on its own: which there are, which can be asked, and which is next.

A replica is asked while it can be reached and no call failed because of it. One that is suspected gets nothing until
it answered a golden picture of the release that failed; then it starts slowly, with few calls at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable, Coroutine

import grpc

from gateway import activation
from gateway.errors import Failure
from gateway.releases import Releases
from gateway.settings import Settings
from gateway.triton import MalformedAnswer, TritonClient, TritonError

_PROBE_EVERY_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_RESOLVE_EVERY_S = 5.0
_SHUN_S, _SHUN_MOST_S = 1.0, 60.0
"""After a fault the other replicas come first for so long; twice as long after each that follows soon."""
logger = logging.getLogger("gateway.fleet")


class Replica:
    """One Triton, at one address."""

    def __init__(self, url: str, settings: Settings, on_change: Callable[[], None]) -> None:
        self.url = url
        self.triton = TritonClient(url)
        self.releases = Releases(self.triton, settings.pipeline, settings.probe_timeout_s)
        self.calls = 0
        """On their way now."""
        self.called_at = -math.inf
        """When the last one was sent (monotonic seconds)."""
        self.fault = ""
        """Why it gets no calls although it can be reached; empty where it does."""
        self.has_joined = False
        """Whether its releases have been tried once since it could be reached."""
        self._shunned_s = 0.0
        self._shunned_until = -math.inf
        self._suspected = asyncio.Event()
        self._release = ""
        self._refresh_s = settings.refresh_s
        self._tasks: list[asyncio.Task[None]] = []
        self._on_change = on_change
        self._refreshing = asyncio.Lock()

    @property
    def is_available(self) -> bool:
        """Whether it gets calls."""
        return not self.fault and self.releases.triton_version is not None

    @property
    def is_shunned(self) -> bool:
        """Whether it is asked only where the others have no room: it failed lately, and may do so again.

        Triton 24.10 starts no new process for a Python one that died: the rest of its model's processes answer, as a
        golden picture shows, and every other call fails.
        """
        return time.monotonic() < self._shunned_until

    def serves(self, release: str) -> bool:
        """Whether the release may answer here."""
        known = self.releases.find(release)
        return known is not None and known.manifest is not None and not known.reason

    def max_batch(self, release: str) -> int:
        """The most pictures that a call of the release may have."""
        known = self.releases.find(release)
        return known.max_batch if known else 1

    def suspect(self, release: str, reason: str) -> None:
        """A call of the release failed because of this server: give it nothing until it answers again."""
        if self.fault:
            return
        logger.warning("replica suspected", extra={"fields": {"replica": self.url, "reason": reason}})
        self.fault, self._release = reason, release
        now = time.monotonic()
        is_again = now < self._shunned_until + self._shunned_s
        self._shunned_s = min(_SHUN_MOST_S, 2 * self._shunned_s) if is_again else _SHUN_S
        self._shunned_until = now + self._shunned_s
        self._suspected.set()
        self._on_change()

    async def start(self) -> None:
        """Look at it once, then follow it."""
        await self._refresh()
        self._tasks = [
            asyncio.create_task(task)
            for task in (self._follow(), self._recover(), activation.follow(self.triton, self.releases))
        ]

    async def close(self) -> None:
        """Stop following it; calls in flight are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.triton.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            was_reached = self.releases.triton_version is not None
            await self._refresh()
            if was_reached and self.releases.triton_version is None:
                self.has_joined = False
                self.suspect("", "it does not answer")
            elif not self.has_joined and self.releases.active() and not self.releases.untried():
                self.has_joined = True
            self._on_change()

    async def _refresh(self) -> None:
        async with self._refreshing:
            await self.releases.refresh()

    async def _recover(self) -> None:
        while True:
            await self._suspected.wait()
            while not await self._answers():
                await asyncio.sleep(_PROBE_EVERY_S)
            logger.info("replica back", extra={"fields": {"replica": self.url}})
            self.fault = ""
            self._suspected.clear()
            self._on_change()

    async def _answers(self) -> bool:
        """Try what failed once more. A release that is not there any more is no fault of the server."""
        await self._refresh()
        if self.releases.triton_version is None:
            return False
        there = [release for release in self.releases.active() if release.golden]
        wanted = [release for release in there if release.name == self._release] or there
        try:
            for release in wanted[:1]:
                await self.triton.infer(release.name, [release.golden[0].image], "probe", _PROBE_TIMEOUT_S)
        except (TritonError, MalformedAnswer):
            return False
        return True


class Fleet:
    """All replicas, found by the names and addresses in the settings; a name may stand for several."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.replicas: list[Replica] = []
        self._listeners: list[Callable[[], None]] = []
        self._lost_at: float | None = -math.inf
        """When the last replica was lost; None while there is one."""
        self._tasks: set[asyncio.Task[None]] = set()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever a replica may have been lost or have come back."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Find the replicas, look at each once, and follow them."""
        await self._find()
        self._keep(self._follow())

    async def close(self) -> None:
        """Stop following them; calls in flight are cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(replica.close() for replica in self.replicas), return_exceptions=True)

    def available(self) -> list[Replica]:
        """Those that get calls."""
        return [replica for replica in self.replicas if replica.is_available]

    def having(self, release: str) -> list[Replica]:
        """The replicas that can be asked for a release; empty: wait, they were lost only a moment ago.

        Raises:
            TritonError: UNAVAILABLE where none is there for longer, NOT_FOUND where none has the release.
        """
        there = self.available()
        if not there:
            if self._lost_at is not None and time.monotonic() - self._lost_at < self._settings.patience_s:
                return []
            raise TritonError(grpc.StatusCode.UNAVAILABLE, self.faults())
        having = [replica for replica in there if replica.serves(release)]
        if not having:
            raise TritonError(grpc.StatusCode.NOT_FOUND, f"no server has {release} ready")
        return having

    async def require_ready(self, release: str) -> None:
        """Ask the servers whether one would answer now.

        Raises:
            Failure: triton_unavailable, no_release.
        """
        reasons = {}
        for replica in self.available():
            try:
                if await replica.triton.is_ready(release, self._settings.probe_timeout_s):
                    return
                reasons[replica.url] = f"{release} is not ready"
            except TritonError as error:
                reasons[replica.url] = str(error)
        text = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        is_reached = any(reason.endswith("is not ready") for reason in reasons.values())
        raise Failure("no_release" if is_reached else "triton_unavailable", text or self.faults())

    def faults(self) -> str:
        """What is wrong with the replicas that get no calls."""
        faults = [
            f"{each.url}: {each.fault or 'it cannot be reached'}" for each in self.replicas if not each.is_available
        ]
        return "; ".join(faults) or "no address was found"

    def _changed(self) -> None:
        if self.available():
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = time.monotonic()
            # Who waits then has waited long enough.
            asyncio.get_running_loop().call_later(self._settings.patience_s, self._changed)
        for listener in self._listeners:
            listener()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_RESOLVE_EVERY_S)
            await self._find()

    async def _find(self) -> None:
        found: list[str] = []
        for url in self._settings.triton_urls:
            host, _, port = url.rpartition(":")
            try:
                found += await _addresses(host, port)
            except (OSError, UnicodeError) as error:  # what was found is kept: names fail more often than servers
                logger.warning("name not resolved", extra={"fields": {"url": url, "reason": str(error)}})
                found += [replica.url for replica in self.replicas]
        before = {replica.url: replica for replica in self.replicas}
        found = list(dict.fromkeys(found))
        added = [Replica(url, self._settings, self._changed) for url in found if url not in before]
        await asyncio.gather(*(replica.start() for replica in added))
        self.replicas = [replica for url, replica in before.items() if url in found] + added
        for url, replica in before.items():
            if url not in found:
                logger.info("replica gone", extra={"fields": {"replica": url}})
                self._keep(_drain(replica))
        self._changed()

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _drain(replica: Replica) -> None:
    while replica.calls:
        await asyncio.sleep(_PROBE_EVERY_S)
    await replica.close()


async def _addresses(host: str, port: str) -> list[str]:
    """Every address of a name; of both families, the older one: a name for both is one server, not two."""
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    family = socket.AF_INET if any(each[0] == socket.AF_INET for each in found) else socket.AF_INET6
    texts = sorted({str(each[4][0]) for each in found if each[0] == family})
    return [f"[{text}]:{port}" if ":" in text else f"{text}:{port}" for text in texts]
