"""How long to wait before what failed is tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Backoff:
    """The first time at once, then after `first` seconds, and twice as long each time, up to `most`.

    Forgotten where nothing failed for `calm` seconds after the last try.
    """

    first: float
    most: float
    calm: float
    _next: float = 0.0
    _tried: float = -math.inf

    def wait(self, now: float) -> float:
        """Seconds to wait, told that it failed now."""
        if now - self._tried >= self.calm:
            self._next = 0.0
        wait, self._next = self._next, min(max(self.first, 2 * self._next), self.most)
        self._tried = now + wait
        return wait
