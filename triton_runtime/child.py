"""A Python module that runs as a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from triton_runtime.server import die_with_parent
from triton_runtime.signals import kill_group, wait_for_end

ROOT = Path(__file__).resolve().parent.parent


class Child:
    """`python -m <arguments>` as a child process. Leaving the context lets it finish what it has begun.

    It has `grace_seconds` for that, and less where a second signal comes; then it is killed, with all that it started.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        grace_seconds: float = 35.0,
    ) -> None:
        self._command = [sys.executable, "-m", *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._stdout, self._stderr = stdout, stderr
        self._grace_seconds = grace_seconds
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=ROOT,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> bool:
        """End it in order; returns whether it ended in time. Where it has ended, what is left of it is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if not (has_ended := wait_for_end(self.process, self._grace_seconds)):
            print(f"{' '.join(self._command[2:4])}: did not stop in time, killed", file=sys.stderr)
        kill_group(self.process)
        return has_ended

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    def restart(self) -> None:
        """Start it again; what is left of it is killed before."""
        kill_group(self.process)
        self._start()
