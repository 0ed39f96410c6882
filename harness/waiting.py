"""Waiting until something holds."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(
    condition: Callable[[], object],
    seconds: float = 30.0,
    *,
    pause: float = 0.05,
    meanwhile: type[Exception] | tuple[type[Exception], ...] = (),
) -> None:
    """Ask for `condition` every `pause` seconds until it holds; `meanwhile` is what it may raise until then.

    Raises:
        TimeoutError: it does not hold in time; the message has what it raised last.
    """
    deadline = time.monotonic() + seconds
    while True:
        why = ""
        try:
            if condition():
                return
        except meanwhile as error:
            why = f": {error}"
        if time.monotonic() > deadline:
            raise TimeoutError(f"a part of the stack did not follow within {seconds:g} s{why}")
        time.sleep(pause)
