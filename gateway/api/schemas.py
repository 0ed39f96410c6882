"""The public JSON contract, version 1: what comes in and what goes out. Fields are added, never changed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    model_validator,
)
from pydantic_core import PydanticCustomError

from contract.routing import Canary, Shadow
from gateway.problems import Fault, Problem, Step

MAX_VALUE = 1024
"""Characters of a string in the metadata."""
MetadataValue = Annotated[StrictStr, Field(max_length=MAX_VALUE)] | StrictBool | StrictInt | FiniteFloat | None
State = Literal["ready", "unavailable"]
Role = Literal["stable", "canary", "shadow"]
_Entries = dict[Annotated[str, Field(min_length=1, max_length=64)], MetadataValue]
_ENTRIES: TypeAdapter[_Entries] = TypeAdapter(_Entries)


def _stop_at_the_first(value: object) -> object:
    """Pydantic tells all that is wrong: a second and many megabytes for a thousandth of what a body may hold."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _ENTRIES.validate_python({key: entry})
    return value


Metadata = Annotated[_Entries, BeforeValidator(_stop_at_the_first)]


_BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)$"
"""At least one byte. For the OpenAPI document; decoding it is the check."""

ONE_PICTURE = [{"required": [name], "properties": {name: {"type": "string"}}} for name in ("image", "image_url")]
"""For `oneOf`: the picture, or where it is."""


def _document_one_picture(schema: dict[str, Any]) -> None:
    schema["oneOf"] = ONE_PICTURE
    for name in ("image", "image_url", "metadata"):
        field = schema["properties"][name]
        del field["default"]
        (kind,) = (option for option in field.pop("anyOf") if option != {"type": "null"})
        field |= {**kind, "type": [kind["type"], "null"]}


class PredictRequest(BaseModel):
    """The JSON form of a request: with `image` or with `image_url`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), json_schema_extra=_document_one_picture)

    image: StrictStr | None = Field(
        default=None,
        description="The picture file (JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF), in standard base64.",
        json_schema_extra={"contentEncoding": "base64", "pattern": _BASE64},
    )
    image_url: StrictStr | None = Field(
        default=None,
        description="Where the picture is: an https URL, or s3:// or gs://, of a host that the service allows.",
        examples=["https://images.example.com/parcel.jpg"],
    )
    metadata: Metadata | None = Field(
        default=None,
        description="A flat object that comes back in the answer unchanged.",
        examples=[{"parcel": "A-17"}],
    )
    model_version: StrictStr | None = Field(
        default=None, description="The release to ask. Without it the routing decides.", examples=["defect-v1"]
    )

    @model_validator(mode="after")
    def _has_one_picture(self) -> Self:
        if (self.image is None) == (self.image_url is None):
            raise PydanticCustomError("one_picture", "exactly one of image and image_url is needed")
        return self


class BatchRequest(BaseModel):
    """Several pictures, each as a request for one picture has it."""

    model_config = ConfigDict(extra="forbid")

    items: list[Any] = Field(
        min_length=1,
        description="The pictures, as many as the service takes at once. What is none gets a problem in its place.",
    )


class Score(BaseModel):
    """A label and its calibrated probability."""

    label: str
    confidence: float = Field(ge=0, le=1)


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    read: float = Field(description="Receiving and parsing the request, and fetching a picture by its location.")
    admit: float = Field(description="Waiting in the gateway for a call of Triton.")
    queue: float = Field(description="Between the gateway and the first step: transport and waiting in Triton.")
    preprocess: float = Field(description="Decoding and resizing the picture.")
    infer: float = Field(description="The model, with waiting for its batch.")
    postprocess: float = Field(description="Deciding and ranking.")
    total: float = Field(description="From the request's first byte to its answer.")


class PredictResponse(BaseModel):
    """The answer to one picture."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str = Field(description="The X-Request-ID of the request, or one made for it.")
    model_version: str = Field(description="The release that computed this answer.", examples=["defect-v1"])
    route: Literal["stable", "canary", "pinned", "fallback"] = Field(
        description="Why this release: the stable one, the canary, the one asked for, or instead of one that failed."
    )
    label: str = Field(description="The decision.", examples=["damaged"])
    confidence: float = Field(ge=0, le=1, description="The calibrated probability of `label`.", examples=[0.94])
    scores: list[Score] = Field(description="All labels, most probable first.")
    metadata: Metadata
    timing_ms: Timing


