"""Ending in order: a signal unwinds the stack, so that every context manager cleans up."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked for the end. No Exception, so that nothing catches it on the way out."""


def unwind_on_signals() -> None:
    """From now on SIGTERM, Ctrl-C and a closed terminal raise `Stopped` in the main thread, once."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one must not cut the clean-up short
        raise Stopped(number)

    for each in _SIGNALS:
        signal.signal(each, stop)
