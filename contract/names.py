"""Names that Triton, the export and the gateway know things by."""

from __future__ import annotations

import re

STEPS = ("preprocess", "classifier", "postprocess")
"""The three steps of every pipeline, in the order in which they run."""

IMAGE = "IMAGE"
"""The ensemble's only input: BYTES [n, 1], a picture file each."""

LABEL, CONFIDENCE, LABELS, SCORES = "LABEL", "CONFIDENCE", "LABELS", "SCORES"
DIGEST, ERROR, TIMES = "DIGEST", "ERROR", "TIMES"
OUTPUTS = (LABEL, CONFIDENCE, LABELS, SCORES, DIGEST, ERROR, TIMES)
"""The ensemble's outputs; `defect_postprocess` documents their shapes."""

PIPELINE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RELEASE_NAME = re.compile(rf"(?P<pipeline>{PIPELINE_NAME.pattern})-v(?P<number>[1-9][0-9]{{0,8}})")


def step_model(pipeline: str, step: str) -> str:
    """The Triton model that is one step of a pipeline: `defect_classifier`."""
    return f"{pipeline}_{step}"


def release_name(pipeline: str, number: int) -> str:
    """The ensemble that is one release of a pipeline: `defect-v3`."""
    return f"{pipeline}-v{number}"


def parse_release_name(name: str) -> tuple[str, int] | None:
    """(pipeline, number) of a release's name; None where it is not one."""
    match = RELEASE_NAME.fullmatch(name)
    return (match["pipeline"], int(match["number"])) if match else None
