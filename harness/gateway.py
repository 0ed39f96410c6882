"""A gateway as a child process, and the whole stack: a Triton with a gateway in front of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from prometheus_client.parser import text_string_to_metric_families

from harness import client
from harness.ports import free_endpoint, free_port
from harness.waiting import wait_for
from triton_runtime.child import Child
from triton_runtime.server import Endpoint, TritonServer

AT_REST = ("gateway_in_flight", "gateway_waiting", "gateway_calls")
"""The gauges that are zero where a gateway has no request."""


class GatewayProcess(Child):
    """`python -m gateway` as a user runs it. Started again (`restart`), it listens where it did before.

    Args:
        triton: what it asks: a Triton, or several as GATEWAY_TRITON_URLS has them.
        log: what its lines are appended to, and what it says beside them; by default they are thrown away, and what
            it says beside them goes where we say things.
        settings: GATEWAY_ variables, in small letters and without that prefix.
    """

    def __init__(self, triton: Endpoint | str, log: Path | None = None, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_TRITON_URLS": triton if isinstance(triton, str) else triton.grpc_url,
            **{f"GATEWAY_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.log = log
        self._output = None if log is None else log.open("ab")
        out = subprocess.DEVNULL if self._output is None else self._output.fileno()
        err = None if self._output is None else out
        super().__init__("gateway", environment=environment, stdout=out, stderr=err, grace_seconds=40)

    def __enter__(self) -> Self:
        """Wait until it listens.

        Raises:
            TimeoutError: it does not in time.
        """
        wait_for(lambda: client.answers(f"{self.url}/health/live"))
        return self

    def __exit__(self, *_: object) -> None:
        """End it.

        Raises:
            TimeoutError: it had to be killed.
        """
        if not self.stop():
            raise TimeoutError("the gateway did not stop in time")

    def stop(self) -> bool:
        """End it in order; returns whether it ended in time."""
        has_ended = super().stop()
        if self._output is not None:
            self._output.close()
        return has_ended

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Wait until a prediction would be answered.

        Raises:
            ChildProcessError: it ended.
            TimeoutError: it is not ready in time.
        """

        def is_ready() -> bool:
            if (status := self.poll()) is not None:
                raise ChildProcessError(f"the gateway ended with status {status}")
            return self.is_ready()

        wait_for(is_ready, seconds)

    def is_ready(self) -> bool:
        """Whether a prediction would be answered now."""
        return client.answers(f"{self.url}/health/ready")

    def page(self, path: str) -> Any:
        """The JSON of one of its pages.

        Raises:
            OSError: it does not answer, or not with status 200.
        """
        return json.loads(client.get(f"{self.url}{path}"))

    def predict(self, picture: bytes, timeout: float = 10.0) -> dict[str, Any]:
        """What it answers to a JPEG.

        Raises:
            OSError: nothing, or not with status 200.
        """
        return dict(client.predict(f"{self.url}/v1/predict", picture, timeout=timeout))

    def releases(self) -> dict[str, str]:
        """The state of each release, or why it cannot be asked; empty where the gateway does not say."""
        try:
            found = self.page("/v1/releases")["releases"]
        except OSError:
            return {}
        return {each["name"]: each["reason"] or each["state"] for each in found}

    def gauges(self) -> dict[str, float]:
        """Its metrics, each summed over its labels."""
        families = text_string_to_metric_families(client.get(f"{self.url}/metrics").decode())
        return {family.name: sum(sample.value for sample in family.samples) for family in families}

    def is_at_rest(self) -> bool:
        """Whether it has no request."""
        gauges = self.gauges()
        return not any(gauges[name] for name in AT_REST)


@contextlib.contextmanager
def whole_stack(
    repository: Path, *, triton_log: IO[bytes] | None = None, log: Path | None = None, **settings: object
) -> Iterator[tuple[TritonServer, GatewayProcess]]:
    """A Triton and a gateway, on ports of their own, ready.

    Args:
        repository: what is served.
        triton_log: where Triton logs to; by default, where we do.
        log: as of `GatewayProcess`.
        settings: likewise.

    Raises:
        Missing, TritonFailed, OSError: it cannot be started.
    """
    with TritonServer(repository, free_endpoint(), log=triton_log) as triton, contextlib.ExitStack() as running:
        triton.wait_until_ready()
        gateway = GatewayProcess(triton.endpoint, log, **settings)
        running.callback(gateway.stop)
        gateway.wait_until_ready()
        yield triton, gateway
