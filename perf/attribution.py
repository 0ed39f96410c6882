"""Where the time of a request goes, by Triton's own statistics.

Triton counts, for each model, the requests, the time from their arrival to their answer, and the part of it in which
the model ran. What a request spends in an ensemble but in none of its steps' runs is waiting: for an instance, for a
batch, for the next step to begin. What the client saw beyond Triton is the gateway, HTTP and gRPC. A step that runs a
batch counts the whole run for each request in it: all of them waited for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import contract
from contract import Manifest
from harness import client
from perf.analyzer import PerfError
from triton_runtime.server import Endpoint

GATEWAY, QUEUE, PREPROCESS, MODEL, POSTPROCESS = PARTS = ("gateway", "queue", "preprocess", "model", "postprocess")
_PART_OF = dict(zip(contract.STEPS, (PREPROCESS, MODEL, POSTPROCESS), strict=True))


@dataclass(frozen=True)
class Served:
    """What one model did until now: requests, and their milliseconds in all and in its runs."""

    requests: int
    inside: float
    running: float

    def __sub__(self, before: Served) -> Served:
        return Served(self.requests - before.requests, self.inside - before.inside, self.running - before.running)

    @classmethod
    def by(cls, endpoint: Endpoint, model: str, version: int) -> Self:
        """Ask Triton.

        Raises:
            PerfError: it does not answer, or does not know the model.
        """
        url = endpoint.url(f"/v2/models/{model}/versions/{version}/stats")
        try:
            (statistics,) = json.loads(client.get(url))["model_stats"]
        except (OSError, ValueError) as error:
            raise PerfError(f"Triton gives no statistics of {model} ({error}): is TRITON_HTTP_PORT right?") from None
        times = {name: float(each["ns"]) / 1e6 for name, each in statistics["inference_stats"].items()}
        running = sum(times[f"compute_{part}"] for part in ("input", "infer", "output"))
        return cls(int(statistics["inference_stats"]["success"]["count"]), times["success"], running)


def snapshot(endpoint: Endpoint, release: Manifest, target: str) -> Mapping[str, Served]:
    """What was done until now, by the model that was asked ("") and by each step that it has, by part.

    Raises:
        PerfError: as `Served.by`.
    """
    steps = [target] if target in contract.STEPS else list(contract.STEPS)
    models = {step: (contract.step_model(release.pipeline, step), release.steps[step].version) for step in steps}
    found = {_PART_OF[step]: Served.by(endpoint, *model) for step, model in models.items()}
    asked = found[_PART_OF[target]] if target in contract.STEPS else Served.by(endpoint, release.name, 1)
    return {"": asked, **found}


def parts(latency: float, before: Mapping[str, Served], after: Mapping[str, Served]) -> dict[str, float]:
    """Milliseconds of the mean request by part, which add up to `latency`; empty where nothing was asked.

    `gateway` is all that is outside of Triton; for a client that asks Triton itself, that is gRPC.
    """
    done = {name: after[name] - before[name] for name in after}
    if not done[""].requests:
        return {}
    inside = done[""].inside / done[""].requests
    running = {name: each.running / max(1, each.requests) for name, each in done.items() if name}
    waiting = max(0.0, inside - sum(running.values()))
    return {GATEWAY: max(0.0, latency - inside), QUEUE: waiting, **running}
