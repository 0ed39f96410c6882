"""The Triton servers that answer, each followed on its own: which there are, which can be asked, and which is next.

Health belongs to a release on a server. A call that failed because of a process of one of its steps puts that release
under suspicion on that server, and nothing else: it gets nothing more there until it answered a golden picture. A
server is lost, for all releases, only where it cannot be reached or answers no question any more; then it starts
slowly, with few calls at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import grpc

import contract
from contract import Manifest
from gateway.problems import Failure
from gateway.settings import Settings
from gateway.supervision import Tasks, failed
from gateway.triton import activation
from gateway.triton.client import MalformedAnswer, TritonClient, TritonError
from gateway.triton.deaths import Deaths, step_of, steps_of
from gateway.triton.inventory import Inventory

_PROBE_EVERY_S, _PROBE_SELDOM_S = 0.1, 1.0
"""A golden picture is sent again after so long: the first, and twice as long each time, up to the second."""
_PROBE_TIMEOUT_S = 5.0
_MISSES = 2
"""A server is lost after this many unanswered questions in a row. After the first one new calls go to other servers,
and those in flight go on: it may only be late."""
_RESOLVE_EVERY_S = 5.0
_DEPRIORITISED_S, _DEPRIORITISED_MOST_S = 1.0, 60.0
"""A replica is deprioritised for 1 s after a fault, doubling with each fault that follows soon, up to 60 s."""
logger = logging.getLogger("gateway.fleet")


@dataclass(eq=False)
class Suspicion:
    """Why a release gets no calls on a server, since when (monotonic seconds).

    `is_confirmed`: a golden picture was not answered either.
    """

    release: str
    reason: str
    since: float
    is_confirmed: bool = False
    pause_s: float = 0.0
    """Until the next golden picture."""
    at_once: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to end that pause."""

    def begin_again(self) -> None:
        """What was true of the server is not any more: find out again, and have who comes now wait for that."""
        self.since, self.is_confirmed, self.pause_s = time.monotonic(), False, 0.0
        self.at_once.set()


