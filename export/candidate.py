"""What could be published: three steps, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import contract
from export.steps import Step


@dataclass(frozen=True)
class Candidate:
    """A pipeline that could be published: `size` is the classifier's input side in pixels.

    `numbers` are existing versions, by step; a step without one gets a new one. What the exam found (`exam`, `golden`,
    `tolerance`: see `contract.Manifest`) is there once it was passed. `base` is the release whose steps or code it
    reuses ("": there was none; None: it reuses nothing).
    """

    pipeline: str
    labels: tuple[str, ...]
    size: int
    steps: Mapping[str, Step]
    built_from: str
    evaluation: Mapping[str, Any]
    numbers: Mapping[str, int] = field(default_factory=dict)
    exam: Mapping[str, Any] = field(default_factory=dict)
    golden: tuple[contract.Golden, ...] = ()
    tolerance: float = 0.0
    base: str | None = None
