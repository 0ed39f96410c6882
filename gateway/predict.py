"""One picture to one verified answer: choose the release, call it, and check that it is what it says it is.

Knows nothing of HTTP; what goes wrong is a `Failure` with a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc

from contract import Manifest
from gateway.errors import PROBLEMS, Failure
from gateway.releases import Releases
from gateway.triton import Inference, MalformedAnswer, TritonClient, TritonError

_FAILURES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    grpc.StatusCode.UNAVAILABLE: "triton_unavailable",
    grpc.StatusCode.NOT_FOUND: "no_release",
}


@dataclass(frozen=True)
class Answer:
    """An inference, and the release that made it."""

    release: Manifest
    inference: Inference


async def predict(triton: TritonClient, releases: Releases, picture: bytes, request_id: str, timeout: float) -> Answer:
    """Answer one picture within `timeout` seconds.

    Raises:
        Failure: nothing could answer, the picture cannot be used, or the answer cannot be trusted.
    """
    release = releases.stable()
    try:
        inference = await triton.infer(release.name, picture, request_id, timeout)
    except TritonError as error:
        code = _FAILURES.get(error.status, "inference_failed")
        detail = f"no answer within {timeout:g} s" if code == "deadline_exceeded" else str(error)
        raise Failure(code, detail) from error
    except MalformedAnswer as error:
        raise Failure("invalid_answer", str(error)) from error
    verify(inference, release)
    return Answer(release, inference)


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
