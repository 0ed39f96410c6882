"""The requests for one release: who waits, what is on its way, and what calls are expected to take."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict

from gateway.dispatch.fair_queue import Line
from gateway.dispatch.limiter import Knee
from gateway.dispatch.work import Call, Waiting
from gateway.triton.fleet import Replica

RETRIES_SAVED = 100.0
_RECENT = 0.2
"""Weight of the newest call in what calls are expected to take."""
_SLOWER = 1.01
"""By which the quickest call grows with each one, so that a server that becomes slower is believed at some time."""
_TRY_AGAIN_S = 1.0


class Lane:
    """The requests for one release."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.line = Line()
        self.calls: set[Call] = set()
        self._calls_of: Counter[Replica] = Counter()
        self._in_calls = 0
        """Pictures."""
        self._crowd = 0.0
        """How many pictures are there once clients that were answered have asked again: the most lately."""
        self.knees: defaultdict[Replica, Knee] = defaultdict(Knee)
        self.call_s = 0.0
        """How long a call takes."""
        self._answered_s = 0.0
        """The same, of those that were answered."""
        self._quickest_s = 0.0
        """The same, of the quickest lately."""
        self._tried_at = 0.0
        """When a request last had less time than that, and was let in nevertheless."""
        self._picture_s = 0.0
        """The same, for each of its pictures."""
        self.trials = 0
        """Calls on their way whose picture may end the process which works on it: one at most."""
        self.alarm: asyncio.TimerHandle | None = None
        """When a call that waits for more pictures goes, however many there are."""
        self.retries = RETRIES_SAVED
        """Pictures that may be sent again now."""

    def begin(self, call: Call) -> None:
        """A call is on its way."""
        self.calls.add(call)
        self._calls_of[call.replica] += 1
        self._in_calls += len(call.group)
        self.trials += call.is_trial
        there = len(self.line) + self._in_calls
        self._crowd = max(there, self._crowd - max(0.25, (self._crowd - there) / 4))

    def end(self, call: Call) -> None:
        """It is not any more."""
        self.calls.remove(call)
        self._calls_of[call.replica] -= 1
        if not self._calls_of[call.replica]:
            del self._calls_of[call.replica]  # which may be gone
        self._in_calls -= len(call.group)
        self.trials -= call.is_trial
        if not self.calls and not self.line:
            self._crowd = 0.0

    def room(self, replica: Replica) -> int:
        """How many more calls a replica may get."""
        return self.knees[replica].limit - self._calls_of[replica]

    def slots(self, replicas: list[Replica]) -> int:
        """How many calls the replicas may get together, at least one."""
        return max(1, sum([self.knees[replica].limit for replica in replicas]))

    def expected(self, client: str, replicas: list[Replica]) -> float:
        """Seconds until an answer for one more request of a client."""
        own = self.line.of(client)
        clients = self.line.clients + (not own)
        ahead = min(len(self.line) + 1, (own + 1) * clients)
        return ahead * self._picture_s / self.slots(replicas) + self.call_s

    def join(self, waiting: Waiting) -> None:
        """One more waits."""
        self.line.add(waiting)
        self._crowd = max(self._crowd, len(self.line) + self._in_calls)

    def share(self, replicas: list[Replica]) -> int:
        """How many pictures each call has where all that are there are spread evenly over the calls that may be."""
        return math.ceil(self._crowd / self.slots(replicas))

    def coming(self) -> int:
        """How many pictures wait, or are about to."""
        return math.ceil(self._crowd) - self._in_calls

    def is_too_late(self, waiting: Waiting) -> bool:
        """Whether a call made now is expected to end after the deadline. Never where that could not be found out."""
        return bool(self.calls) and time.monotonic() + self.call_s > waiting.deadline

    def is_hopeless(self, left: float) -> bool:
        """Whether no answer ever came within so many seconds. Now and then one request may find out that it can."""
        now = time.monotonic()
        if left >= self._quickest_s:
            return False
        if now - self._tried_at > _TRY_AGAIN_S:
            self._tried_at = now
            return False
        return True

    def learn(self, call: Call) -> None:
        """A call ended. One that was abandoned would have taken longer still."""
        now = time.monotonic()
        seconds = now - call.sent
        if call.is_given_up and seconds < self.call_s:
            return
        weight = _RECENT if self.call_s else 1.0
        self.call_s += weight * (seconds - self.call_s)
        if not call.is_given_up:
            self._answered_s += weight * (seconds - self._answered_s)
            self._quickest_s = min(seconds, self._quickest_s * _SLOWER or seconds)
        self._picture_s += weight * (seconds / len(call.group) - self._picture_s)
        knee = self.knees[call.replica]
        if call.had_to_wait:
            knee.observe(now, seconds, len(call.group))
        else:
            knee.pause()

    def left_after_giving_up(self, call: Call) -> float:
        """Seconds for which an abandoned call keeps its place: until it would usually have been answered.

        Triton drops it only between two steps. What waits for its first step is worked on for nobody, and clients
        that leave would fill that queue without end.
        """
        return max(0.0, call.sent + self._answered_s - time.monotonic())
