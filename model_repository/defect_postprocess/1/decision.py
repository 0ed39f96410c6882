"""Calibrated probabilities -> the label to act on, and the ranking behind it.

`settings.json` beside this file holds the labels, in the order of the classifier's outputs, and a decision
threshold for each, chosen on validation data. Runs on Python 3.10 (NVIDIA's 24.10 image) and later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Decision:
    """For n pictures and c labels: `label` and `confidence` (n,), `ranked` labels and their `scores` (n, c).

    The label is the one whose probability is highest relative to its threshold: for two labels with
    thresholds t and 1 - t, the first one from probability t on. The confidence is its probability, so where
    thresholds are not equal the label need not be the first of the ranking.
    """

    label: np.ndarray
    confidence: np.ndarray
    ranked: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Policy:
    """The labels of a release, BYTES as Triton wants them, and their thresholds (float32), both (c,)."""

    labels: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read `{"labels": [...], "thresholds": {label: number, ...}}`.

        Raises:
            KeyError, ValueError: a label has no threshold, or one that is not between 0 and 1.
        """
        settings = json.loads(path.read_text())
        thresholds = [float(settings["thresholds"][label]) for label in settings["labels"]]
        if not thresholds or not all(0 < threshold < 1 for threshold in thresholds):
            raise ValueError(f"{path}: every threshold must be between 0 and 1")
        labels = np.array([label.encode() for label in settings["labels"]], np.object_)
        return cls(labels, np.array(thresholds, np.float32))

    def decide(self, probabilities: np.ndarray) -> Decision:
        """Decide for each row of `probabilities`, float32 (n, c). Ties go to the label that is listed first."""
        rows = np.arange(len(probabilities))
        chosen = (probabilities / self.thresholds).argmax(axis=1)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        return Decision(
            label=self.labels[chosen],
            confidence=probabilities[rows, chosen],
            ranked=self.labels[order],
            scores=np.take_along_axis(probabilities, order, axis=1),
        )
