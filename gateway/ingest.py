"""The body of a request, in any of its forms, to a picture, or where it is, and its metadata.

Bounded in size and time; nothing is written to disk. A body is read up to its limit and no further.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from gateway import budget
from gateway.errors import Failure
from gateway.schemas import ONE_PICTURE, BatchRequest, Metadata, PredictRequest
from gateway.settings import Settings

_METADATA: TypeAdapter[Metadata] = TypeAdapter(Metadata)

OPENAPI_REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "oneOf": ONE_PICTURE,
                "additionalProperties": False,
                "properties": {
                    "image": {"type": "string", "format": "binary", "description": "The picture file."},
                    "image_url": {"type": "string", "description": "Where the picture is, as in the JSON form."},
                    "metadata": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"$ref": "#/components/schemas/PredictRequest/properties/metadata"},
                        "description": "A flat JSON object, as in the JSON form.",
                    },
                    "model_version": {"type": "string", "description": "The release to ask, as in the JSON form."},
                },
            },
            "encoding": {"image": {"contentType": "image/*"}},
        },
        "image/*": {"schema": {"type": "string", "format": "binary", "description": "The picture file itself."}},
    },
}

OPENAPI_BATCH_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}}},
}

OPENAPI_PARAMETERS = [
    {
        "name": "model_version",
        "in": "query",
        "required": False,
        "schema": {"type": "string"},
        "description": "The release to ask, in every form of the body. Without it the routing decides.",
        "example": "defect-v1",
    },
    budget.OPENAPI_PARAMETER,
]


@dataclass(frozen=True)
class Picture:
    """What was sent: the bytes of the file, not yet looked at, the metadata to hand back, and the release to ask."""

    data: bytes
    metadata: Metadata
    pin: str | None = None
    url: str | None = None
    """Where `data` is to be fetched from; None where the request carried it."""


async def read_picture(request: Request, settings: Settings, deadline: float) -> Picture:
    """Read one picture, or where it is, from a request, until `deadline` (monotonic seconds) at the latest.

    Raises:
        Failure: the body is missing, too large, too slow, of a type that is not taken, or malformed.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not media_type and request.headers.get("content-length", "0") == "0":
        raise Failure("missing_body", "neither a body nor a content type was sent")
    if media_type not in ("application/json", "multipart/form-data") and not media_type.startswith("image/"):
        raise Failure("unsupported_media_type", f"{media_type[:100] or 'no content type'} is not taken")
    body = await _read_body(request, settings, deadline)
    if not body:
        raise Failure("missing_body", "the body is empty")
    if media_type == "application/json":
        picture = _from_json(body)
    elif media_type == "multipart/form-data":
        picture = await _from_form(request, body)
    else:
        picture = Picture(body, {})
    _require_small(picture.metadata, settings.max_metadata_bytes)
    if not request.scope["query_string"]:
        return picture
    return replace(picture, pin=_one_pin(request.query_params.getlist("model_version"), picture.pin))


