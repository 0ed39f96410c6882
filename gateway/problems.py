"""One table of everything that can go wrong, and how a client sees it (RFC 9457, application/problem+json).

The core raises `Failure` with a code; what it means to a client is looked up here. The OpenAPI document, the pages
under /errors, docs/clients.md and the tests are derived from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

MEDIA_TYPE = "application/problem+json"

Fault = Literal["client", "service", "operator"]
"""Who has to change something: who asks, nobody (it passes, or is a bug), or who runs the service."""

Step = Literal[
    "connection", "access", "path", "read", "admission", "route", "fetch", "preprocess", "infer", "verify",
    "answer", "gateway",
]  # fmt: skip
"""How far a request came: reading its head, who asks, which path, its body, its turn, which release, where its
picture is, the release's steps, checking the answer, sending it; `gateway` is a bug in any of them."""


class Failure(Exception):
    """A request that cannot be answered. `code` is a key of `PROBLEMS`; `detail` says what was wrong this time.

    `retry_after` is the number of seconds after which to try again, where it is known better than the table has it.
    `cause` is for the log alone: addresses of this network, what a server said.
    """

    def __init__(self, code: str, detail: str, retry_after: float | None = None, cause: str = "") -> None:
        super().__init__(": ".join(filter(None, [code, detail, cause])))
        self.code = code
        self.detail = detail
        self.retry_after = retry_after
        self.cause = cause


@dataclass(frozen=True)
class ProblemType:
    """A row of the table. `advice` tells the client what to do next.

    `retryable` says whether the same request may succeed when it is sent again; `retry_after`, after how many seconds.
    """

    status: int
    title: str
    advice: str
    fault: Fault
    step: Step
    retryable: bool = False
    retry_after: int | None = None


