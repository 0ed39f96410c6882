"""One table of everything that can go wrong, and how a client sees it (RFC 9457, application/problem+json).

The core raises `Failure` with a code; status, title and advice belong to HTTP and are looked up here. The
OpenAPI document, the pages under /errors and the tests are derived from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

MEDIA_TYPE = "application/problem+json"


class Failure(Exception):
    """A request that cannot be answered. `code` is a key of `PROBLEMS`; `detail` says what was wrong this time.

    `retry_after` is in seconds, where it is known when to try again.
    """

    def __init__(self, code: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retry_after = retry_after


@dataclass(frozen=True)
class Kind:
    """A row of the table. `advice` tells the client what to do next."""

    status: int
    title: str
    advice: str


PROBLEMS: dict[str, Kind] = {
    # The request could not be read.
    "missing_body": Kind(400, "The request has no body", "Send a picture, in one of the three documented forms."),
    "invalid_json": Kind(400, "The body is not JSON", "Send one JSON object, encoded as UTF-8."),
    "invalid_base64": Kind(
        400, "The picture is not base64", "Use standard base64 with padding, without line breaks or a data: prefix."
    ),
    "invalid_multipart": Kind(
        400, "The body is not a valid form", "Send a file part 'image' and, if wanted, a part 'metadata' with JSON."
    ),
    "invalid_request": Kind(422, "The request does not follow the contract", "Compare it with the schema under /docs."),
    "invalid_metadata": Kind(
        422,
        "The metadata cannot be used",
        "Send a flat JSON object of strings, numbers, booleans and nulls, not too large.",
    ),
    "unsupported_media_type": Kind(
        415, "The content type is not accepted", "Use application/json, multipart/form-data, or image/*."
    ),
    "body_too_large": Kind(413, "The body is too large", "Send a smaller picture; the limit is in the detail."),
    "body_timeout": Kind(408, "The body did not arrive in time", "Send it again, faster; nothing was kept."),
    # The picture could not be used. The codes are those of the preprocessing step.
    "image_empty": Kind(422, "The picture is empty", "Send the bytes of a picture file."),
    "image_unsupported": Kind(
        422, "Not a picture in a supported format", "Send a JPEG, PNG, WebP, BMP, GIF or TIFF file."
    ),
    "image_truncated": Kind(422, "The picture ends early", "Check the upload and send the whole file."),
    "image_corrupt": Kind(422, "The picture is damaged", "Check that it opens elsewhere, or take it again."),
    "image_too_large": Kind(422, "The picture has too many pixels", "Scale it down; the limit is in the detail."),
    # Nothing is there.
    "not_found": Kind(404, "There is nothing under this path", "See /docs for the paths."),
    "unknown_release": Kind(404, "There is no such release", "Pin one of those in the detail, or none."),
    "retired_release": Kind(410, "The release was retired", "Pin one of those in the detail, or none."),
    "method_not_allowed": Kind(405, "The path does not take this method", "See /docs for the methods."),
    "rate_limited": Kind(429, "More requests than this key may send", "Slow down; try again after Retry-After."),
    # The service could not answer.
    "overloaded": Kind(503, "More is asked than can be answered in time", "Try again after Retry-After, or later."),
    "client_gone": Kind(499, "The client left before its answer", "Nobody reads this: it is for the log."),
    "triton_unavailable": Kind(503, "The inference server cannot be reached", "Try again in a moment."),
    "no_release": Kind(503, "No release of the model is ready", "Try again in a moment."),
    "release_unavailable": Kind(
        503, "The release is there, but may not answer now", "Pin another or none; the reason is in the detail."
    ),
    "deadline_exceeded": Kind(
        504, "No answer within the time for a request", "Try again; the service is busy or stuck."
    ),
    "inference_failed": Kind(
        502, "The inference server failed on this request", "Try again; report it if it persists."
    ),
    "invalid_answer": Kind(
        502, "The model returned something that is no answer", "Report it with the request id; the release is faulty."
    ),
    "provenance_mismatch": Kind(
        502, "The answer came from another model than the release names", "Report it with the request id."
    ),
    "internal_error": Kind(500, "The gateway failed", "Report it with the request id."),
}


class Problem(BaseModel):
    """What every error looks like. `code` is stable; `title` and `detail` are for people."""

    type: str = Field(examples=["/errors/image_truncated"])
    title: str = Field(examples=["The picture ends early"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["the file ends before the picture does"])
    code: str = Field(examples=["image_truncated"])
    advice: str = Field(examples=["Check the upload and send the whole file."])
    request_id: str = Field(examples=["6f1c2a9e8f0b4b6d9f4e8f1d2c3b4a59"])

    @classmethod
    def of(cls, failure: Failure, request_id: str) -> Problem:
        """The problem that a failure is."""
        kind = PROBLEMS[failure.code]
        return cls(
            type=f"/errors/{failure.code}",
            title=kind.title,
            status=kind.status,
            detail=failure.detail,
            code=failure.code,
            advice=kind.advice,
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
        example = Problem.of(Failure(code, kind.title), "6f1c2a9e8f0b4b6d9f4e8f1d2c3b4a59")
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": kind.title, "value": example.model_dump()}
        entry["description"] = ", ".join(entry["content"][MEDIA_TYPE]["examples"])
    return responses
