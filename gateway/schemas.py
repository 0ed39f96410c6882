"""The public JSON contract, version 1: what comes in and what goes out. Fields are added, never changed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr

MetadataValue = Annotated[StrictStr, Field(max_length=1024)] | StrictBool | StrictInt | FiniteFloat | None
Metadata = dict[Annotated[str, Field(min_length=1, max_length=64)], MetadataValue]


class PredictRequest(BaseModel):
    """The JSON form of a request."""

    model_config = ConfigDict(extra="forbid")

    image: StrictStr = Field(
        description="The picture file (JPEG, PNG, WebP, BMP, GIF or TIFF), in standard base64.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    metadata: Metadata = Field(
        default={}, description="A flat object that comes back in the answer unchanged.", examples=[{"parcel": "A-17"}]
    )


class Score(BaseModel):
    """A label and its calibrated probability."""

    label: str
    confidence: float = Field(ge=0, le=1)


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    read: float = Field(description="Receiving and parsing the request.")
    queue: float = Field(description="Between the gateway and the first step: transport and waiting.")
    preprocess: float = Field(description="Decoding and resizing the picture.")
    infer: float = Field(description="The model, with waiting for its batch.")
    postprocess: float = Field(description="Deciding and ranking.")
    total: float = Field(description="From the request's first byte to its answer.")


class PredictResponse(BaseModel):
    """The answer to one picture."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str = Field(description="The X-Request-ID of the request, or one made for it.")
    model_version: str = Field(description="The release that computed this answer.", examples=["defect-v1"])
    label: str = Field(description="The decision.", examples=["damaged"])
    confidence: float = Field(ge=0, le=1, description="The calibrated probability of `label`.", examples=[0.94])
    scores: list[Score] = Field(description="All labels, most probable first.")
    metadata: Metadata
    timing_ms: Timing


class StepVersion(BaseModel):
    """A step of a release."""

    model: str = Field(examples=["defect_classifier"])
    version: int
    digest: str = Field(description="SHA-256 of the step's content.")


class Release(BaseModel):
    """A release, as Triton holds it."""

    name: str = Field(examples=["defect-v1"])
    state: Literal["ready", "unavailable"]
    reason: str = Field(default="", description="Why it is unavailable.")
    labels: list[str] = []
    steps: dict[str, StepVersion] = {}
    built_from: str = ""
    built_at: str = ""
    evaluation: dict[str, Any] = {}


class Pipeline(BaseModel):
    """The pipeline that is served, and which of its releases answers."""

    name: str
    stable: str | None = Field(description="The release that answers requests; null while there is none.")
    releases: list[Release]


class Version(BaseModel):
    """Everything that has a version."""

    gateway: str
    contract: str
    triton: str | None = Field(description="Triton's version; null while it cannot be reached.")
    pipeline: Pipeline


class Live(BaseModel):
    """The process runs."""

    status: Literal["live"] = "live"


class Health(BaseModel):
    """The service answers predictions."""

    status: Literal["ready"] = "ready"
    model_version: str = Field(description="The release that answers.")
    triton: str | None


class ErrorKind(BaseModel):
    """What a problem's `type` leads to."""

    code: str
    status: int
    title: str
    advice: str
