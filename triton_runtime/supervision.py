"""Parts of a stack that end by themselves are started again: at once, then ever later, and in the end no more."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from triton_runtime.backoff import Backoff
from triton_runtime.installation import Missing

MOST_FAILURES = 6
CALM_S = 60.0
"""What ran for so long was well: failures before are forgotten."""


class Part(Protocol):
    """A server or a child process that runs until it is stopped."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def restart(self) -> None:
        """Start it again, after what is left of it was removed."""


@dataclass
class _History:
    backoff: Backoff = field(default_factory=lambda: Backoff(first=1, most=16, calm=CALM_S))
    failures: int = 0
    started: float = field(default_factory=lambda: time.monotonic())
    due: float | None = None


class Supervisor:
    """Looks after parts, by their names. The others go on without one that is `spare`, so it is never abandoned."""

    def __init__(self, parts: Mapping[str, Part], spare: Collection[str] = ()) -> None:
        self._parts = {name: (part, _History()) for name, part in parts.items()}
        self._spare = spare

    def run(self) -> int:
        """Until one is abandoned, after `MOST_FAILURES` without `CALM_S` between: its status if above 0, else 1."""
        while True:
            for name, (part, history) in self._parts.items():
                if (status := self._look(name, part, history, time.monotonic())) is not None:
                    return status
            time.sleep(0.2)

    def _look(self, name: str, part: Part, history: _History, now: float) -> int | None:
        if (status := part.poll()) is None:
            return None
        if history.due is None:
            history.failures = 1 if now - history.started >= CALM_S else history.failures + 1
            if history.failures >= MOST_FAILURES and name not in self._spare:
                times = f"the {history.failures}th time"
                _say(f"{name} ended by itself with status {status}, {times}: it is not started again")
                return status if status > 0 else 1
            history.due = now + (wait := history.backoff.wait(now))
            _say(f"{name} ended by itself with status {status}: it is started again{f' in {wait:g} s' if wait else ''}")
        if now >= history.due:
            history.due = None
            try:
                part.restart()
            except (Missing, OSError) as error:
                _say(f"{name} cannot be started: {error}")
            history.started = time.monotonic()
        return None


def _say(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)
