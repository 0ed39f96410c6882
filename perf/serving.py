"""What is measured, running: Triton with the releases, and a gateway in front of it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import Manifest
from perf.analyzer import PerfError
from triton_runtime.ports import free_port
from triton_runtime.server import Endpoint, TritonServer
from triton_runtime.stack import Child

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Serving:
    """Where Triton and the gateway listen."""

    triton: Endpoint
    gateway: str

    def predict_url(self, release: str) -> str:
        """Where this release answers over HTTP, whatever the routing says."""
        return f"{self.gateway}/v1/predict?model_version={release}"


@contextlib.contextmanager
def serving(repository: Path, releases: Sequence[Manifest]) -> Iterator[Serving]:
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
            if not _answers(endpoint.url(f"/v2/models/{release.name}/ready")):
                raise PerfError(
                    f"the Triton at {endpoint.grpc_url} does not serve {release.name}: does it follow "
                    f"{repository}? stop it, or give another TRITON_GRPC_PORT"
                )
        port = free_port()
        environment = {
            "GATEWAY_TRITON_URLS": endpoint.grpc_url,
            "GATEWAY_PIPELINE": releases[0].pipeline,
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "GATEWAY_ROUTING": "/dev/null",  # no shadow, which would run requests twice
        }
        # Its log is written as in production, and that it is read by nobody is all the difference.
        child = running.enter_context(Child("gateway", environment=environment, stdout=subprocess.DEVNULL))
        found = Serving(endpoint, f"http://127.0.0.1:{port}")
        _wait_for(found, releases, child)
        yield found


def _wait_for(found: Serving, releases: Sequence[Manifest], gateway: Child) -> None:
    """Until the gateway has tried each release with its golden pictures."""
    deadline = time.monotonic() + _PATIENCE_S
    states: dict[str, str] = {}
    while any(states.get(release.name) != "ready" for release in releases):
        if time.monotonic() > deadline or gateway.process.poll() is not None:
            raise PerfError(
                f"the gateway does not serve {', '.join(r.name for r in releases)}: {states or 'no answer'}"
            )
        time.sleep(0.1)
        page = _answers(f"{found.gateway}/v1/releases")
        states = {each["name"]: each["reason"] or each["state"] for each in page["releases"]} if page else states


def _answers(url: str) -> dict | None:
    """The JSON under a URL, {"": ""} where the body is empty; None where it is no 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return dict(json.loads(response.read() or b'{"": ""}'))
    except (urllib.error.URLError, OSError, ValueError):
        return None
