"""One picture to one verified answer: call the release, check that it is what it says it is, or ask the next one.

Knows nothing of HTTP; what goes wrong is a `Failure` with a code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import grpc

from contract import Manifest
from gateway.errors import PROBLEMS, Failure
from gateway.triton import Inference, MalformedAnswer, TritonClient, TritonError

Route = Literal["stable", "canary", "pinned", "fallback"]
"""Why a release answers."""

_FAILURES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    grpc.StatusCode.UNAVAILABLE: "triton_unavailable",
    grpc.StatusCode.NOT_FOUND: "no_release",  # unknown, unloaded, or Triton is stopping
}
_FAULTS_OF_A_RELEASE = frozenset(
    ("triton_unavailable", "no_release", "inference_failed", "invalid_answer", "provenance_mismatch")
)
"""What another release may do better. A bad picture is bad for every release, and a deadline is over for all."""


@dataclass(frozen=True)
class Candidate:
    """A release that may answer, and why it would be this one."""

    release: Manifest
    route: Route


@dataclass(frozen=True)
class Answer:
    """An inference, the release that made it, and why that one; `passed_over` is what the one before it failed with."""

    release: Manifest
    route: Route
    inference: Inference
    passed_over: Failure | None = None


async def predict(
    triton: TritonClient, candidates: Sequence[Candidate], picture: bytes, request_id: str, timeout: float
) -> Answer:
    """Answer one picture within `timeout` seconds, by the first candidate, or should it fail, by the second.

    Raises:
        Failure: nothing could answer, the picture cannot be used, or the answer cannot be trusted.
    """
    deadline = time.monotonic() + timeout
    try:
        return await _ask(triton, candidates[0], picture, request_id, timeout)
    except Failure as failure:
        left = deadline - time.monotonic()
        if len(candidates) == 1 or failure.code not in _FAULTS_OF_A_RELEASE or left <= 0:
            raise
        passed_over = failure
    return replace(await _ask(triton, candidates[1], picture, request_id, left), passed_over=passed_over)


async def _ask(triton: TritonClient, candidate: Candidate, picture: bytes, request_id: str, timeout: float) -> Answer:
    release = candidate.release
    try:
        inference = await triton.infer(release.name, picture, request_id, timeout)
    except TritonError as error:
        code = _FAILURES.get(error.status, "inference_failed")
        if code == "no_release" and candidate.route == "pinned":
            code = "release_unavailable"
        detail = f"no answer within {timeout:.3g} s" if code == "deadline_exceeded" else f"{release.name}: {error}"
        raise Failure(code, detail) from error
    except MalformedAnswer as error:
        raise Failure("invalid_answer", f"{release.name}: {error}") from error
    verify(inference, release)
    return Answer(release, candidate.route, inference)


def verify(inference: Inference, release: Manifest) -> None:
    """Refuse what the release did not compute, cannot have meant, or could not read.

    Raises:
        Failure: provenance_mismatch, a code of the preprocessing, or invalid_answer.
    """
    if inference.digest != release.steps["classifier"].digest:
        raise Failure(
            "provenance_mismatch",
            f"{release.name} names the classifier {release.steps['classifier'].digest[:12]}, "
            f"but {inference.digest[:12]} answered",
        )
    if inference.error:
        code, _, detail = inference.error.partition(": ")
        if code not in PROBLEMS:
            raise Failure("invalid_answer", f"the preprocessing failed with an unknown code: {code[:64]}")
        raise Failure(code, detail)
    values = [inference.confidence, *(score for _, score in inference.scores)]
    if not all(math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6 for value in values):
        raise Failure("invalid_answer", "the scores are not probabilities")
    if {name for name, _ in inference.scores} != set(release.labels) or inference.label not in release.labels:
        raise Failure("invalid_answer", "the labels are not those of the release")
