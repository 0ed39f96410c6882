"""The requests for one release: who waits, what is on its way, and what calls are expected to take."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict

from gateway.dispatch.fair_queue import FairQueue
from gateway.dispatch.limiter import Limiter
from gateway.dispatch.work import Call, PendingItem
from gateway.triton.fleet import Replica

RETRIES_SAVED = 100.0
_RECENT = 0.2
"""Weight of the newest call in the moving averages."""
_SLOWER = 1.01
"""Growth of the remembered quickest call with each call, so that a server that became slower is recognised."""
_TRY_AGAIN_S = 1.0


class ReleaseQueue:
    """The requests for one release."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.pending = FairQueue()
        self.calls: set[Call] = set()
        self._calls_of: Counter[Replica] = Counter()
        self._in_calls = 0
        """Pictures."""
        self._demand_estimate = 0.0
        """Decaying maximum of pictures queued plus in flight: clients that were answered are about to ask again."""
        self.limiters: defaultdict[Replica, Limiter] = defaultdict(Limiter)
        self.call_s = 0.0
        """Moving average of the duration of a call, in seconds."""
        self._answered_s = 0.0
        """The same, of answered calls only."""
        self._quickest_s = 0.0
        """Duration of the quickest call lately, in seconds."""
        self._tried_at = 0.0
        """When a request with less time left than that was last admitted, to find out whether it still holds."""
        self._picture_s = 0.0
        """Moving average of the seconds per picture of a call."""
        self.trials = 0
        """Trials of suspects in flight: one at most."""
        self.alarm: asyncio.TimerHandle | None = None
        """When a partial batch is sent, however many pictures it has by then."""
        self.retries = RETRIES_SAVED
        """The retry budget: pictures that may be sent again now."""

    def begin(self, call: Call) -> None:
        """A call is on its way."""
        self.calls.add(call)
        self._calls_of[call.replica] += 1
        self._in_calls += len(call.group)
        self.trials += call.is_trial
        there = len(self.pending) + self._in_calls
        self._demand_estimate = max(there, self._demand_estimate - max(0.25, (self._demand_estimate - there) / 4))

    def end(self, call: Call) -> None:
        """It is not any more."""
        self.calls.remove(call)
        self._calls_of[call.replica] -= 1
        if not self._calls_of[call.replica]:
            del self._calls_of[call.replica]  # which may be gone
        self._in_calls -= len(call.group)
        self.trials -= call.is_trial
        if not self.calls and not self.pending:
            self._demand_estimate = 0.0

    def room(self, replica: Replica) -> int:
        """How many more calls a replica may get."""
        return self.limiters[replica].limit - self._calls_of[replica]

    def slots(self, replicas: list[Replica]) -> int:
        """How many calls the replicas may get together, at least one."""
        return max(1, sum([self.limiters[replica].limit for replica in replicas]))

    def expected(self, client: str, replicas: list[Replica]) -> float:
        """Seconds until an answer for one more request of a client."""
        own = self.pending.queued_by(client)
        clients = self.pending.clients + (not own)
        ahead = min(len(self.pending) + 1, (own + 1) * clients)
        return ahead * self._picture_s / self.slots(replicas) + self.call_s

    def join(self, item: PendingItem) -> None:
        """One more waits."""
        self.pending.add(item)
        self._demand_estimate = max(self._demand_estimate, len(self.pending) + self._in_calls)

    def share(self, replicas: list[Replica]) -> int:
        """Pictures per call if the expected demand is spread evenly over all calls that the replicas may have."""
        return math.ceil(self._demand_estimate / self.slots(replicas))

    def expected_soon(self) -> int:
        """Pictures that are queued, or expected in a moment."""
        return math.ceil(self._demand_estimate) - self._in_calls

    def is_too_late(self, item: PendingItem) -> bool:
        """Whether a call sent now is expected to end after the item's deadline; False while nothing is in flight."""
        return bool(self.calls) and time.monotonic() + self.call_s > item.deadline

    def is_hopeless(self, left: float) -> bool:
        """Whether no answer came within so many seconds lately. Once a second a request is let through to find out."""
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
        if call.is_abandoned and seconds < self.call_s:
            return
        weight = _RECENT if self.call_s else 1.0
        self.call_s += weight * (seconds - self.call_s)
        if not call.is_abandoned:
            self._answered_s += weight * (seconds - self._answered_s)
            self._quickest_s = min(seconds, self._quickest_s * _SLOWER or seconds)
        self._picture_s += weight * (seconds / len(call.group) - self._picture_s)
        limiter = self.limiters[call.replica]
        if call.had_to_wait:
            limiter.observe(now, seconds, len(call.group))
        else:
            limiter.pause()

    def seconds_until_free(self, call: Call) -> float:
        """Seconds for which an abandoned call keeps its place: until it would usually have been answered.

        Triton drops it only between two steps. What waits for its first step is worked on for nobody, and clients
        that leave would fill that queue without end.
        """
        return max(0.0, call.sent + self._answered_s - time.monotonic())