class BatchAnswer(BaseModel):
    """The answer to one picture of several."""

    answer: PredictResponse


class BatchProblem(BaseModel):
    """Why there is no answer to one picture of several."""

    problem: Problem


class BatchResponse(BaseModel):
    """A result for each picture, in the order of the request."""

    request_id: str = Field(description="The X-Request-ID of the request; that of an item ends in its place, as -0.")
    results: list[BatchAnswer | BatchProblem]


class StepVersion(BaseModel):
    """A step of a release."""

    model: str = Field(examples=["defect_classifier"])
    version: int
    digest: str = Field(description="SHA-256 of the step's content.")


class Release(BaseModel):
    """A release, as Triton holds it."""

    name: str = Field(examples=["defect-v1"])
    state: State = Field(description="Ready: loaded, and it answered its golden pictures here as recorded.")
    reason: str = Field(default="", description="Why it is unavailable.")
    labels: list[str] = []
    steps: dict[str, StepVersion] = {}
    built_from: str = ""
    built_at: str = ""
    evaluation: dict[str, Any] = {}
    exam: dict[str, Any] = Field(default={}, description="The verdict that let it be published, by check.")


class Routing(BaseModel):
    """The routing in force: the last good content of the routing file."""

    stable: str = Field(description="`latest`, or the name of a release.", examples=["latest"])
    canary: Canary | None
    shadow: Shadow | None
    since: str = Field(description="When it came into force.")
    error: str = Field(description="What is wrong with the file as it is now; empty where nothing is.")
    warning: str = Field(description="What the file asks for and cannot have; empty where nothing is.")


class Pipeline(BaseModel):
    """The pipeline that is served, and which of its releases answers."""

    name: str
    stable: str | None = Field(description="The release that answers requests; null while there is none.")
    releases: list[Release]
    routing: Routing


class RoutedRelease(BaseModel):
    """A release, and what it is used for now."""

    name: str = Field(examples=["defect-v1"])
    state: State
    reason: str = Field(description="Why it is unavailable; empty where it is not.")
    share: float = Field(ge=0, le=100, description="Percentage of the requests without a pin that it is chosen for.")
    roles: list[Role]


class Releases(BaseModel):
    """Every release, and the routing that says what each is used for."""

    pipeline: str
    stable: str | None = Field(description="The release that answers requests; null while there is none.")
    releases: list[RoutedRelease]
    routing: Routing


class Judgement(BaseModel):
    """A label and its calibrated probability, as one release gave it."""

    label: str
    confidence: float


class Disagreement(BaseModel):
    """A request that the two releases answered differently."""

    request_id: str
    stable: Judgement
    this: Judgement
    difference: float = Field(description="The largest difference of a label's probability.")


class Report(BaseModel):
    """A release compared with the stable one, on the same requests."""

    release: str
    against: str | None = Field(description="The release that was stable meanwhile; null: nothing was compared.")
    since: str | None = Field(description="When this comparison began; it begins again with another stable release.")
    compared: int
    agreement: float | None = Field(description="The share of requests that got the same label; null without any.")
    confusion: dict[str, dict[str, int]] = Field(description="The stable release's label: this one's label: requests.")
    mean_difference: float | None = Field(description="Of the largest difference of a label's probability.")
    max_difference: float | None
    errors: dict[str, int] = Field(description="Comparisons that failed, by code.")
    shed: int = Field(description="Requests that were not compared, so that users are served first.")
    most_disagreeing: list[Disagreement] = Field(
        description="At most 20: other labels first, then the largest difference."
    )


class Access(BaseModel):
    """Whether requests need an API key, and what is wrong with the file of keys as it is now."""

    required: bool
    error: str = Field(description="Why the file's last edit is not in force; empty: it is.")


class Version(BaseModel):
    """Everything that has a version."""

    gateway: str
    contract: str
    triton: str | None = Field(description="Triton's version; null while it cannot be reached.")
    pipeline: Pipeline
    access: Access


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
    fault: Fault
    step: Step
    retryable: bool
    retry_after: int | None = Field(description="Seconds after which to try again; null: at once, if at all.")
