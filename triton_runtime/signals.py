"""Ending in order: a signal unwinds the stack, so that every context manager cleans up. A second one makes it quick.

What is waited for while everything ends goes through `wait_for_end`, so that it ends at some time, and at once for
whoever presses Ctrl-C again; what is killed then is cleaned up after like anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_in_a_hurry = threading.Event()


class Stopped(BaseException):
    """A signal asked for the end. No Exception, so that nothing catches it on the way out."""


def unwind_on_signals() -> None:
    """From now on SIGTERM, Ctrl-C and a closed terminal raise `Stopped` in the main thread, once.

    A second one cuts no clean-up short, only the waiting for processes to end (`wait_for_end`).
    """
    unwinding = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal unwinding
        if unwinding:
            _in_a_hurry.set()
        else:
            unwinding = True
            raise Stopped(number)

    for each in _SIGNALS:
        signal.signal(each, stop)


def is_in_a_hurry() -> bool:
    """Whether a second signal came."""
    return _in_a_hurry.is_set()


def wait_for_end(process: subprocess.Popen, seconds: float) -> bool:
    """Wait until a process ended, for so many seconds, or until somebody is in a hurry; returns whether it did."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if _in_a_hurry.is_set() or time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def kill_group(process: subprocess.Popen, seconds: float = 5.0) -> None:
    """Kill a process that leads its group and all that it started in it, and wait until they are gone.

    Stops waiting after so many seconds: what hangs in the kernel, or is left to an init that reaps nothing, never ends.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.02)