PROBLEMS: dict[str, ProblemType] = {
    # HTTP itself.
    "malformed_request": ProblemType(
        400, "This is no HTTP request", "Check the client or the proxy in between.", "client", "connection"
    ),
    "headers_timeout": ProblemType(
        408, "The head of the request did not arrive in time", "Send it again, faster.", "client", "connection", True
    ),
    "uri_too_long": ProblemType(
        414, "The address is too long", "Send the data in the body; the limit is in the detail.", "client", "connection"
    ),
    "headers_too_large": ProblemType(
        431, "The headers are too large", "Send fewer and shorter ones; the limit is in the detail.",
        "client", "connection",
    ),
    "too_many_connections": ProblemType(
        503, "Too many connections are open", "Try again in a moment, and keep connections open for several requests.",
        "service", "connection", True, 1,
    ),
    "shutting_down": ProblemType(
        503, "The gateway is being stopped", "Try again in a moment.", "service", "connection", True, 1
    ),
    # Who asks.
    "missing_api_key": ProblemType(
        401, "An API key is needed", "Send yours as X-API-Key, or as Authorization: Bearer.", "client", "access"
    ),
    "invalid_api_key": ProblemType(
        401, "The API key is not accepted", "Check it, or ask for another; the reason is in the detail.",
        "client", "access",
    ),
    # Nothing is there.
    "not_found": ProblemType(404, "There is nothing under this path", "See /docs for the paths.", "client", "path"),
    "method_not_allowed": ProblemType(
        405, "The path does not take this method", "See /docs for the methods.", "client", "path"
    ),
    # The body could not be read.
    "missing_body": ProblemType(
        400, "The request has no body", "Send a picture, in one of the three documented forms.", "client", "read"
    ),
    "invalid_json": ProblemType(
        400, "The body is not JSON", "Send one JSON object, encoded as UTF-8.", "client", "read"
    ),
    "invalid_base64": ProblemType(
        400, "The picture is not base64", "Use standard base64 with padding, without line breaks or a data: prefix.",
        "client", "read",
    ),
    "invalid_multipart": ProblemType(
        400, "The body is not a valid form", "Send a file part 'image' and, if wanted, a part 'metadata' with JSON.",
        "client", "read",
    ),
    "invalid_encoding": ProblemType(
        400, "The body is not compressed as its Content-Encoding says",
        "Send one whole gzip stream, or the body as it is and no Content-Encoding.", "client", "read",
    ),
    "invalid_request": ProblemType(
        422, "The request does not follow the contract", "Compare it with the schema under /docs.", "client", "read"
    ),
    "invalid_metadata": ProblemType(
        422, "The metadata cannot be used",
        "Send a flat JSON object of strings, numbers, booleans and nulls, not too large.", "client", "read",
    ),
    "unsupported_media_type": ProblemType(
        415, "The content type is not accepted",
        "Use application/json, multipart/form-data, or image/*, plain or with Content-Encoding: gzip.",
        "client", "read",
    ),
    "body_too_large": ProblemType(
        413, "The body is too large", "Send a smaller picture; the limit is in the detail.", "client", "read"
    ),
    "body_timeout": ProblemType(
        408, "The body did not arrive in time",
        "Send a smaller picture, or over a faster line; nothing was kept. The detail says how fast it has to be.",
        "client", "read", True, 1,
    ),
    # The picture could not be used. The codes are those of the preprocessing step.
    "image_empty": ProblemType(
        422, "The picture is empty", "Send the bytes of a picture file.", "client", "preprocess"
    ),
    "image_unsupported": ProblemType(
        422, "Not a picture in a supported format",
        "Send it as an ordinary JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF file.", "client", "preprocess",
    ),
    "image_truncated": ProblemType(
        422, "The picture ends early", "Check the upload and send the whole file.", "client", "preprocess"
    ),
    "image_corrupt": ProblemType(
        422, "The picture is damaged", "Check that it opens elsewhere, or take it again.", "client", "preprocess"
    ),
    "image_too_large": ProblemType(
        422, "The picture has too many pixels", "Scale it down; the limit is in the detail.", "client", "preprocess"
    ),
    # No release may answer.
    "unknown_release": ProblemType(
        404, "There is no such release", "Pin one of those in the detail, or none.", "client", "route"
    ),
    "retired_release": ProblemType(
        410, "The release was retired", "Pin one of those in the detail, or none.", "client", "route"
    ),
    "release_unavailable": ProblemType(
        503, "The release is there, but may not answer now", "Pin another or none; /version says why.",
        "operator", "route", True, 5,
    ),
    "no_release": ProblemType(
        503, "No release of the model is ready", "Try again in a moment.", "operator", "route", True, 5
    ),
    # The picture could not be fetched from its location.
    "url_invalid": ProblemType(
        422, "The location cannot be used",
        "Send an absolute https URL: a plain host, no user, no fragment, everything unusual percent-encoded.",
        "client", "fetch",
    ),
    "url_not_allowed": ProblemType(
        403, "Pictures are not fetched from there", "Use a place that the service allows, or send the picture itself.",
        "client", "fetch",
    ),
    "fetch_unsupported": ProblemType(
        422, "What is there is not sent as a picture",
        "Serve it as image/*, not compressed, or send the picture itself.", "client", "fetch",
    ),
    "fetch_too_large": ProblemType(
        422, "What is there is too large", "Use a smaller picture; the limit is in the detail.", "client", "fetch"
    ),
    "fetch_refused": ProblemType(
        422, "The host does not give the picture",
        "Check the location: whether it is still there, and whether its signature has expired.", "client", "fetch",
    ),
    "fetch_failed": ProblemType(
        502, "The picture could not be fetched",
        "Check that the location answers; try again, or send the picture itself.", "client", "fetch", True, 1,
    ),
    "fetch_timeout": ProblemType(
        504, "The picture did not come in time", "Try again, or send the picture itself.", "client", "fetch", True, 1
    ),
    "fetch_store_failed": ProblemType(
        502, "The object store did not give the object to this service",
        "Try again later, or send the picture itself; the reason is in the detail.", "operator", "fetch", True, 5,
    ),
    "fetch_not_installed": ProblemType(
        501, "This service cannot read object stores", "Ask for its extra 'objects', or use an https location.",
        "operator", "fetch",
    ),
    # There is no time for it.
    "overloaded": ProblemType(
        503, "More is asked than can be answered in time", "Try again after Retry-After, or later.",
        "service", "admission", True, 1,
    ),
    "rate_limited": ProblemType(
        429, "More pictures than this key may send", "Slow down; try again after Retry-After.",
        "client", "admission", True, 1,
    ),
    "client_gone": ProblemType(
        499, "The client left before its answer", "Nobody reads this: it is for the log.", "client", "answer", True
    ),
    # The release could not answer.
    "triton_unavailable": ProblemType(
        503, "The inference server cannot be reached", "Try again in a moment.", "service", "infer", True, 1
    ),
    "image_crashes_server": ProblemType(
        422, "The picture ends the process that works on it",
        "Do not send it again; report it with the request id, and take the picture anew.", "client", "infer",
    ),
    "deadline_exceeded": ProblemType(
        504, "No answer within the time for a request", "Try again; the service is busy or stuck.",
        "service", "infer", True, 1,
    ),
    "inference_failed": ProblemType(
        502, "The inference server failed on this request", "Try again; report it if it persists.",
        "service", "infer", True,
    ),
    "invalid_answer": ProblemType(
        502, "The model returned something that is no answer", "Report it with the request id; the release is faulty.",
        "operator", "verify",
    ),
    "provenance_mismatch": ProblemType(
        502, "The answer came from another model than the release names", "Report it with the request id.",
        "operator", "verify",
    ),
    "internal_error": ProblemType(500, "The gateway failed", "Report it with the request id.", "service", "gateway"),
}  # fmt: skip


