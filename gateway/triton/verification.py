"""What an inference must be to become an answer."""

from __future__ import annotations

from contract import Manifest
from gateway.problems import PROBLEMS, Failure
from gateway.triton.client import Inference


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
    if not all(-1e-6 <= value <= 1 + 1e-6 for value in values):  # as NaN is not
        raise Failure("invalid_answer", "the scores are not probabilities")
    if {name for name, _ in inference.scores} != set(release.labels) or inference.label not in release.labels:
        raise Failure("invalid_answer", "the labels are not those of the release")
