"""The facts that the export and the gateway must agree on; both import this package, and nothing of each other."""

from contract.manifest import Golden, Manifest, StepPin
from contract.names import (
    CONFIDENCE,
    DIGEST,
    ERROR,
    IMAGE,
    LABEL,
    LABELS,
    OUTPUTS,
    PIPELINE_NAME,
    RELEASE_NAME,
    SCORES,
    STEPS,
    TIMES,
    parse_release_name,
    release_name,
    step_model,
)

__all__ = [
    "CONFIDENCE",
    "DIGEST",
    "ERROR",
    "IMAGE",
    "LABEL",
    "LABELS",
    "OUTPUTS",
    "PIPELINE_NAME",
    "RELEASE_NAME",
    "SCORES",
    "STEPS",
    "TIMES",
    "Golden",
    "Manifest",
    "StepPin",
    "parse_release_name",
    "release_name",
    "step_model",
]
