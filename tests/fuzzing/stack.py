"""Triton and a gateway for fuzzing, and what must not change however bad the input is: processes, memory, segments."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness import ROOT
from harness.gateway import GatewayProcess, whole_stack
from tests.conftest import http, wait_for
from triton_runtime.installation import SHARED_MEMORY_FOLDER
from triton_runtime.server import Endpoint
from triton_runtime.stubs import look

GROWTH = 64 * 2**20
"""Bytes that a process may grow by without it being a leak: what malloc keeps after the largest pictures varies."""

PATIENT = {"deadline_s": 120, "log_level": "error"}
"""Many large pictures at once take their time, and deadlines have tests of their own."""


@dataclass(frozen=True)
class Vitals:
    """One look at the servers. Memory is what belongs to a process alone (USS), in bytes, by process id."""

    stubs: dict[int, int]
    servers: dict[int, int]
    shared: int
    in_flight: int
    failures: dict[str, int]
    """Model -> requests that Triton counts as failed."""
    successes: int
    """Pictures that Triton counts as answered by the release."""

    def worsened(self, before: Vitals, sent: int | None = None) -> list[str]:
        """What is worse than before, after `sent` pictures that Triton must have seen, if that is known."""
        found = []
        if self.stubs.keys() != before.stubs.keys():
            found.append(f"stubs died: {sorted(before.stubs)} became {sorted(self.stubs)}")
        was = before.stubs | before.servers
        for pid, bytes_ in (self.stubs | self.servers).items():
            if (growth := bytes_ - was.get(pid, bytes_)) > GROWTH:
                found.append(f"process {pid} grew by {growth / 2**20:.0f} MiB")
        if self.shared > before.shared + GROWTH:
            found.append(f"shared memory grew by {(self.shared - before.shared) / 2**20:.0f} MiB")
        if self.in_flight:
            found.append(f"{self.in_flight} predictions are still in flight")
        found += [
            f"{model}: {n - before.failures[model]} failed requests"
            for model, n in self.failures.items()
            if n > before.failures[model]
        ]
        if sent is not None and (counted := self.successes - before.successes) != sent:
            found.append(f"Triton counts {counted} pictures, {sent} were sent")
        return found


@dataclass(frozen=True)
class FuzzedStack:
    """A running Triton and gateway."""

    gateway: GatewayProcess
    triton: int
    endpoint: Endpoint

    @property
    def url(self) -> str:
        """Of the gateway."""
        return self.gateway.url

    def vitals(self) -> Vitals:
        """Look at the servers now."""
        statistics = http.get(self.endpoint.url("/v2/models/stats"), timeout=10).json()["model_stats"]
        release = self.gateway.page("/version")["pipeline"]["stable"]
        return Vitals(
            stubs=_memory(stub.pid for stub in look(self.triton).living),
            servers=_memory((self.triton, self.gateway.process.pid)),
            shared=sum(path.stat().st_blocks * 512 for path in SHARED_MEMORY_FOLDER.glob("triton_*")),
            in_flight=int(self.gateway.gauges()["gateway_in_flight"]),
            failures={model["name"]: model["inference_stats"]["fail"]["count"] for model in statistics},
            successes=sum(model["inference_count"] for model in statistics if model["name"] == release),
        )


def _memory(pids: Iterable[int]) -> dict[int, int]:
    return {pid: psutil.Process(pid).memory_full_info().uss for pid in pids}


@contextlib.contextmanager
def running(triton: Endpoint, triton_pid: int) -> Iterator[FuzzedStack]:
    """A gateway of its own in front of a Triton."""
    with tempfile.TemporaryDirectory() as folder, GatewayProcess(triton, Path(folder, "log"), **PATIENT) as gateway:
        wait_for(gateway.is_ready)
        yield FuzzedStack(gateway, triton_pid, triton)


@contextlib.contextmanager
def started() -> Iterator[FuzzedStack]:
    """A Triton on this checkout's repository, and a gateway."""
    with tempfile.TemporaryDirectory() as folder:
        repository, log = ROOT / "model_repository", Path(folder, "log")
        with whole_stack(repository, log=log, **PATIENT) as (triton, gateway):
            yield FuzzedStack(gateway, triton.process.pid, triton.endpoint)
