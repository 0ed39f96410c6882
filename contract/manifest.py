"""What a release says of itself: the `parameters` of its ensemble's configuration."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from contract.names import STEPS, parse_release_name, release_name

_GOLDEN = "golden "
"""Prefix of the parameters that hold golden pictures."""


@dataclass(frozen=True)
class StepPin:
    """A step as a release pins it: its version number, and the SHA-256 of its content in hexadecimal."""

    version: int
    digest: str


@dataclass(frozen=True)
class Golden:
    """A picture of the exam, and what the release answered there: its label, and the probability of every label."""

    name: str
    image: bytes
    label: str
    scores: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Everything but the name, the picture in base64."""
        image = base64.b64encode(self.image).decode()
        return {"label": self.label, "scores": dict(self.scores), "image": image}

    @classmethod
    def from_json(cls, name: str, recorded: Mapping[str, Any]) -> Golden:
        """What `to_json` returned."""
        scores = {label: float(score) for label, score in recorded["scores"].items()}
        return cls(name, base64.b64decode(recorded["image"], validate=True), recorded["label"], scores)

    def difference(self, label: str, scores: Mapping[str, float], tolerance: float) -> str:
        """What is wrong with an answer to this picture; empty where it is the recorded one.

        Probabilities may differ by `tolerance`; so may the label, where two of them are that close.
        """
        if set(scores) != set(self.scores):
            return f"{self.name}: the labels are {', '.join(scores)} instead of {', '.join(self.scores)}"
        for name, recorded in self.scores.items():
            if not abs(scores[name] - recorded) <= tolerance:  # NaN differs from everything
                return f"{self.name}: {name} {scores[name]:.4f} instead of {recorded:.4f}, allowed {tolerance:g}"
        first, second = sorted(self.scores.values(), reverse=True)[:2]
        if label != self.label and first - second > 2 * tolerance:
            return f"{self.name}: called {label} instead of {self.label}"
        return ""


@dataclass(frozen=True)
class Manifest:
    """A release: an ensemble, the versions that it pins, and what is known of it.

    `evaluation` holds figures of the model card or of the exam (free-form JSON); `built_from` names the source of
    the classifier; `built_at` is an ISO 8601 time in UTC. `exam` is the verdict that let it pass, by check;
    `golden` are the pictures to try it with wherever it runs, and `tolerance` is how far a probability may then be
    from the recorded one.
    """

    pipeline: str
    number: int
    labels: tuple[str, ...]
    steps: Mapping[str, StepPin]
    built_from: str
    built_at: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    exam: Mapping[str, Any] = field(default_factory=dict)
    golden: tuple[Golden, ...] = ()
    tolerance: float = 0.0

    @cached_property
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
            "exam": json.dumps(self.exam, sort_keys=True),
            "tolerance": repr(self.tolerance),
        }
        for step in STEPS:
            parameters[f"{step}_version"] = str(self.steps[step].version)
            parameters[f"{step}_digest"] = self.steps[step].digest
        for golden in self.golden:
            parameters[_GOLDEN + golden.name] = json.dumps(golden.to_json())
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
                exam=json.loads(parameters["exam"]),
                golden=tuple(
                    Golden.from_json(key.removeprefix(_GOLDEN), json.loads(value))
                    for key, value in sorted(parameters.items())
                    if key.startswith(_GOLDEN)
                ),
                tolerance=float(parameters["tolerance"]),
            )
        except KeyError as missing:
            raise ValueError(f"{name}: the parameter {missing} is missing: was it published by the export?") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: malformed manifest: {error}") from None
