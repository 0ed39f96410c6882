"""What is broken: real Tritons on one repository, and a real gateway in front of one or two of them.

Nobody plays the operator here: a process of a step that died comes back by itself or not at all. A server that ended
without having been told to is started again, as `make serve`, Docker or Kubernetes do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Self

import psutil

from chaos.proxy import Proxy
from chaos.releases import Pair
from harness.gateway import GatewayProcess
from harness.ports import free_endpoint
from triton_runtime.installation import SHARED_MEMORY_FOLDER
from triton_runtime.server import TritonFailed, TritonServer
from triton_runtime.stubs import look

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
        server = self._server
        living = look(server.process.pid).living if server is not None else {}
        found: list[psutil.Process] = []
        for process, model in sorted(living.items(), key=lambda each: each[0].pid):
            *_, name, number, _ = model.parts
            if name.endswith(f"_{step}") and (version is None or number == str(version)):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end this moment
                    found.append(psutil.Process(process.pid))
        return found

    def stub(self, step: str) -> psutil.Process:
        """The first process of a step."""
        for each in self.stubs(step):
            return each
        raise TritonFailed(f"no process runs the step {step}")


class Stack:
    """Everything that a fault may touch. `proxy` is between the gateway and the first Triton, where there is one.

    `pair` is the repository, where the fault wants two releases. What a fault has to say beside the clients goes to
    `notes`, and a promise that it saw broken to `problems`.
    """

    def __init__(self, tritons: list[Triton], gateway: GatewayProcess, proxy: Proxy | None, pair: Pair | None) -> None:
        self.tritons = tritons
        self.gateway = gateway
        self.proxy = proxy
        self._pair = pair
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._is_ending = threading.Event()
        self._reviving = threading.Thread(target=self._revive, daemon=True)

    def __enter__(self) -> Self:
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
        return int(psutil.Process(self.gateway.process.pid).memory_info().rss)


def shared_memory() -> dict[str, int]:
    """The segments of the Tritons that this process started, and their bytes."""
    return {path.name: path.stat().st_size for path in SHARED_MEMORY_FOLDER.glob(f"triton_{os.getpid()}_*")}


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal; nothing where the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
