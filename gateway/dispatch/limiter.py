"""A limit on a release's concurrent calls to one Triton, found from how long they take.

Up to a point more concurrent calls mean more answers a second. Beyond it they only wait in Triton's queues, which are
not fair, and where abandoning one is not cheap. The idea is that of TCP Vegas: of `limit` calls that take
`slowdown` times as long as beside few others, `limit * (1 - 1 / slowdown)` are waiting. About one keeps the processors
busy; more would only make the calls smaller, and each has its price. TCP compares with the least time ever seen; where
every call takes another time, as here, that would mistake each one for a queue, so a median is compared with what is
usual.

What is usual depends on how many pictures a call has, and the more calls there are, the fewer pictures each gets. So it
is learnt with calls of two sizes, which tell what a call takes and what a picture adds. First all have the one size,
then all have the other: calls that are worked on in the order of their arrival wait for those beside them.

Where the fewest calls answer nearly as many pictures a second as more do, it stays with them: more would make some
pictures wait for others, which shows in the slowest answers. Pictures a second are counted from answer to answer,
including the gap before the next call, which more calls at once can fill.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

_FEWEST, _MOST = 2, 256
_WAITING = (0.3, 1.0)
_MARGIN = 0.08
"""Of the limit: no median of a few calls is more exact."""
_WORTH = 0.05
"""More calls than the fewest have to answer so many more pictures a second."""
_RECENT = 0.3
"""Weight of the newest median in its moving average."""
_HOPE = 1 / (1 + 2 * _WORTH)
"""Where that average starts: low, so that one median that is off decides nothing."""
_SAMPLES = 24
"""Calls that a median is taken of."""
_RENEW_AFTER = (100, 1600)
"""Relearn, with few concurrent calls, after 100 x limit calls: the machine may have changed. Four times as long, up to
1600, each time the result is confirmed. At the lowest limit it is always 100, because relearning costs nothing there,
unless more calls were tried and not worth it."""
_STALE_AFTER = 10 * _SAMPLES
"""After so many calls what was learnt does not prove any more that more calls than the fewest are not worth it: the
machine may have become slower meanwhile, so it learns again before it says so."""
_SAME = 0.1
"""So little apart are two findings that are the same."""
_LARGER = 1.5
"""It learns again, too, where the fewest calls would be so many times as large as any that it learnt from."""


class Limiter:
    """The limit of one replica. Moves only on calls that were made while requests waited: others say nothing."""

    def __init__(self) -> None:
        self._limit = float(_FEWEST)
        self._is_starting = True
        """Never yet too many: the limit grows by half."""
        self._is_learning = True
        self._latest: deque[tuple[float, int]] = deque()
        """When the latest calls were answered, and their pictures: as many as there are at once."""
        self._learnt: list[tuple[int, float, float]] = []
        """Of calls beside few others: pictures, seconds, and their cycle."""
        self._cycle = 1.0
        """Time between completions of one slot, as a multiple of the duration of a call."""
        self._of_call, self._of_picture = 0.0, 0.0
        """Seconds per call, and per picture in it, while few other calls run."""
        self._most = 1
        """Pictures that a call may have."""
        self._renew_after = _RENEW_AFTER[0]
        self._each = _HOPE
        """Time per picture with more calls than the fewest, divided by that with the fewest (moving average)."""
        self._has_enough = False
        """More calls than the fewest were tried, and not worth it."""
        self._window: list[tuple[float, float]] = []
        """Of the latest calls: duration, and time per picture, each divided by that with the fewest calls."""
        self._calls = 0
        """Answers since it began to learn; negative while those of earlier calls still come in."""

    @property
    def limit(self) -> int:
        """Calls at once."""
        return _FEWEST if self._is_learning else int(self._limit)

    def size(self, share: int, most: int) -> int:
        """How many pictures the next call should have: its share of all that are there, `most` at most; or half."""
        self._most = most
        size = min(share, most)
        return math.ceil(size / 2) if self._is_learning and self._calls >= _SAMPLES / 2 else size

    def observe(self, now: float, seconds: float, pictures: int) -> None:
        """A call with so many pictures, made at the limit, was answered, after so many seconds."""
        self._calls += 1
        if self._calls <= 0:
            return
        self._latest.append((now, pictures))
        before = None
        while len(self._latest) > self.limit:
            before, _ = self._latest.popleft()
        if before is None:
            return
        cycle, there = now - before, sum(pictures for _, pictures in self._latest)
        if self._is_learning:
            self._learnt.append((pictures, seconds, cycle / seconds))
            if len(self._learnt) >= _SAMPLES:
                self._conclude()
            return
        of_fewest = min(self._most, there / _FEWEST)
        if of_fewest > _LARGER * max(size for size, *_ in self._learnt):
            self._learn_again()
            return
        of_picture = self._usual(of_fewest) * self._cycle / (_FEWEST * of_fewest)
        self._window.append((seconds / self._usual(pictures), cycle / there / of_picture))
        if len(self._window) >= max(_SAMPLES, self.limit):
            self._decide()

    def pause(self) -> None:
        """A call was answered that was not made at the limit."""
        self._latest.clear()

    def full(self) -> None:
        """Triton refused a call because its queue is full."""
        self._limit, self._is_starting = max(_FEWEST, self._limit / 2), False

    def _usual(self, pictures: float) -> float:
        """Seconds that a call of so many takes beside few others, as far as is known."""
        return self._of_call + self._of_picture * pictures

    def _conclude(self) -> None:
        """Draw the line through what was learnt, with the same weight for each call but none for outliers."""
        self._is_learning = self._has_enough = False
        sizes, _, cycles = zip(*self._learnt, strict=True)
        usual = {
            size: statistics.median(seconds for pictures, seconds, _ in self._learnt if pictures == size)
            for size in sizes
        }
        middle, mean = statistics.fmean(sizes), statistics.fmean(usual[size] for size in sizes)
        of_picture = 0.0
        if len(usual) > 1:
            of_picture = max(0.0, statistics.linear_regression(sizes, [usual[size] for size in sizes]).slope)
        of_picture = min(of_picture, mean / middle)  # a call takes no less than nothing
        of_call = mean - of_picture * middle
        if abs(self._usual(middle) - mean) <= _SAME * mean:
            of_call, of_picture = (of_call + self._of_call) / 2, (of_picture + self._of_picture) / 2
            self._renew_after = min(4 * self._renew_after, _RENEW_AFTER[1])
        else:
            self._renew_after = _RENEW_AFTER[0]
        self._of_call, self._of_picture = of_call, of_picture
        self._cycle = statistics.median(cycles)

    def _decide(self) -> None:
        slowdown, each = (statistics.median(values) for values in zip(*self._window, strict=True))
        self._window.clear()
        if self.limit == _FEWEST:  # this is what is usual
            drift, drift_of_each = 1 + _RECENT * (slowdown - 1), 1 + _RECENT * (each - 1)
            self._of_call, self._of_picture = drift * self._of_call, drift * self._of_picture
            self._cycle *= drift_of_each / drift
        else:
            self._each += _RECENT * (each - self._each)
            if self._each > 1 / (1 + _WORTH):
                if self._calls > _STALE_AFTER:
                    self._learn_again()
                    return
                self._has_enough, self._limit = True, float(_FEWEST)
        if not self._has_enough:
            self._move(max(1.0, slowdown))
        costs_nothing = self.limit == _FEWEST and not self._has_enough
        renew_after = _RENEW_AFTER[0] if costs_nothing else self._renew_after
        if self._calls > renew_after * self._limit:
            self._learn_again()

    def _move(self, slowdown: float) -> None:
        waiting = self._limit * (1 - 1 / slowdown)
        too_few, too_many = (number + _MARGIN * self._limit for number in _WAITING)
        self._is_starting = self._is_starting and waiting < too_few
        if self._is_starting:
            self._limit = max(self._limit + 1, 1.5 * self._limit)
        elif waiting < too_few:
            self._limit += 1
        elif waiting > too_many:
            self._limit -= max(1.0, (waiting - too_many) / 2)
        self._limit = min(_MOST, max(_FEWEST, self._limit))

    def _learn_again(self) -> None:
        self._is_learning = True
        self._each = _HOPE
        self._learnt.clear()
        self._window.clear()
        self._calls = -int(self._limit)
