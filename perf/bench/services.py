"""The contenders that listen: started, waited for, looked at from outside, and stopped.

Only one is measured at a time, and those that wait must not cost it anything: LitServe's workers, for one, ask for
requests all the time. So an app stands still, as by SIGSTOP, except while it is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from harness import ROOT, SAMPLE, client
from harness.gateway import whole_stack
from harness.ports import free_port
from harness.waiting import wait_for
from perf.analyzer import PerfError
from perf.bench.contenders.work import environment
from triton_runtime.server import Endpoint, TritonServer, die_with_parent

STACK, BASE = "stack", "stack, base"
TUNED, PLAIN, LITSERVE, BENTOML, MOSEC = "app, tuned", "app, plain", "litserve", "bentoml", "mosec"
PYTHON = ROOT / ".venv-contenders" / "bin" / "python"
"""Of the environment with LitServe, BentoML and mosec."""

_COMMANDS = {
    TUNED: [sys.executable, "-m", "perf.bench.contenders.inprocess", "tuned", "{port}"],
    PLAIN: [sys.executable, "-m", "perf.bench.contenders.inprocess", "plain", "{port}"],
    LITSERVE: [str(PYTHON), "-m", "perf.bench.contenders.litserve_app", "{port}"],
    BENTOML: [
        *(str(PYTHON), "-m", "bentoml", "serve", "perf.bench.contenders.bentoml_app:Contender"),
        *("--host", "127.0.0.1", "--port", "{port}"),
    ],
    MOSEC: [str(PYTHON), "-m", "perf.bench.contenders.mosec_app", "--address", "127.0.0.1", "--port", "{port}"],
}
_PATIENCE_S = 60.0


class Service:
    """A contender that listens: where it predicts, and the processes that are its."""

    def __init__(self, url: str, processes: Mapping[str, psutil.Process]) -> None:
        self.url = url
        self._processes = processes

    def asking(self, release: str) -> Service:
        """The same, with every request pinned to a release."""
        return Service(f"{self.url}?model_version={release}", self._processes)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """For the length of this block it runs; what stands still otherwise stands still again afterwards."""
        yield

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time until now, by part."""
        spent: dict[str, float] = defaultdict(float)
        for part, process in self.parts():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[part] += times.user + times.system
        return spent

    def memory_mib(self) -> float:
        """Memory that would be free again without it: what is shared with others is not counted."""
        total = 0
        for _, process in self.parts():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().uss
        return total / 2**20

    def parts(self) -> Iterator[tuple[str, psutil.Process]]:
        """Its processes, each with the part that it is of: a step has several."""
        for part, process in self._processes.items():
            yield part, process
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    steps = [step for step in ("preprocess", "classifier", "postprocess") if f"_{step}/" in line]
                    yield (steps or [part])[0], child


class App(Service):
    """One that stands still until it is measured."""

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """See `Service`."""
        self.resume()
        yield
        self.suspend()

    def suspend(self) -> None:
        """Stop every process where it is."""
        for _, process in self.parts():
            process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for _, process in self.parts():
            process.resume()


@contextlib.contextmanager
def stack(repository: Path, log: IO[bytes] | None = None) -> Iterator[tuple[Service, TritonServer]]:
    """Gateway and Triton as `make serve` starts them, on ports of their own, answering; `log` is Triton's."""
    with whole_stack(repository, triton_log=log) as (triton, gateway):
        gateway.predict(SAMPLE.read_bytes(), _PATIENCE_S)
        parts = {"gateway": psutil.Process(gateway.process.pid), "triton": psutil.Process(triton.process.pid)}
        yield Service(f"{gateway.url}/v1/predict", parts), triton


@contextlib.contextmanager
def app(name: str, preprocessing: Path, model: Path) -> Iterator[App]:
    """One of the other ways to serve, seen to answer, and suspended.

    Raises:
        PerfError: it does not answer; the message has its last words.
    """
    port = free_port()
    command = [word.format(port=port) for word in _COMMANDS[name]]
    with tempfile.TemporaryDirectory(prefix="contender-") as folder:
        variables = {**os.environ, **environment(preprocessing, model), "PYTHONDONTWRITEBYTECODE": "1"}
        variables |= {"BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True"}
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=variables, cwd=ROOT, stdout=output, stderr=output, preexec_fn=die_with_parent
            )
        service = App(f"http://127.0.0.1:{port}/v1/predict", {name: psutil.Process(process.pid)})
        try:
            try:
                wait_for_answer(service.url)
            except PerfError as error:
                raise PerfError(f"{name}: {error}; its last words: {log.read_text()[-300:]!r}") from None
            service.suspend()
            yield service
        finally:
            _stop(process, service)


def require(names: Iterable[str]) -> None:
    """Raise `PerfError` where what the named contenders need is not installed; the message says what to do."""
    listening = [name for name in names if name in (STACK, *_COMMANDS)]
    if listening and not shutil.which("wrk"):
        raise PerfError("wrk is missing: apt-get install wrk")
    if missing := [name for name in listening if name in _COMMANDS and not Path(_COMMANDS[name][0]).exists()]:
        raise PerfError(f"{', '.join(missing)}: not installed, run 'make contenders'")


def wait_for_answer(url: str) -> None:
    """Wait until a picture is answered.

    Raises:
        PerfError: it is not in time.
    """
    try:
        wait_for(lambda: client.predict(url, SAMPLE.read_bytes()), _PATIENCE_S, pause=0.2, meanwhile=OSError)
    except TimeoutError as error:
        raise PerfError(str(error)) from None


def _stop(process: subprocess.Popen, service: App) -> None:
    """End it and whatever it started: not all of them take their workers along."""
    everything = [each for _, each in service.parts()]
    service.resume()
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(everything, timeout=5)
    for each in left:
        with contextlib.suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(left, timeout=5)
    process.wait()


@contextlib.contextmanager
def listening(
    names: Sequence[str], repository: Path, preprocessing: Path, model: Path, pins: Mapping[str, str]
) -> Iterator[tuple[dict[str, Service], Endpoint]]:
    """The stack and the named apps, for the length of this block.

    Args:
        names: contenders; those that do not listen are left out.
        repository: what the stack serves.
        preprocessing: the preprocessing.py of the apps.
        model: their model.onnx.
        pins: the release that the stack is asked for as STACK and as BASE; empty: whichever the routing says.
    """
    with contextlib.ExitStack() as running:
        whole, triton = running.enter_context(stack(repository))
        found = {STACK: whole}
        for name, release in pins.items():
            found[name] = whole.asking(release)
            wait_for_answer(found[name].url)
        for name in _COMMANDS:
            if name in names:
                found[name] = running.enter_context(app(name, preprocessing, model))
        yield {name: service for name, service in found.items() if name in names}, triton.endpoint
