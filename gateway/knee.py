"""How many calls a Triton gets at once, found from how long they take.

Up to the knee, more calls at once mean more answers a second; beyond it they only wait in Triton's queues, where they
cannot be grouped, put in a fair order or given up cheaply. The idea is that of TCP Vegas: of `limit` calls that take
`seconds` each where `least` would do, `limit * (1 - least / seconds)` are waiting. One waiting call keeps the
processors busy; two are one too many.
"""

from __future__ import annotations

_FEWEST, _MOST = 2, 256
_WAITING = (1.0, 2.0)
_FORGET_AFTER = 1000
"""After so many calls the least times are learnt anew, with few calls at once: the machine or the model changed."""


class Knee:
    """The limit of one replica. Moves only on calls that were made while requests waited: others say nothing."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._limit = float(_FEWEST)
        self._least: dict[int, float] = {}
        self._calls = 0

    @property
    def limit(self) -> int:
        """Calls at once."""
        return int(self._limit)

    def observe(self, seconds: float, pictures: int) -> None:
        """A call with so many pictures, made at the limit, took so many seconds."""
        self._calls += 1
        if self._calls > _FORGET_AFTER:
            self._forget()
        least = self._least[pictures] = min(seconds, self._least.get(pictures, seconds))
        waiting = self.limit * (1 - least / seconds)
        if waiting < _WAITING[0]:
            self._limit = min(_MOST, self._limit + 1 / self._limit)
        elif waiting > _WAITING[1]:
            self._limit = max(_FEWEST, self._limit - 1 / self._limit)