async def read_batch(request: Request, settings: Settings, deadline: float) -> list[Picture | Failure]:
    """Read several pictures, or where they are; what is wrong with one of them is told in its place.

    Raises:
        Failure: as `read_picture`, for what is wrong with the whole.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Failure("unsupported_media_type", f"{media_type[:100] or 'no content type'} is not taken")
    body = await _read_body(request, settings, deadline)
    if not body:
        raise Failure("missing_body", "the body is empty")
    try:
        items = BatchRequest.model_validate_json(body).items
    except ValidationError as error:
        raise _json_failure(error) from None
    if len(items) > settings.max_items:
        raise Failure("invalid_request", f"items: {len(items):,} are more than {settings.max_items:,}")
    return [_item(item, settings) for item in items]


def _item(item: object, settings: Settings) -> Picture | Failure:
    try:
        picture = _picture(PredictRequest.model_validate(item))
        _require_small(picture.metadata, settings.max_metadata_bytes)
        return picture
    except ValidationError as error:
        return _json_failure(error)
    except Failure as failure:
        return failure


def _one_pin(in_query: list[str], in_body: str | None) -> str | None:
    pins = dict.fromkeys([*in_query, *([] if in_body is None else [in_body])])
    if len(pins) > 1:
        raise Failure(
            "invalid_request", f"model_version: {' and '.join(pin[:64] for pin in pins)} contradict each other"
        )
    return next(iter(pins), None)


async def _read_body(request: Request, settings: Settings, deadline: float) -> bytes:
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    seconds = min(settings.body_timeout_s, deadline - time.monotonic())
    with budget.Bounded(
        request, seconds, late=lambda: Failure("body_timeout", f"{size:,} bytes came within {seconds:.3g} s")
    ):
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> Failure:
    return Failure("body_too_large", f"the limit is {limit:,} bytes")


def _from_json(body: bytes) -> Picture:
    try:
        return _picture(PredictRequest.model_validate_json(body))
    except ValidationError as error:
        raise _json_failure(error) from None


def _picture(request: PredictRequest) -> Picture:
    if "image_url" in request.model_fields_set:
        return Picture(b"", request.metadata, request.model_version, request.image_url)
    try:
        return Picture(base64.b64decode(request.image, validate=True), request.metadata, request.model_version)
    except (binascii.Error, ValueError) as error:
        raise Failure("invalid_base64", f"image: {error}") from None


def _json_failure(error: ValidationError) -> Failure:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Failure("invalid_json", first["msg"])
    if first["loc"][:1] == ("metadata",):
        return _metadata_failure(error)
    place = ".".join(str(part) for part in first["loc"])[:100]
    return Failure("invalid_request", f"{place or 'body'}: {first['msg']}")


def _metadata_failure(error: ValidationError) -> Failure:
    """Name the key; pydantic itself would list why each type that a value may have does not fit."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if part != "metadata"]
    if not path or path[-1] == "[key]":
        return Failure("invalid_metadata", f"{'.'.join(['metadata', *path])[:100]}: {first['msg']}")
    expected = "a string of at most 1,024 characters, a finite number, a boolean or null"
    return Failure("invalid_metadata", f"metadata.{path[0][:64]}: expected {expected}")


class _FormParser(MultiPartParser):
    spool_max_size = 2**31  # the body is in memory already, and bounded: never spill to disk


async def _from_form(request: Request, body: bytes) -> Picture:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    try:
        parser = _FormParser(request.headers, stream(), max_files=4, max_fields=4, max_part_size=len(body))
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Failure("invalid_multipart", getattr(error, "message", None) or "the form cannot be parsed") from None
    names = [name for name, _ in form.multi_items()]
    if unknown := sorted(set(names) - {"image", "image_url", "metadata", "model_version"}):
        raise Failure("invalid_request", f"unknown part: {unknown[0][:100]}")
    if len(set(names)) != len(names):
        raise Failure("invalid_request", "a part was sent twice")
    image, url, metadata = form.get("image"), form.get("image_url"), form.get("metadata")
    if (image is None) == (url is None):
        raise Failure("invalid_request", "exactly one of the parts 'image' and 'image_url' is needed")
    if isinstance(image, str):
        raise Failure("invalid_request", "the part 'image' is no file (it needs a filename)")
    if isinstance(url, UploadFile):
        raise Failure("invalid_request", "the part 'image_url' is text, not a file")
    text = (await metadata.read()) if isinstance(metadata, UploadFile) else metadata
    pin = form.get("model_version")
    if isinstance(pin, UploadFile):
        raise Failure("invalid_request", "the part 'model_version' is text, not a file")
    data = b"" if image is None else await image.read()
    return Picture(data, _parse_metadata(text) if text else {}, pin, url)


def _parse_metadata(text: str | bytes) -> Metadata:
    try:
        return _METADATA.validate_json(text)
    except ValidationError as error:
        raise _metadata_failure(error) from None


def _require_small(metadata: Metadata, limit: int) -> None:
    if metadata and len(json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode()) > limit:
        raise Failure("invalid_metadata", f"metadata: the limit is {limit:,} bytes")
