"""What is measured, running: Triton with the releases, and a gateway in front of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import Manifest
from harness.client import answers
from harness.gateway import GatewayProcess
from harness.waiting import wait_for
from perf.analyzer import PerfError
from triton_runtime.server import Endpoint, TritonServer

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Endpoints:
    """Where Triton and the gateway listen."""

    triton: Endpoint
    gateway: str

    def predict_url(self, release: str) -> str:
        """Where this release answers over HTTP, whatever the routing says."""
        return f"{self.gateway}/v1/predict?model_version={release}"


@contextlib.contextmanager
def serving(repository: Path, releases: Sequence[Manifest]) -> Iterator[Endpoints]:
    """The Triton of TRITON_GRPC_PORT, started for this block where nothing listens there, and a gateway of its own.

    Raises:
        PerfError: one of the releases is not served.
        Missing, TritonFailed: Triton cannot be started.
    """
    endpoint = Endpoint.from_environment()
    with contextlib.ExitStack() as running:
        with socket.socket() as probe:
            is_running = probe.connect_ex((endpoint.address, endpoint.grpc)) == 0
        if not is_running:
            running.enter_context(TritonServer(repository, endpoint)).wait_until_ready()
        for release in releases if is_running else ():
            if not answers(endpoint.url(f"/v2/models/{release.name}/ready")):
                raise PerfError(
                    f"the Triton at {endpoint.grpc_url} does not serve {release.name}: does it follow "
                    f"{repository}? stop it, or give another TRITON_GRPC_PORT"
                )
        # No shadow, which would run requests twice. Its log is written as in production, though nobody reads it.
        gateway = GatewayProcess(endpoint, pipeline=releases[0].pipeline, routing="/dev/null")
        running.callback(gateway.stop)
        try:  # until it has tried each release with its golden pictures
            gateway.wait_until_ready(_PATIENCE_S)
            wait_for(lambda: all(gateway.releases().get(each.name) == "ready" for each in releases), _PATIENCE_S)
        except OSError as error:
            names = ", ".join(release.name for release in releases)
            raise PerfError(f"the gateway does not serve {names}: {gateway.releases() or error}") from None
        yield Endpoints(endpoint, gateway.url)
