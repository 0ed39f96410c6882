"""One embedded Triton server: started, waited for, kept whole, stopped, and cleaned up after.

When one of its Python processes dies, which Triton does not notice, a thread has the step loaded again (`healing`).
Triton itself is restarted here after a crash at its start, and after one in healing. Any other end is reported, and
whoever runs this decides.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Self

import contract
from triton_runtime import healing, stubs
from triton_runtime.installation import (
    SHARED_MEMORY_FOLDER,
    Installation,
    Missing,
    check_port,
    check_shared_memory,
    port_from_environment,
)
from triton_runtime.signals import is_in_a_hurry, kill_group, wait_for_end
from triton_runtime.workplace import Workplace

_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
RESTRICTED = "shared-memory,trace,logging"
"""Groups of Triton's API that nothing here uses, and that would let whoever reaches its ports make it write files, say
less, or map memory. They are locked. Loading and unloading needs no lock: while it polls the repository, Triton refuses
both."""
LOCK = "no client"
"""The header that would open them, whose value whoever lists processes can read. But nobody can send it: gRPC takes no
header with a blank in its name, and HTTP none with a line's end in its value."""


_LITTLE_MEMORY = 64 << 20
"""So many bytes of shared memory are little."""
_SHORT_PATIENCE_S = 1.0
"""For requests in flight where a server is replaced that cannot be mended: all others wait meanwhile."""


class TritonFailed(RuntimeError):
    """Triton ended, or does not serve what it should; the message says which model and why."""


