"""The facts that the export and the gateway must agree on: names, tensors, and what a release says of itself.

`gateway` and `export` both import this module and nothing of each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = ("preprocess", "classifier", "postprocess")
"""The three steps of every pipeline, in the order in which they run."""

IMAGE = "IMAGE"
"""The ensemble's only input: BYTES [n, 1], a picture file each."""

LABEL, CONFIDENCE, LABELS, SCORES = "LABEL", "CONFIDENCE", "LABELS", "SCORES"
DIGEST, ERROR, TIMES = "DIGEST", "ERROR", "TIMES"
OUTPUTS = (LABEL, CONFIDENCE, LABELS, SCORES, DIGEST, ERROR, TIMES)
"""The ensemble's outputs; `defect_postprocess` documents their shapes."""

PIPELINE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_RELEASE_NAME = re.compile(rf"(?P<pipeline>{PIPELINE_NAME.pattern})-v(?P<number>[1-9][0-9]{{0,8}})")


def step_model(pipeline: str, step: str) -> str:
    """The Triton model that is one step of a pipeline: `defect_classifier`."""
    return f"{pipeline}_{step}"


def release_name(pipeline: str, number: int) -> str:
    """The ensemble that is one release of a pipeline: `defect-v3`."""
    return f"{pipeline}-v{number}"


def parse_release_name(name: str) -> tuple[str, int] | None:
    """(pipeline, number) of a release's name; None where it is not one."""
    match = _RELEASE_NAME.fullmatch(name)
    return (match["pipeline"], int(match["number"])) if match else None


@dataclass(frozen=True)
class StepPin:
    """A step as a release pins it: its version number, and the SHA-256 of its content in hexadecimal."""

    version: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a release says of itself, kept in the `parameters` of its ensemble's configuration.

    `evaluation` holds the figures of the model card (free-form JSON); `built_from` names the source of the
    classifier; `built_at` is an ISO 8601 time in UTC.
    """

    pipeline: str
    number: int
    labels: tuple[str, ...]
    steps: Mapping[str, StepPin]
    built_from: str
    built_at: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The release's name, which is the ensemble's."""
        return release_name(self.pipeline, self.number)

    def to_parameters(self) -> dict[str, str]:
        """The manifest as Triton model parameters."""
        parameters = {
            "labels": json.dumps(self.labels),
            "built_from": self.built_from,
            "built_at": self.built_at,
            "evaluation": json.dumps(self.evaluation, sort_keys=True),
        }
        for step in STEPS:
            parameters[f"{step}_version"] = str(self.steps[step].version)
            parameters[f"{step}_digest"] = self.steps[step].digest
        return parameters

    @classmethod
    def from_parameters(cls, name: str, parameters: Mapping[str, str]) -> Manifest:
        """Read back what `to_parameters` wrote for the ensemble `name`.

        Raises:
            ValueError: the name is not a release's, or a parameter is missing or malformed.
        """
        parsed = parse_release_name(name)
        if parsed is None:
            raise ValueError(f"{name!r} is not the name of a release, such as defect-v1")
        try:
            labels = json.loads(parameters["labels"])
            if not labels or not all(isinstance(label, str) for label in labels):
                raise ValueError("labels must be a list of strings")
            return cls(
                pipeline=parsed[0],
                number=parsed[1],
                labels=tuple(labels),
                steps={
                    step: StepPin(int(parameters[f"{step}_version"]), parameters[f"{step}_digest"]) for step in STEPS
                },
                built_from=parameters["built_from"],
                built_at=parameters["built_at"],
                evaluation=json.loads(parameters["evaluation"]),
            )
        except KeyError as missing:
            raise ValueError(f"{name}: the parameter {missing} is missing: was it published by the export?") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: malformed manifest: {error}") from None