class Deprioritised:
    """Whether other replicas are preferred for a while, because this one failed lately and may do so again.

    While one of a step's processes is dead, the others answer the golden picture, and every other call fails.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._until = -math.inf

    def __bool__(self) -> bool:
        return time.monotonic() < self._until

    def fault(self) -> None:
        """It failed."""
        now = time.monotonic()
        is_again = now < self._until + self._seconds
        self._seconds = min(_DEPRIORITISED_MOST_S, 2 * self._seconds) if is_again else _DEPRIORITISED_S
        self._until = now + self._seconds


class Replica:
    """One Triton, at one address."""

    def __init__(self, url: str, settings: Settings, on_change: Callable[[], None]) -> None:
        self.url = url
        self.triton = TritonClient(url)
        self.releases = Inventory(self.triton, settings.pipeline, settings.probe_timeout_s)
        self.calls = 0
        """On their way now."""
        self.called_at = -math.inf
        """When the last one was sent (monotonic seconds)."""
        self.fault = "it was not reached yet"
        """Why it cannot be reached; without meaning where it can."""
        self.is_late = False
        """It left a question unanswered: it gets no new calls where others can have them."""
        self.has_joined = False
        """Whether its releases have been tried once since it could be reached."""
        self.deaths = Deaths()
        self.suspicions: dict[str, Suspicion] = {}
        """By release, those that get no calls here."""
        self._deprioritised: dict[str, Deprioritised] = {}
        """By release; the server itself has no name."""
        self._stumbles: Counter[str] = Counter()
        """By release, the dead processes that were met with since something was answered."""
        self._misses = 0
        self._away_s = settings.refresh_s
        """Until it is looked for again, while it cannot be reached."""
        self._settings = settings
        self._ask_now = asyncio.Event()
        self._tasks = Tasks()
        self._on_change = on_change

    @property
    def is_available(self) -> bool:
        """Whether it can be reached."""
        return self.releases.triton_version is not None

    def is_deprioritised(self, release: str) -> bool:
        """Whether it is asked for a release only where the others have no room."""
        return any(self._deprioritised.get(what) for what in ("", release))

    def serves(self, release: str) -> bool:
        """Whether the release is there and answered its golden pictures, whatever happened to it since."""
        known = self.releases.find(release)
        return known is not None and known.manifest is not None and not known.reason

    def max_batch(self, release: str) -> int:
        """The most pictures that a call of the release may have."""
        known = self.releases.find(release)
        return known.max_batch if known else 1

    def stumble(self, release: str, reason: str) -> None:
        """A process of a step of the release died, or was found dead: the next call may meet with another one.

        It is suspected when that happens again before anything was answered.
        """
        self._stumbles[release] += 1
        self._deprioritise(release)
        if self._stumbles[release] > 1:
            self.mark_unhealthy(release, reason)

    def answered(self, release: str) -> None:
        """A call of the release was answered."""
        if self._stumbles:
            del self._stumbles[release]

    def mark_unhealthy(self, release: str, reason: str) -> None:
        """A call of the release failed because of this server: give it nothing until it answers again."""
        if release in self.suspicions:
            return
        logger.warning(
            "release suspected", extra={"fields": {"replica": self.url, "release": release, "reason": reason}}
        )
        self._doubt(release, reason)
        self._deprioritise(release)
        self._on_change()

    def ask_now(self) -> None:
        """Ask the server at once whether it is still there, and what it has."""
        self._ask_now.set()

    def lose(self, reason: str) -> None:
        """The server is gone, or answers nothing: it gets nothing until it can be reached, and each release answers."""
        if not self.is_available:
            return
        logger.warning("replica lost", extra={"fields": {"replica": self.url, "reason": reason}})
        self.releases.triton_version, self.fault = None, reason
        self.has_joined = self.is_late = False
        self._misses, self._away_s = 0, _PROBE_EVERY_S  # it may be back soon
        self._deprioritise("")
        for release in self.releases.active():
            if release.name not in self.suspicions:
                self._doubt(release.name, reason)
        self._ask_now.set()
        self._on_change()

    async def answer_golden(self, release: str, timeout: float) -> None:
        """Ask a release for a golden picture. One that is not there any more is no fault of the server.

        Raises:
            TritonError, MalformedAnswer: it was not answered.
        """
        known = self.releases.find(release)
        if known and known.manifest and known.manifest.golden and not known.reason:
            await self.triton.infer(release, [known.manifest.golden[0].image], "probe", timeout)

    async def count_instances(self, release: str, process: str) -> None:
        """Learn how many processes the step of a release has that this one belongs to, if that is not known yet."""
        known = self.releases.find(release)
        manifest = known.manifest if known else None
        step = step_of(manifest, process) if manifest else ""
        if manifest is None or not step or manifest.steps[step].digest in self.deaths.instances:
            return
        pin = manifest.steps[step]
        with contextlib.suppress(TritonError):
            self.deaths.instances[pin.digest] = await self.triton.instances(
                contract.step_model(manifest.pipeline, step), pin.version, self._settings.probe_timeout_s
            )

    async def start(self) -> None:
        """Look at it once, then follow it."""
        await self._look()
        self._tasks.repeat("follow a replica", self._follow)
        self._tasks.repeat("activation", partial(activation.follow, self.triton, self.releases))

    async def close(self) -> None:
        """Stop following it; calls in flight are cancelled."""
        await self._tasks.close()
        await self.triton.close()

    async def _follow(self) -> None:
        pause = self._settings.refresh_s if self.is_available else self._away_s
        if self._misses:
            pause = 0.0  # the next question decides
        self._away_s = min(2 * self._away_s, self._settings.refresh_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ask_now.wait(), pause)
        self._ask_now.clear()
        await self._look()

    async def _look(self) -> None:
        """Ask which releases it has."""
        was_available = self.is_available
        try:
            await self.releases.refresh()
        except TritonError as error:
            self._missed(error)
            return
        self._misses, self.is_late = 0, False
        if not was_available:
            logger.info("replica back", extra={"fields": {"replica": self.url}})
            for suspicion in self.suspicions.values():
                suspicion.begin_again()
            if self.suspicions:
                self._remind()
        if not self.has_joined and self.releases.active() and not self.releases.untried():
            self.has_joined = True
        self._on_change()

    def _missed(self, error: TritonError) -> None:
        if not self.is_available:
            self.fault = str(error)
            return
        self._misses += 1
        if error.status is grpc.StatusCode.DEADLINE_EXCEEDED and self._misses < _MISSES:
            self.is_late = True
            self._on_change()
        else:
            self.lose(str(error))

    def _deprioritise(self, what: str) -> None:
        self._deprioritised.setdefault(what, Deprioritised()).fault()

    def _doubt(self, release: str, reason: str) -> None:
        suspicion = self.suspicions[release] = Suspicion(release, reason, time.monotonic())
        self._tasks.repeat("try a suspected release", partial(self._try, suspicion))
        self._remind()

    def _remind(self) -> None:
        """Have requests that still wait once the outage wait is over refused."""
        asyncio.get_running_loop().call_later(self._settings.outage_wait_s, self._on_change)

    async def _try(self, suspicion: Suspicion) -> bool:
        """Try once more what failed; returns whether that is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(suspicion.at_once.wait(), suspicion.pause_s)
        suspicion.at_once.clear()
        suspicion.pause_s = min(_PROBE_SELDOM_S, max(_PROBE_EVERY_S, 2 * suspicion.pause_s))
        if not self.is_available or not await self._answers(suspicion):
            return False
        del self.suspicions[suspicion.release]
        self.answered(suspicion.release)
        if known := self.releases.find(suspicion.release):
            self.deaths.answered(steps_of(known.manifest) if known.manifest else ())
        logger.info("release back", extra={"fields": {"replica": self.url, "release": suspicion.release}})
        self._on_change()
        return True

    async def _answers(self, suspicion: Suspicion) -> bool:
        """Whether a release answers."""
        try:
            await self.answer_golden(suspicion.release, min(_PROBE_TIMEOUT_S, 10 * suspicion.pause_s))
        except (TritonError, MalformedAnswer):
            if not suspicion.is_confirmed:
                suspicion.is_confirmed = True
                self._on_change()
            return False
        return True


