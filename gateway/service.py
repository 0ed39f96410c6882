"""What lives as long as the application: the parts, how they are wired, and the tasks that keep them current."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from prometheus_client.core import Metric

from gateway import activation
from gateway.comparison import Comparisons
from gateway.keys import ApiKeys
from gateway.metrics import Metrics, gauge, gauge_by_release
from gateway.mirrors import Mirrors
from gateway.releases import Releases
from gateway.router import Router
from gateway.routing import RoutingFile
from gateway.settings import Settings
from gateway.triton import TritonClient


class Service:
    """Made inside a running event loop, as gRPC wants it."""

    def __init__(self, settings: Settings, metrics: Metrics, keys: ApiKeys) -> None:
        self.settings = settings
        self.keys = keys
        self.triton = TritonClient(settings.triton_url)
        self.releases = Releases(self.triton, settings.pipeline, settings.probe_timeout_s)
        self.routing = RoutingFile(settings.routing, settings.pipeline)
        self.router = Router(self.routing, self.releases)
        self.comparisons = Comparisons()
        self.mirrors = Mirrors(self.triton, self.router, self.comparisons, metrics, settings)
        self.in_flight = 0
        """Predictions that were begun and not yet answered."""
        metrics.observe(self._gauges)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow Triton, the routing file and the keys for the length of this block."""
        await self.releases.refresh()
        followers = [
            asyncio.create_task(task)
            for task in (
                self.releases.follow(self.settings.refresh_s),
                activation.follow(self.triton, self.releases),
                self.routing.follow(),
                self.keys.follow(),
            )
        ]
        yield
        for follower in followers:
            follower.cancel()
        await self.mirrors.close()
        await self.triton.close()

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Count one prediction as in flight."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _gauges(self) -> Iterator[Metric]:
        active = {known.name: float(not known.reason) for known in self.releases.known}
        shares = {name: self.router.share(name) for name in active}
        yield gauge("gateway_in_flight", "Predictions being worked on.", self.in_flight)
        yield gauge("gateway_triton_reachable", "1 while Triton answers.", self.releases.triton_version is not None)
        yield gauge("gateway_routing_valid", "0 while the routing file is refused.", not self.routing.error)
        yield gauge("gateway_keys_valid", "0 while the file of API keys is refused.", not self.keys.error)
        yield gauge_by_release("gateway_release_active", "1 where the release may answer.", active)
        yield gauge_by_release("gateway_release_share", "Percentage of the requests without a pin.", shares)
