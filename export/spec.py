"""The spec file of a user's own model: what the ONNX file does not say about itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

import contract
from contract.tables import Table

PerChannel = float | Annotated[tuple[float, float, float], Field(description="in the order of the channels")]


class Input(Table):
    """How the network wants its pictures: `(pixel * scale - mean) / std`, pixels being 0 to 255.

    Grey is one channel, as Pillow's "L" has it.
    """

    name: str | None = None
    size: int = Field(ge=16, le=2048)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR", "grey"] = "RGB"
    scale: float = Field(default=1.0, gt=0)
    mean: PerChannel = 0.0
    std: PerChannel = 1.0

    @model_validator(mode="after")
    def _std_is_positive(self) -> Self:
        if min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise ValueError("std must be above zero")
        return self

    @model_validator(mode="after")
    def _grey_is_one_channel(self) -> Self:
        if self.channels == "grey" and (isinstance(self.mean, tuple) or isinstance(self.std, tuple)):
            raise ValueError("mean and std must be one number each where channels is grey")
        return self


class Output(Table):
    """What the network returns, and the temperature that calibrates it.

    One value a picture, where there are two labels, is that of the second.
    """

    name: str | None = None
    kind: Literal["logits", "probabilities"] = "logits"
    temperature: float = Field(default=1.0, gt=0)


class Spec(Table):
    """A pipeline of the user's own. `thresholds`, by label, default to equal ones."""

    name: str = Field(pattern=rf"^{contract.PIPELINE_NAME.pattern}$")
    labels: tuple[str, ...] = Field(min_length=2, max_length=1000)
    input: Input
    output: Output = Output()
    thresholds: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default={})

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> Self:
        if len(set(self.labels)) != len(self.labels) or not all(self.labels):
            raise ValueError("labels must be different from each other and not empty")
        if self.thresholds and set(self.thresholds) != set(self.labels):
            raise ValueError("thresholds must name every label, and nothing else")
        return self