class Fleet:
    """All replicas, found by the names and addresses in the settings; a name may stand for several."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.replicas: list[Replica] = []
        self._listeners: list[Callable[[], None]] = []
        self._is_about_to_tell = False
        self._lost_at: float | None = -math.inf
        """When the last replica was lost; None while there is one."""
        self._tasks = Tasks()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever a replica may have been lost or have come back."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Find the replicas, look at each once, and follow them."""
        await self._find()
        self._tasks.repeat("resolve names", self._follow)

    async def close(self) -> None:
        """Stop following them; calls in flight are cancelled."""
        await asyncio.gather(
            self._tasks.close(), *(replica.close() for replica in self.replicas), return_exceptions=True
        )

    def available(self) -> list[Replica]:
        """Those that can be reached."""
        return [replica for replica in self.replicas if replica.is_available]

    def replicas_for(self, release: str) -> list[Replica]:
        """The replicas that can be asked for a release; empty: wait, it failed or they were lost only a moment ago.

        Raises:
            TritonError: UNAVAILABLE where none is there for longer, NOT_FOUND where none has the release, or has it
                answering.
        """
        there = self.available()
        if not there:
            if self._lost_at is not None and time.monotonic() - self._lost_at < self._settings.outage_wait_s:
                return []
            raise TritonError(grpc.StatusCode.UNAVAILABLE, self.faults())
        having = [replica for replica in there if replica.serves(release)]
        if not having:
            raise TritonError(grpc.StatusCode.NOT_FOUND, f"no server has {release} ready")
        able = [replica for replica in having if release not in replica.suspicions]
        if not able and time.monotonic() - self._down_since(release, having) >= self._settings.outage_wait_s:
            raise TritonError(grpc.StatusCode.NOT_FOUND, self.suspicions(release))
        return [replica for replica in able if not replica.is_late] or able

    def is_down(self, release: str) -> bool:
        """Whether a release was tried and does not answer on any server that has it: another one may be asked now."""
        suspicions = [each.suspicions.get(release) for each in self.available() if each.serves(release)]
        return bool(suspicions) and all(each is not None and each.is_confirmed for each in suspicions)

    def suspicions(self, release: str) -> str:
        """Why a release gets no calls, server by server; empty where it is not suspected anywhere."""
        return "; ".join(
            f"{replica.url}: {suspicion.reason}"
            for replica in self.replicas
            if (suspicion := replica.suspicions.get(release))
        )

    def manifest(self, release: str) -> Manifest | None:
        """What a release says of itself; None where it is not known."""
        known = (replica.releases.find(release) for replica in self.replicas)
        return next((each.manifest for each in known if each and each.manifest), None)

    @staticmethod
    def _down_since(release: str, having: list[Replica]) -> float:
        return max(replica.suspicions[release].since for replica in having)

    async def require_ready(self, release: str) -> None:
        """Ask the servers whether one would answer now.

        Raises:
            Failure: triton_unavailable, no_release.
        """
        reasons = {}
        for replica in self.available():
            try:
                if suspicion := replica.suspicions.get(release):
                    reasons[replica.url] = f"{release} is not ready: {suspicion.reason}"
                    continue
                if await replica.triton.is_ready(release, self._settings.probe_timeout_s):
                    return
                reasons[replica.url] = f"{release} is not ready"
            except TritonError as error:
                reasons[replica.url] = str(error)
        text = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        if any("is not ready" in reason for reason in reasons.values()):
            raise Failure("no_release", f"{release} answers on no server", cause=text)
        raise Failure("triton_unavailable", "no server can be reached", cause=text or self.faults())

    def faults(self) -> str:
        """What is wrong with the replicas that get no calls."""
        faults = [f"{each.url}: {each.fault}" for each in self.replicas if not each.is_available]
        return "; ".join(faults) or "no address was found"

    def _changed(self) -> None:
        if self.available():
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = time.monotonic()
            # Who waits then has waited long enough.
            asyncio.get_running_loop().call_later(self._settings.outage_wait_s, self._changed)
        # Not at once: whoever noticed may be a call's own task, which a listener would cancel while it runs.
        if not self._is_about_to_tell:
            self._is_about_to_tell = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._is_about_to_tell = False
        for listener in self._listeners:
            try:
                listener()
            except Exception:  # whoever noticed the change has more to do, and so have the other listeners
                failed("tell of a change")

    async def _follow(self) -> None:
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
                self._tasks.once("drain a replica", partial(_drain, replica))
        self._changed()


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
