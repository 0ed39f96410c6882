"""Requests that were answered, run once more on another release, to compare the two.

An answer never waits for this and never depends on it: it begins after the answer was sent, few run at a time, none
waits in a queue, and under load there are none. What is not compared is counted.
"""

from __future__ import annotations

import logging
import random
import time
from functools import partial

from contract import Manifest
from gateway.comparison import Comparison, Comparisons
from gateway.dispatch.dispatcher import Dispatcher
from gateway.metrics import Metrics
from gateway.predict import Answer, RequestInfo, predict
from gateway.problems import Failure
from gateway.routing.router import Choice, Router
from gateway.settings import Settings
from gateway.supervision import Tasks

logger = logging.getLogger("gateway.mirrors")


class Mirrors:
    """Copies of the traffic: the stable release's to the shadow, the canary's to the stable release."""

    def __init__(
        self, dispatcher: Dispatcher, router: Router, comparisons: Comparisons, metrics: Metrics, settings: Settings
    ) -> None:
        self._dispatcher = dispatcher
        self._router = router
        self._comparisons = comparisons
        self._metrics = metrics
        self._settings = settings
        self._copies = Tasks()

    async def offer(self, answer: Answer, picture: bytes, request_id: str, in_flight: int) -> None:
        """Compare one answered request, if it is chosen and there is room; returns at once."""
        in_force = self._router.in_force()
        stable, rule = in_force.stable, self._router.file.routing.shadow
        if stable is None:
            return
        if answer.route == "canary" and answer.release.name != stable.name:
            other, on_trial = stable, answer.release.name
        elif answer.route == "stable" and answer.release.name == stable.name and in_force.shadow and rule:
            if random.random() * 100 >= rule.percent:  # noqa: S311 - a share of traffic, no secret
                return
            other, on_trial = in_force.shadow, in_force.shadow.name
        else:
            return
        comparison = self._comparisons.between(on_trial, stable.name)
        if len(self._copies) >= self._settings.mirrors or in_flight > self._settings.mirror_max_load:
            comparison.shed += 1
            self._metrics.compared(on_trial, "shed")
            return
        self._copies.once("compare", partial(self._run, comparison, answer, other, picture, request_id))

    async def close(self) -> None:
        """Cancel what is running."""
        await self._copies.close()

    async def _run(
        self, comparison: Comparison, answer: Answer, other: Manifest, picture: bytes, request_id: str
    ) -> None:
        caller = RequestInfo(request_id, "mirror", time.monotonic() + self._settings.deadline_s)
        try:
            copy = await predict(self._dispatcher, [Choice(other, "pinned")], picture, caller)
        except Failure as failure:
            comparison.errors[failure.code] += 1
            self._metrics.compared(comparison.release, "failed")
            return
        except Exception:
            logger.exception("unexpected failure", extra={"fields": {"request_id": request_id}})
            return
        stable, this = (answer, copy) if other.name == comparison.release else (copy, answer)
        agrees = comparison.add(request_id, stable.inference, this.inference)
        self._metrics.compared(comparison.release, "agreed" if agrees else "disagreed")