@dataclass(frozen=True)
class Endpoint:
    """Where Triton listens. The variables that set the ports are named in `VARIABLES`."""

    address: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    VARIABLES: ClassVar = {"http": "TRITON_HTTP_PORT", "grpc": "TRITON_GRPC_PORT", "metrics": "TRITON_METRICS_PORT"}

    @classmethod
    def from_environment(cls) -> Self:
        """TRITON_ADDRESS and the ports of `VARIABLES`, with the defaults above.

        Raises:
            Missing: a variable is not a port number.
        """
        ports = {n: port_from_environment(variable, getattr(cls, n)) for n, variable in cls.VARIABLES.items()}
        return cls(os.environ.get("TRITON_ADDRESS", cls.address), **ports)

    def to_environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads."""
        ports = {variable: str(getattr(self, name)) for name, variable in self.VARIABLES.items()}
        return {"TRITON_ADDRESS": self.address, **ports}

    @property
    def grpc_url(self) -> str:
        """host:port of Triton's gRPC API."""
        return f"{self.address}:{self.grpc}"

    def url(self, path: str) -> str:
        """A URL of Triton's HTTP API."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.http}{path}"


class TritonServer:
    """A Triton process on a repository. Use as a context manager; leaving it stops the server.

    Args:
        repository: the folder to serve; Triton follows changes to it.
        endpoint: where to listen.
        poll_seconds: how often the repository is looked at.
        grace_seconds: how long requests in flight may take when the server is stopped.
        verbose: let Triton log what it does, not only what goes wrong.
        log: where it logs to; by default, where we do.
        heals: have Python processes that died replaced, which gives files in the repository later dates.

    Raises:
        Missing: on entering, where this machine lacks something.
    """

    def __init__(
        self,
        repository: Path,
        endpoint: Endpoint,
        *,
        poll_seconds: int = 2,
        grace_seconds: int = 30,
        verbose: bool = False,
        log: IO[bytes] | int | None = None,
        heals: bool = True,
    ) -> None:
        self.repository = repository.resolve()
        self.endpoint = endpoint
        self.poll_seconds = poll_seconds
        self.grace_seconds = grace_seconds
        self.verbose = verbose
        self._log = log
        self._heals = heals
        self._healer = healing.Healer(poll_seconds, grace_seconds)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._changing = threading.RLock()  # held while the process is replaced, and while it is healed
        self._is_restarting = False
        self._forgives_a_crash = False
        self.crashes = 0
        """Crashes of Triton in healing, mended by a restart."""

    def __enter__(self) -> Self:
        self._start()
        if self._heals:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._keep_whole, name="triton-healing", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        installation = Installation.find()
        if not self.releases():
            raise Missing(f"{self.repository} holds no release: run 'make export'")
        for name, variable in Endpoint.VARIABLES.items():
            check_port(self.endpoint.address, getattr(self.endpoint, name), variable)
        check_shared_memory()
        self._workplace = Workplace()
        folder = self._workplace.folder
        try:
            environment = installation.lay_out(folder)
            self.process = subprocess.Popen(
                self.command(installation.server, folder / "backends"),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
                preexec_fn=die_with_parent,
            )
        except BaseException:
            self._workplace.remove()
            raise

    def command(self, server: Path, backends: Path) -> list[str]:
        """The server's command line. Its shared memory is named after the folder that `backends` is in."""
        endpoint = self.endpoint
        lock = f"{RESTRICTED}:{LOCK}={secrets.token_hex(16)}\n."
        return [
            str(server),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={backends.parent.name}",
            "--model-control-mode=poll",
            f"--repository-poll-secs={self.poll_seconds}",
            "--disable-auto-complete-config",
            "--exit-on-error=false",  # one broken model must not take the others along
            f"--exit-timeout-secs={self.grace_seconds}",
            f"--http-address={endpoint.address}",
            f"--http-port={endpoint.http}",
            f"--grpc-address={endpoint.address}",
            f"--grpc-port={endpoint.grpc}",
            f"--metrics-address={endpoint.address}",
            f"--metrics-port={endpoint.metrics}",
            f"--log-info={str(self.verbose).lower()}",
            f"--http-restricted-api={lock}",
            f"--grpc-restricted-protocol={lock}",
        ]

    def releases(self) -> list[str]:
        """The newest release of each pipeline in the repository."""
        newest: dict[str, int] = {}
        for path in self.repository.glob("*/config.pbtxt"):
            if parsed := contract.parse_release_name(path.parent.name):
                newest[parsed[0]] = max(newest.get(parsed[0], 0), parsed[1])
        return [contract.release_name(pipeline, number) for pipeline, number in sorted(newest.items())]

    def wait_until_ready(self, timeout: float = 120.0) -> list[str]:
        """Wait for the newest release of each pipeline; return those that answer, once no other one is loading.

        Triton 24.10 crashes at a start now and then, seldom, when a lock of its shared memory fails
        (`boost::interprocess::lock_exception`). It is started again then, once.

        Raises:
            TritonFailed: Triton ended, was stopped, can serve nothing, or is late; with the models' reasons if known.
        """
        deadline = time.monotonic() + timeout
        wanted = waiting = self.releases()
        has_crashed = False
        while waiting:
            if (status := self.poll()) is not None:
                if has_crashed or -status not in _CRASHES:
                    raise TritonFailed(f"Triton ended with status {status} while starting: see its log")
                print("triton: crashed while starting, and is restarted", file=sys.stderr)
                has_crashed = True
                self.restart()
            if self._stopping.is_set():
                raise TritonFailed("Triton was stopped while starting")
            waiting = [name for name in waiting if not self._ready(name)]
            if not waiting:
                break
            index = self._index()
            if index and not any(model.get("state") == "LOADING" for model in index):
                if len(waiting) < len(wanted) and (broken := _broken(index, waiting)):
                    print(f"triton: goes on without {broken}", file=sys.stderr, flush=True)
                    break
                if reasons := _failures(index):
                    raise TritonFailed(f"{', '.join(waiting)} cannot be served: {reasons}")
            if time.monotonic() > deadline:
                reasons = _failures(index) or "loading"
                raise TritonFailed(f"{', '.join(waiting)} not ready after {timeout:g} s: {reasons}")
            time.sleep(0.1)
        return [name for name in wanted if name not in waiting]

    def _ready(self, release: str) -> bool:
        return self._status_of(f"/v2/models/{release}/ready", 5) == 200

    def _status_of(self, path: str, timeout: float) -> int | None:
        """The status that a path of Triton's HTTP API is answered with; None where it is not answered."""
        try:
            with urllib.request.urlopen(self.endpoint.url(path), timeout=timeout) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, OSError):
            return None

    def _index(self) -> list[dict[str, str]]:
        """What Triton has; nothing where it does not say."""
        request = urllib.request.Request(self.endpoint.url("/v2/repository/index"), data=b"{}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return list(json.load(response))
        except (urllib.error.URLError, OSError, ValueError):
            return []

    def poll(self) -> int | None:
        """Triton's exit status where it ended by itself; None while it runs, or is being restarted."""
        return None if self._is_restarting or self._crashed_by_healing() else self.process.poll()

    def _crashed_by_healing(self) -> bool:
        """Triton 24.10 crashes now and then while it loads a step again; what was done to it here is mended here."""
        status = self.process.poll()
        has_crashed = status is not None and -status in _CRASHES and self._thread is not None
        return has_crashed and (self._healer.is_replacing or self._forgives_a_crash)

    def restart(self, patience_s: float | None = None) -> None:
        """Stop Triton in order, where it has not ended, and start it again.

        `patience_s` bounds what requests in flight may take, in place of `grace_seconds`.

        Raises:
            Missing: as on entering.
        """
        process = self.process
        with self._changing:
            if self.process is not process:
                return  # another thread did it meanwhile
            self._is_restarting = True
            try:
                self._end(self.grace_seconds + 10 if patience_s is None else patience_s)
                if not self._stopping.is_set():
                    self._start()
            finally:
                self._is_restarting = False

    def stop(self) -> None:
        """Let Triton finish what it has, then make sure that no process and no shared memory is left."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end(self.grace_seconds + 10)

    def _end(self, patience_s: float) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        deadline, over_since = time.monotonic() + patience_s, None
        while not wait_for_end(self.process, 0.2):
            now = time.monotonic()
            # Models in which a request failed with its process are never unloaded, and Triton would wait for them.
            over_since = (over_since or now) if self._has_remains_alone() else None
            if now > deadline or is_in_a_hurry():
                print("triton: killed before it had stopped", file=sys.stderr)
                break
            if over_since is not None and now - over_since > 1:
                break
        kill_group(self.process)  # and stubs that outlived it
        self._workplace.remove()

    def _has_remains_alone(self) -> bool:
        """Whether all its Python processes ended or were replaced, and one of them is dead and still there."""
        seen = stubs.look(self.process.pid)
        return bool(seen.dead) and seen.living.keys() <= self._healer.replaced

    def _keep_whole(self) -> None:
        """Have processes that died replaced, until the server is stopped."""
        process, strangers, is_serving = self.process, set[int](), False
        while not self._stopping.wait(self._healer.pause):
            try:
                with self._changing:
                    if process is not self.process:
                        process, strangers, is_serving = self.process, set(), False
                        self._healer.begin()
                    if self._crashed_by_healing():
                        print("triton: crashed while it loaded a step, and is restarted", file=sys.stderr, flush=True)
                        self.crashes += 1
                        is_first, self._forgives_a_crash = not self._forgives_a_crash, False
                        self._healer.begin()
                        self.restart()
                        self._forgives_a_crash = is_first  # if it crashes again before it serves, others decide
                    elif process.poll() is None:
                        if not is_serving and (is_serving := self._is_live()):
                            self._forgives_a_crash = False
                        seen = stubs.look(process.pid, strangers)
                        is_short = shutil.disk_usage(SHARED_MEMORY_FOLDER).free < _LITTLE_MEMORY
                        for action in self._healer.look(
                            time.monotonic(), seen, is_serving=is_serving, is_short=is_short
                        ):
                            self._heal(action, is_serving)
            except Exception as error:
                print(f"triton: could not look after its processes, and tries again: {error!r}", file=sys.stderr)

    def _is_live(self) -> bool:
        """Whether Triton answers at all, which it does once it has tried to load everything."""
        return self._status_of("/v2/health/live", 1) is not None

    def _heal(self, action: healing.Action, is_serving: bool) -> None:
        match action:
            case healing.Say(text):
                print(f"triton: {text}", file=sys.stderr, flush=True)
            case healing.Reload(file):
                try:
                    _date_later(file)
                except FileNotFoundError:
                    self._healer.gone(file)
                except OSError as error:
                    self._healer.refused(file, f"{error.strerror}: {file}")
            case healing.Kill(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            case healing.Restart():
                self.restart(_SHORT_PATIENCE_S if is_serving else 0.0)
                self._forgives_a_crash = True

    def shared_memory(self) -> Iterator[Path]:
        """The files through which the server talks to its Python steps."""
        yield from SHARED_MEMORY_FOLDER.glob(f"{self._workplace.name}*")


def _failures(index: list[dict[str, str]]) -> str:
    """Why models are unavailable, as Triton says."""
    reasons = [
        f"{model['name']}: {' '.join(model.get('reason', 'no reason given').split())}"
        for model in index
        if model.get("state") == "UNAVAILABLE"
    ]
    return "; ".join(reasons)


def _broken(index: list[dict[str, str]], releases: list[str]) -> str:
    """These releases with the reason why they cannot be served; empty where one of them can."""
    models = {model["name"]: model for model in index}
    if any(models.get(name, {}).get("state") == "READY" for name in releases):
        return ""
    missing = "its config.pbtxt cannot be read, see above"  # Triton leaves such a folder out
    return "; ".join(f"{name} ({models.get(name, {}).get('reason') or missing})" for name in releases)


def _date_later(file: Path) -> None:
    """Date one file of a model later than all that Triton may have met in the model's folder: that is a change to it.

    The content stays what was published. A later date of the model's config.pbtxt alone would change nothing.
    """
    folder = file.parent.parent
    dates = [folder.lstat().st_mtime_ns]
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):  # just removed, or so deep that its path is too long
                dates.append(os.lstat(os.path.join(parent, name)).st_mtime_ns)
    date = max(time.time_ns(), max(dates) + 1_000_000_000)
    os.utime(file, ns=(date, date))


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the thread that started it ends (for `preexec_fn`)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
