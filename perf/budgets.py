"""`perf/budgets.toml`: what a release may take, and how much slower it may be than another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

import contract
from contract.tables import Table
from perf.load import Load

BUDGETS = Path(__file__).with_name("budgets.toml")
EVERY, LATEST = "*", "latest"
QUANTILES = ("p50", "p95", "p99")

EndpointName = Literal["gateway", "ensemble", "preprocess", "classifier", "postprocess"]
"""What is measured: the API, the release over gRPC, or one of its steps over gRPC."""

Positive = Annotated[float, Field(gt=0)]


class _UnderLoad(Table):
    """Bounds on the latency of an endpoint under one of the two kinds of load."""

    endpoint: EndpointName
    concurrency: int | None = Field(default=None, ge=1, le=1024)
    request_rate: Positive | None = None
    p50: Positive | None = None
    p95: Positive | None = None
    p99: Positive | None = None

    @property
    def load(self) -> Load:
        """The load of this table."""
        return Load(self.concurrency, self.request_rate)

    @property
    def quantiles(self) -> dict[str, float]:
        """The bounds, by quantile."""
        return {name: bound for name in QUANTILES if (bound := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _one_load(self) -> Self:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ValueError("give one load: concurrency (requests in flight) or request_rate (requests a second)")
        return self


class Budget(_UnderLoad):
    """What an endpoint of a release may take under a load.

    `release` is a name, "latest" (the newest of its pipeline) or "*". `p50`, `p95` and `p99` are milliseconds at most;
    `of_limit` is the least share of the requests a second that the machine can do without any server.
    """

    release: str = EVERY
    of_limit: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.release not in (EVERY, LATEST) and not contract.parse_release_name(self.release):
            raise ValueError(f"release must be {EVERY!r}, {LATEST!r} or the name of a release, such as defect-v1")
        if not self.quantiles and self.of_limit is None:
            raise ValueError("give at least one of p50, p95, p99 and of_limit")
        if self.of_limit is not None and (self.endpoint not in ("gateway", "ensemble") or self.concurrency is None):
            raise ValueError(
                "of_limit is for the gateway and the ensemble, with a concurrency: "
                "a step is only a part of the work, and a rate decides the throughput itself"
            )
        return self

    def is_for(self, release: str, *, is_latest: bool) -> bool:
        """Whether it holds for this release."""
        return self.release in (EVERY, release) or (self.release == LATEST and is_latest)


class Comparison(_UnderLoad):
    """How a release may compare with its base: latencies at most, throughput at least, both as a multiple of it."""

    throughput: Positive | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.quantiles and self.throughput is None:
            raise ValueError("give at least one of p50, p95, p99 and throughput")
        if self.throughput is not None and self.concurrency is None:
            raise ValueError("throughput needs a concurrency: a rate decides the throughput itself")
        return self


class Budgets(Table):
    """The file: `[[budget]]` tables, and `[[compare]]` tables for two releases."""

    budget: tuple[Budget, ...] = ()
    compare: tuple[Comparison, ...] = ()
