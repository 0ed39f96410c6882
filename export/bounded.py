"""A program that may hang, fork or flood, run for a bounded time: its lines, and how it ended.

It has a session of its own, and what it starts inherits a mark in its environment. At the end, whatever is in the
session or bears the mark is killed, so that neither a pipe that a grandchild holds nor a daemon outlives the time. That
is for what goes wrong, not for what hides: a process that left the session and runs a program without the mark is not
found. The mark is read from /proc, so on Linux only.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_MARK = "EXPORT_BOUNDED_RUN"
_CHUNK = 1 << 16
_TAIL = 1 << 14
"""How much of the end of its stderr is kept."""
_MOST = 1 << 26
"""Bytes on stdout; golden pictures travel there."""
_TICK_S = 0.05
_CHECK_S = 0.5
_MOST_PROCESSES = 128
"""At once: what starts others without end would make the machine stand still."""
_SWEEP_S = 10.0
"""For how long to look for processes that are left; they could go on starting others."""
_QUIET = 3
"""Looks in a row that find none: one that starts another and ends may slip through a single look."""


@dataclass(frozen=True)
class Ending:
    """How it ended: `status` as of `subprocess`, None where it was stopped, by its time or otherwise.

    `stopped` says why its lines were not read to the end; `last` is the last line on its stderr.
    """

    status: int | None
    stopped: str
    last: str


def run(
    command: Sequence[str],
    given: bytes,
    timeout_s: float,
    take: Callable[[bytes], str],
    *,
    folder: Path,
    environment: dict[str, str],
    limit: Callable[[], None],
    check: Callable[[], None] = lambda: None,
) -> Ending:
    """Run `command` in `folder` with `given` on stdin, and call `take` with each line of its stdout.

    Where `take` returns a text, it is stopped for that reason. `limit` is called in the new process first. `check` is
    called twice a second; what it raises ends the run.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as stdin:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, _MARK: mark},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limit,
        )
    reader = _Reader(process, take, check, mark)
    try:
        status = reader.follow(time.monotonic() + timeout_s)
    finally:
        _kill_all(process, mark)
        reader.close()
    return Ending(status, reader.stopped, reader.last_error())


class _Reader:
    """What a process writes, as long as it runs: bounded in size, and not waited for once it ended."""

    def __init__(
        self, process: subprocess.Popen[bytes], take: Callable[[bytes], str], check: Callable[[], None], mark: str
    ) -> None:
        assert process.stdout and process.stderr
        self._process, self._take, self._check, self._mark = process, take, check, mark
        self._checked = time.monotonic()
        self._pipes = (process.stdout, process.stderr)
        self._line, self._errors, self._read = bytearray(), b"", 0
        self.stopped = ""
        self._selector = selectors.DefaultSelector()
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, pipe)

    def follow(self, deadline: float) -> int | None:
        """Read until the process ends; its status, or None at the deadline or where it was stopped before."""
        while not self.stopped and (left := deadline - time.monotonic()) > 0:
            if time.monotonic() - self._checked >= _CHECK_S:
                self._check()
                if sum(1 for _ in _marked(self._mark)) > _MOST_PROCESSES:
                    self.stopped = f"had more than {_MOST_PROCESSES} processes at once"
                    return None
                self._checked = time.monotonic()
            # Looked at before the pipes are: what it wrote before it ended is read then.
            status = _status(self._process.pid)
            if not self._selector.get_map():
                time.sleep(min(_TICK_S, left))
            for key, _ in self._selector.select(0 if status is not None else min(_TICK_S, left)):
                self._take_from(key.data)
                status = None  # there may be more
            if status is not None:
                return status
        return None

    def _take_from(self, pipe: IO[bytes]) -> None:
        data = os.read(pipe.fileno(), _CHUNK)
        if not data:
            self._selector.unregister(pipe)
        elif pipe is self._pipes[1]:
            self._errors = (self._errors + data)[-_TAIL:]
        else:
            self._read += len(data)
            if self._read > _MOST:
                self.stopped = f"wrote more than {_MOST >> 20} MiB"
                return
            *lines, rest = data.split(b"\n")
            for line in lines:
                whole = bytes(self._line + line)
                self._line.clear()
                self.stopped = self.stopped or self._take(whole)
            self._line += rest

    def last_error(self) -> str:
        """The last line on stderr."""
        return "".join(self._errors.decode(errors="replace").strip().splitlines()[-1:])

    def close(self) -> None:
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()


def _status(pid: int) -> int | None:
    """How a child ended, as of `subprocess`; None while it runs. It is not reaped, so that its number stays its own."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until, quiet = time.monotonic() + _SWEEP_S, 0
    while quiet < _QUIET and time.monotonic() < until:
        left = list(_marked(mark))
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if left else quiet + 1
        time.sleep(0.01)


def _marked(mark: str) -> Iterator[int]:
    """The processes that bear the mark. One that ended and waits for its parent has no environment any more."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
