"""Which processes of a server's steps were found dead, and whether a call may have ended one.

Triton says which process died, but says the same to the call that ended it and to each that finds it dead later. What
tells them apart is when a call was sent, and which processes are known to be dead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import contract
from contract import Manifest

DEAD_S = 10.0
"""A process that nobody found dead for so long was replaced meanwhile."""
_QUIET_S = 1.1
"""A call to a dead process takes about a second to fail, so under load one is met that often."""


class Deaths:
    """The dead processes of one server, by the digest of their step and the name of their instance."""

    def __init__(self) -> None:
        self._dead: dict[str, dict[str, tuple[float, float]]] = {}
        """When each was first and last met."""
        self.instances: dict[str, int] = {}
        """How many processes a step has, by its digest, where that is known."""

    def may_be_due_to(self, step: str, process: str, sent: float) -> bool:
        """Whether a call that was sent then (monotonic seconds) may have ended the process that it failed with."""
        now = time.monotonic()
        dead = self._dead.setdefault(step, {})
        first, last = dead.get(process, (now, now))
        if sent > last + DEAD_S:
            first = now
        dead[process] = first, now
        return sent <= first

    def was_met(self, step: str, process: str, since: float) -> bool:
        """Whether a process was found dead since then (monotonic seconds)."""
        return self._dead.get(step, {}).get(process, (0.0, -math.inf))[1] >= since

    def were_met_lately(self, steps: Iterable[str]) -> bool:
        """Whether a process of these steps was found dead a moment ago, so that some may be dead still."""
        since = time.monotonic() - _QUIET_S
        return any(last > since for step in steps for _, last in self._dead.get(step, {}).values())

    @property
    def most_instances(self) -> int:
        """How many processes a step has, of those that lost one."""
        return max(self.instances.values(), default=1)

    def answered(self, steps: Iterable[str]) -> None:
        """These steps answered. One whose processes had all died was loaded again, so none of them is dead now."""
        for step in steps:
            if step in self._dead and len(self._dead[step]) >= self.instances.get(step, 1_000_000):
                del self._dead[step]


def steps_of(release: Manifest) -> list[str]:
    """The digests of a release's steps."""
    return [pin.digest for pin in release.steps.values()]


def step_of(release: Manifest, process: str) -> str:
    """The step, of those of a release, that a process belongs to, by the name of its instance; empty where none.

    Triton names the processes of all versions of a step alike.
    """
    return next(
        (step for step in release.steps if process.startswith(f"{contract.step_model(release.pipeline, step)}_")), ""
    )
