"""What lives as long as the application: the parts, how they are wired, and the tasks that keep them current."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

from contract import Manifest
from gateway.api.schemas import Metadata
from gateway.auth.api_keys import ApiKeys
from gateway.auth.rate_limit import Rates
from gateway.comparison import Comparisons
from gateway.dispatch.dispatcher import Dispatcher
from gateway.fetch.fetcher import Fetcher
from gateway.http.body import Picture
from gateway.metrics import Metrics, count_by, gauge, gauge_by
from gateway.mirrors import Mirrors
from gateway.predict import Answer, RequestInfo, predict
from gateway.problems import Failure
from gateway.routing.catalogue import Catalogue
from gateway.routing.router import Router
from gateway.routing.routing_file import RoutingFile
from gateway.settings import Settings
from gateway.supervision import Tasks, failures
from gateway.triton.fleet import Fleet

_GONE_S = 600.0
"""A release that was not there for so long is forgotten. One that is loaded again is back much sooner."""


@dataclass(frozen=True)
class Prediction:
    """An answer, with the picture and what came with it; the prediction's times are in monotonic seconds."""

    answer: Answer
    picture: bytes
    metadata: Metadata
    began: float
    ended: float
    fetch_s: float


class InFlight:
    """Counts what is inside its `with` blocks."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        """One more."""
        self.count += 1

    def __exit__(self, *_: object) -> None:
        """One less."""
        self.count -= 1


class Service:
    """Made inside a running event loop, as gRPC wants it."""

    def __init__(self, settings: Settings, metrics: Metrics, keys: ApiKeys) -> None:
        self.settings = settings
        self.keys = keys
        self.fleet = Fleet(settings)
        self.releases = Catalogue(self.fleet, settings.pipeline)
        self.dispatcher = Dispatcher(self.fleet, settings, metrics)
        self.routing = RoutingFile(settings.routing, settings.pipeline)
        self.router = Router(self.routing, self.releases)
        self.comparisons = Comparisons()
        self.fetcher = Fetcher(settings)
        self.mirrors = Mirrors(self.dispatcher, self.router, self.comparisons, metrics, settings)
        self.rates = Rates()
        self.predicting = InFlight()
        """Predictions that were begun and not yet answered."""
        self.metrics = metrics
        self._seen: dict[str, float] = {}
        """When each release was last there (monotonic seconds)."""
        metrics.observe(self._gauges)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow Triton, the routing file and the keys for the length of this block."""
        await self.fleet.start()
        followers = Tasks()
        followers.repeat("follow the routing file", self.routing.follow)
        followers.repeat("follow the API keys", self.keys.follow)
        yield
        await followers.close()
        await self.mirrors.close()
        await self.dispatcher.close()
        await self.fleet.close()

    def require_room(self, caller: RequestInfo) -> None:
        """Refuse a request before it is read, where the stable release could not answer it in time.

        Raises:
            Failure: overloaded.
        """
        if stable := self.router.in_force().stable:
            self.dispatcher.require_room(stable.name, caller.client, caller.deadline)

    async def ready(self) -> Manifest:
        """The release that would answer a request now: the stable one, or the one that covers for it.

        Triton's own readiness stays false after any failed load: only the releases count.

        Raises:
            Failure: triton_unavailable, no_release; why the stable one does not answer.
        """
        stable, others = self.router.stable(), self.router.in_force().others
        try:
            await self.fleet.require_ready(stable.name)
            return stable
        except Failure:
            for other in others[:1]:
                with contextlib.suppress(Failure):
                    await self.fleet.require_ready(other.name)
                    return other
            raise

    async def judge(self, picture: Picture, caller: RequestInfo, headers: Mapping[str, str]) -> Prediction:
        """Answer one picture: choose who answers, fetch the picture where it was sent by its location, and predict.

        Raises:
            Failure: there is no answer.
        """
        choices = self.router.choose(picture.pin, picture.metadata, headers)
        data, asked = picture.data, time.monotonic()
        if picture.url is not None:
            data = await self.fetcher.fetch(picture.url, caller.deadline - asked, picture.share)
        began = time.monotonic()
        answer = await predict(self.dispatcher, choices, data, caller, self._may_cover)
        return Prediction(answer, data, picture.metadata, began, time.monotonic(), began - asked)

    def _may_cover(self, release: str) -> bool:
        """Whether a release may answer for another one now: it may have become the shadow meanwhile."""
        shadow = self.router.in_force().shadow
        return shadow is None or shadow.name != release

    async def compare(self, prediction: Prediction, request_id: str) -> None:
        """Run an answered request once more where it is to be compared; returns at once."""
        await self.mirrors.offer(prediction.answer, prediction.picture, request_id, self.predicting.count)

    def _forget_what_is_gone(self) -> None:
        """Drop the series, the queue and the comparison of a release that was not there for a while."""
        now = time.monotonic()
        self._seen |= {known.name: now for known in self.releases.known}
        for name in [name for name, at in self._seen.items() if now - at > _GONE_S]:
            del self._seen[name]
            for each in (self.metrics, self.dispatcher, self.comparisons):
                each.forget(name)

    def _gauges(self) -> Iterator[Metric]:
        self._forget_what_is_gone()
        active = {known.name: float(not known.reason) for known in self.releases.known}
        shares = {name: self.router.share(name) for name in active}
        yield gauge("gateway_in_flight", "Predictions being worked on.", self.predicting.count)
        yield gauge("gateway_waiting", "Pictures that wait for a call of Triton.", self.dispatcher.waiting)
        up = {replica.url: float(replica.is_available) for replica in self.fleet.replicas}
        yield gauge_by("replica", "gateway_replica_up", "1 where the Triton gets calls.", up)
        calls, limits = self.dispatcher.calls(), self.dispatcher.limits()
        yield gauge_by("release", "gateway_calls", "Calls on their way to Triton.", calls)
        yield gauge_by("release", "gateway_calls_limit", "Calls at once that are allowed, as found.", limits)
        yield gauge("gateway_triton_reachable", "1 while Triton answers.", self.releases.triton_version is not None)
        yield gauge("gateway_routing_valid", "0 while the routing file is refused.", not self.routing.error)
        is_met = not self.router.in_force().warning
        yield gauge("gateway_routing_met", "0 while the routing file asks for what cannot be had.", is_met)
        yield gauge("gateway_keys_valid", "0 while the file of API keys is refused.", not self.keys.error)
        yield gauge_by("release", "gateway_release_active", "1 where the release may answer.", active)
        down = {name: float(self.fleet.is_down(name)) for name in active}
        yield gauge_by("release", "gateway_release_down", "1 where it failed and no server has it answering.", down)
        yield count_by("task", "gateway_task_failures", "Exceptions of background tasks, which go on.", failures)
        yield gauge_by("release", "gateway_release_share", "Percentage of the requests without a pin.", shares)