def codes_of(*steps: Step) -> list[str]:
    """The codes of these steps."""
    return [code for code, kind in PROBLEMS.items() if kind.step in steps]


class Problem(BaseModel):
    """What every error looks like. `code` is stable; `title` and `detail` are for people."""

    type: str = Field(examples=["/errors/image_truncated"])
    title: str = Field(examples=["The picture ends early"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["the file ends before the picture does"])
    code: str = Field(examples=["image_truncated"])
    advice: str = Field(examples=["Check the upload and send the whole file."])
    retryable: bool = Field(examples=[False], description="Whether the same request may succeed when it is sent again.")
    fault: Fault = Field(examples=["client"], description="Who has to change something.")
    step: Step = Field(examples=["preprocess"], description="How far the request came.")
    request_id: str = Field(examples=["6f1c2a9e8f0b4b6d9f4e8f1d2c3b4a59"])

    @classmethod
    def of(cls, failure: Failure, request_id: str, root: str = "") -> Problem:
        """The problem that a failure is, where the service is reached under the path `root`."""
        kind = PROBLEMS[failure.code]
        return cls(
            type=f"{root}/errors/{failure.code}",
            title=kind.title,
            status=kind.status,
            detail=failure.detail,
            code=failure.code,
            advice=kind.advice,
            retryable=kind.retryable,
            fault=kind.fault,
            step=kind.step,
            request_id=request_id,
        )


def openapi_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail with `codes`, one entry a status, an example a code."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEMS[code]
        entry = responses.setdefault(
            kind.status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        for name, is_sent in (("Retry-After", kind.retry_after), ("WWW-Authenticate", kind.status == 401)):
            if is_sent:
                entry.setdefault("headers", {})[name] = {"schema": {"type": "string"}}
        example = Problem.of(Failure(code, kind.title), "6f1c2a9e8f0b4b6d9f4e8f1d2c3b4a59")
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": kind.title, "value": example.model_dump()}
        entry["description"] = ", ".join(entry["content"][MEDIA_TYPE]["examples"])
    return responses
