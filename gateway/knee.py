"""How many calls a Triton gets at once, found from how long they take.

Up to the knee, more calls at once mean more answers a second; beyond it they only wait in Triton's queues, where they
cannot be grouped, put in a fair order or given up cheaply. The idea is that of TCP Vegas: of `limit` calls that take
`slowdown` times as long as beside few others, `limit * (1 - 1 / slowdown)` are waiting. About one keeps the processors
busy; more would only make the calls smaller, and each has its price. TCP compares with the least time ever seen; where
every call takes another time, as here, that would mistake each one for a queue, so medians are compared with medians.
"""

from __future__ import annotations

import statistics

_FEWEST, _MOST = 2, 256
_WAITING = (0.5, 1.25)
_MARGIN = 0.05
"""Of the limit: no median of a few calls is more exact."""
_SAMPLES = 20
"""Calls that a median is taken of."""
_RENEW_AFTER = 100
"""After so many times `limit` calls the medians are learnt anew, with few calls at once: machine or model changed."""


class Knee:
    """The limit of one replica. Moves only on calls that were made while requests waited: others say nothing."""

    def __init__(self) -> None:
        self._limit = float(_FEWEST)
        self._is_starting = True
        """Never yet too many: the limit grows by half."""
        self._is_learning = True
        self._alone: dict[int, list[float]] = {}
        """Pictures in a call -> seconds that it takes beside few others."""
        self._window: list[float] = []
        """How many times longer the latest calls took."""
        self._slowdown = 1.0
        self._calls = 0
        """Since it learnt; below one are those that were sent before, beside many others."""

    @property
    def limit(self) -> int:
        """Calls at once."""
        return _FEWEST if self._is_learning else int(self._limit)

    def observe(self, seconds: float, pictures: int) -> None:
        """A call with so many pictures, made at the limit, took so many seconds."""
        self._calls += 1
        if self._calls <= 0:
            return
        alone = self._alone.setdefault(pictures, [])
        if len(alone) < _SAMPLES:
            alone.append(seconds / self._slowdown)
            self._is_learning = self._is_learning and self._calls < _SAMPLES
            return
        self._window.append(seconds / statistics.median(alone))
        if len(self._window) >= max(_SAMPLES, self.limit):
            self._decide()

    def full(self) -> None:
        """Triton refused a call because its queue is full."""
        self._limit, self._is_starting = max(_FEWEST, self._limit / 2), False

    def _decide(self) -> None:
        self._slowdown = max(1.0, statistics.median(self._window))
        self._window.clear()
        waiting = self._limit * (1 - 1 / self._slowdown)
        too_few, too_many = (number + _MARGIN * self._limit for number in _WAITING)
        self._is_starting = self._is_starting and waiting < too_few
        if self._is_starting:
            self._limit = max(self._limit + 1, 1.5 * self._limit)
        elif waiting < too_few:
            self._limit += 1
        elif waiting > too_many:
            self._limit -= max(1.0, (waiting - too_many) / 2)
        self._limit = min(_MOST, max(_FEWEST, self._limit))
        if self._calls > _RENEW_AFTER * self._limit:
            self._renew()

    def _renew(self) -> None:
        self._is_learning, self._slowdown = True, 1.0
        self._alone.clear()
        self._calls = -int(self._limit)
