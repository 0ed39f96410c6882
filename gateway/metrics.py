"""Figures for Prometheus. Labels take few values: routes, codes and releases, never what a client wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_BUCKETS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)

Outcome = Literal["agreed", "disagreed", "failed", "shed"]


class Metrics:
    """The counters of one application. What is a state, not an event, `observe` asks for at each scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "gateway_requests", "Requests, by path of the API, status and code of the problem (empty: none).",
            ["path", "status", "code"], registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "gateway_request_seconds", "From a request's head to its last byte, by path of the API.",
            ["path"], registry=self._registry, buckets=_BUCKETS,
        )  # fmt: skip
        self._predictions = Counter(
            "gateway_predictions", "Answered predictions, by the release that answered and why that one.",
            ["release", "route"], registry=self._registry,
        )  # fmt: skip
        self._comparisons = Counter(
            "gateway_comparisons", "Requests run once more on another release, by the release on trial.",
            ["release", "outcome"], registry=self._registry,
        )  # fmt: skip
        self.connections = Gauge("gateway_connections", "Open connections.", registry=self._registry)

        self._retries = Counter(
            "gateway_retries", "Pictures sent to Triton once more after a call failed.", registry=self._registry
        )
        self._group = Histogram(
            "gateway_call_pictures", "Pictures that shared a call of Triton.",
            registry=self._registry, buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
        )  # fmt: skip

        # What every request counts. Finding a series by its labels takes longer than counting, and they are few.
        self._requests_of = cache(self._requests.labels)
        self._seconds_of = cache(self._seconds.labels)
        self._predictions_of = cache(self._predictions.labels)

    def request(self, path: str, status: str, code: str, seconds: float) -> None:
        """A request ended."""
        self._requests_of(path, status, code).inc()
        self._seconds_of(path).observe(seconds)

    def predicted(self, release: str, route: str) -> None:
        """A prediction was answered."""
        self._predictions_of(release, route).inc()

    def compared(self, release: str, outcome: Outcome) -> None:
        """A request was compared, or was not."""
        self._comparisons.labels(release, outcome).inc()

    def forget(self, release: str) -> None:
        """A release is gone, and its series with it: what no scrape shows any more takes no memory either."""
        self._predictions.remove_by_labels({"release": release})
        self._comparisons.remove_by_labels({"release": release})
        self._predictions_of.cache_clear()

    def called(self, pictures: int) -> None:
        """A call was sent to Triton."""
        self._group.observe(pictures)

    def retried(self) -> None:
        """A picture has to be sent once more."""
        self._retries.inc()

    def observe(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        """Have the gauges of `gauges` in every page from now on."""
        self._registry.register(_Gauges(gauges))

    def page(self) -> bytes:
        """The page that Prometheus reads, in its text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges()


def gauge(name: str, text: str, value: float) -> Metric:
    """A state with one value."""
    return GaugeMetricFamily(name, text, value=value)


def gauge_by(label: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
    """A state of each of several, by the label that tells them apart."""
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def count_by(label: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
    """A count of each of several, by the label that tells them apart."""
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
