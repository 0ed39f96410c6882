"""What is broken: real Tritons on one repository, and a real gateway in front of one or two of them.

Nobody plays the operator here: a process of a step that died comes back by itself or not at all. A server that ended
without having been told to is started again, as `make serve`, Docker or Kubernetes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from chaos.proxy import Proxy
from chaos.releases import Pair
from triton_runtime.installation import SHARED_MEMORY_FOLDER
from triton_runtime.ports import free_endpoint, free_port
from triton_runtime.server import TritonFailed, TritonServer
from triton_runtime.stack import Child

DEADLINE_S = 5.0
"""For a request that names none: the gateway's default."""


class Triton:
    """One Triton. Started again, it listens where it did before."""

    def __init__(self, repository: Path) -> None:
        self.endpoint = free_endpoint()
        self._repository = repository
        self._server: TritonServer | None = None
        self._changing = threading.RLock()
        self._crashes = 0

    @property
    def crashes(self) -> int:
        """How often it ended by itself, whoever started it again."""
        with self._changing:
            return self._crashes + (self._server.crashes if self._server else 0)

    @property
    def process(self) -> psutil.Process:
        """The server's process."""
        assert self._server is not None
        return psutil.Process(self._server.process.pid)

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended, in whatever way."""
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Start it and wait until its releases answer."""
        with self._changing:
            self.stop()
            self._server = TritonServer(self._repository, self.endpoint, poll_seconds=1, grace_seconds=5).__enter__()
            self._server.wait_until_ready()

    def stop(self) -> None:
        """End it in order; nothing where it ended already."""
        with self._changing:
            if self._server is not None:
                self._crashes += self._server.crashes
                self._server.stop()
                self._server = None

    def kill(self) -> None:
        """As kill -9, and away with what it leaves behind."""
        with self._changing:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(self.process, signal.SIGKILL)
            self.stop()

    def revive(self) -> None:
        """Start it again where it ended by itself."""
        with self._changing:
            if self._server is not None and not self.is_running:
                self._crashes += 1
                self.start()

    def stubs(self, step: str, version: int | None = None) -> list[psutil.Process]:
        """The living processes of a step, or of one version of it, oldest first."""
        marker = f"_{step}/" if version is None else f"_{step}/{version}/"
        found: list[psutil.Process] = []
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # it may end this moment
            children = self.process.children() if self.is_running else []
        for each in sorted(children, key=lambda child: child.pid):
            with contextlib.suppress(psutil.Error):
                if any(marker in argument for argument in each.cmdline()):
                    found.append(each)
        return found

    def stub(self, step: str) -> psutil.Process:
        """The first process of a step."""
        for each in self.stubs(step):
            return each
        raise TritonFailed(f"no process runs the step {step}")


class Gateway:
    """One gateway in front of `addresses`. Started again, it listens where it did before."""

    def __init__(self, pipeline: str, addresses: list[str], routing: Path, log: IO[bytes]) -> None:
        self.port = free_port()
        self._environment = {
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_PIPELINE": pipeline,
            "GATEWAY_TRITON_URLS": ",".join(addresses),
            "GATEWAY_ROUTING": str(routing),
            "GATEWAY_DEADLINE_S": str(DEADLINE_S),
        }
        self._log = log
        self._child: Child | None = None

    @property
    def process(self) -> psutil.Process:
        """The gateway's process."""
        assert self._child is not None
        return psutil.Process(self._child.process.pid)

    def start(self) -> None:
        """Start it and wait until it would answer."""
        self._child = Child("gateway", environment=self._environment, stdout=self._log.fileno())
        wait_for(self.is_ready, 30)

    def stop(self) -> None:
        """End it in order; nothing where it ended already."""
        if self._child is not None:
            self._child.__exit__()
            self._child = None

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()
        self.stop()

    def is_ready(self) -> bool:
        """Whether a prediction would be answered now."""
        try:
            return bool(self._get("/health/ready"))
        except OSError:
            return False

    def answers(self, picture: bytes) -> bool:
        """Whether a picture is answered."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/predict", picture)
        request.add_header("Content-Type", "image/jpeg")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def problems(self) -> dict[str, int]:
        """The status of each code in its table of errors."""
        return {kind["code"]: kind["status"] for kind in json.loads(self._get("/errors"))}

    def gauges(self) -> dict[str, float]:
        """Its metrics, each summed over its labels."""
        families = text_string_to_metric_families(self._get("/metrics").decode())
        return {family.name: sum(sample.value for sample in family.samples) for family in families}

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return bytes(response.read())


class Stack:
    """Everything that a fault may touch. `proxy` is between the gateway and the first Triton, where there is one.

    `pair` is the repository, where the fault wants two releases. What a fault has to say beside the clients goes to
    `notes`, and a promise that it saw broken to `problems`.
    """

    def __init__(self, tritons: list[Triton], gateway: Gateway, proxy: Proxy | None, pair: Pair | None) -> None:
        self.tritons = tritons
        self.gateway = gateway
        self.proxy = proxy
        self._pair = pair
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._is_ending = threading.Event()
        self._reviving = threading.Thread(target=self._revive, daemon=True)

    def __enter__(self) -> Self:
        for triton in self.tritons:
            if not triton.is_running:
                triton.start()
        self._reviving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending.set()
        self._reviving.join()

    def _revive(self) -> None:
        while not self._is_ending.wait(0.2):
            for triton in self.tritons:
                triton.revive()

    @property
    def pair(self) -> Pair:
        """The repository with two releases."""
        assert self._pair is not None
        return self._pair

    def memory(self) -> int:
        """Bytes of the gateway's memory."""
        return int(self.gateway.process.memory_info().rss)


def shared_memory() -> dict[str, int]:
    """The segments of the Tritons that this process started, and their bytes."""
    return {path.name: path.stat().st_size for path in SHARED_MEMORY_FOLDER.glob(f"triton_{os.getpid()}_*")}


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal; nothing where the process is gone."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until `condition` holds.

    Raises:
        TritonFailed: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TritonFailed(f"a part of the stack did not come up within {seconds:g} s")
        time.sleep(0.05)
