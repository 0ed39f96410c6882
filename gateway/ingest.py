"""The body of a request, in any of its forms, to a picture, or where it is, and its metadata.

Bounded in size and time, and in what all bodies hold together; nothing is written to disk. A body is read up to its
limit and no further. However large it is, and whatever is in it, other requests go on meanwhile: what takes long is
done in pieces (forms.py, cutting.py).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from io import BytesIO

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from gateway import budget
from gateway.cutting import Cut
from gateway.errors import Failure
from gateway.forms import Form
from gateway.memory import Share
from gateway.schemas import ONE_PICTURE, BatchRequest, Metadata, PredictRequest
from gateway.settings import Settings

_METADATA: TypeAdapter[Metadata] = TypeAdapter(Metadata)
_REST = 2**17
"""Bytes of JSON that are parsed at once beside the pictures of a request, and what its metadata may need: indentation,
and a location. More is nothing that a client of this contract has a use for."""

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
    share: Share | None = None
    """What the request holds: what is fetched counts, too."""


async def read_picture(request: Request, settings: Settings, deadline: float, share: Share) -> Picture:
    """Read one picture, or where it is, from a request, until `deadline` (monotonic seconds) at the latest.

    What it takes of the memory is the request's `share`.

    Raises:
        Failure: the body is missing, too large, too slow, of a type that is not taken, or malformed; or there are too
            many others.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type and request.headers.get("content-length", "0") == "0":
        raise Failure("missing_body", "neither a body nor a content type was sent")
    if media_type == "multipart/form-data":
        rest = _rest(settings, 1)
        limits = {"image": settings.max_body_bytes, "image_url": rest, "metadata": rest, "model_version": rest}
        form = Form(content_type, limits)
        await _read(request, settings, deadline, share, form.write)
        picture = _from_form(form, share)
    elif media_type == "application/json" or media_type.startswith("image/"):
        body = await _read_whole(request, settings, deadline, share)
        picture = Picture(body, {}) if media_type != "application/json" else await _from_json(body, settings, share)
    else:
        raise Failure("unsupported_media_type", f"{media_type[:100] or 'no content type'} is not taken")
    _require_small(picture.metadata, settings.max_metadata_bytes)
    if not request.scope["query_string"]:
        return picture
    return replace(picture, pin=_one_pin(request.query_params.getlist("model_version"), picture.pin))


async def read_batch(
    request: Request, settings: Settings, deadline: float, share: Share, counted: Callable[[int], None]
) -> list[Picture | Failure]:
    """Read several pictures, or where they are; what is wrong with one of them is told in its place.

    `counted` is called with their number, before any of them is looked at, and may raise a `Failure`.

    Raises:
        Failure: as `read_picture`, for what is wrong with the whole.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Failure("unsupported_media_type", f"{media_type[:100] or 'no content type'} is not taken")
    body = await _read_whole(request, settings, deadline, share)
    cut = Cut(body, _rest(settings, settings.max_items))
    try:
        items = BatchRequest.model_validate_json(cut.rest).items
    except ValidationError as error:
        raise _json_failure(error) from None
    if len(items) > settings.max_items:
        raise Failure("invalid_request", f"items: {len(items):,} are more than {settings.max_items:,}")
    counted(len(items))
    pictures = [await _item(item, cut, settings, share) for item in items]
    share.give_back(len(body))
    return pictures


def _rest(settings: Settings, items: int) -> int:
    """How many bytes of JSON there may be beside the pictures of so many items."""
    return _REST + items * (8 * 2**10 + 2 * settings.max_metadata_bytes)


async def _item(item: object, cut: Cut, settings: Settings, share: Share) -> Picture | Failure:
    await asyncio.sleep(0)  # each takes its time
    try:
        if isinstance(item, dict) and (unknown := _unknown_field(item)):
            raise Failure("invalid_request", f"{unknown[:100]}: there is no such field")
        picture = await _picture(PredictRequest.model_validate(item), cut, share)
        _require_small(picture.metadata, settings.max_metadata_bytes)
        return picture
    except ValidationError as error:
        return _json_failure(error)
    except Failure as failure:
        return failure


def _unknown_field(item: dict[str, object]) -> str | None:
    """The first one. Pydantic would tell all of them, which is slow where they are many."""
    return next((name for name in item if name not in PredictRequest.model_fields), None)


def _one_pin(in_query: list[str], in_body: str | None) -> str | None:
    pins = dict.fromkeys([*in_query, *([] if in_body is None else [in_body])])
    if len(pins) > 1:
        raise Failure(
            "invalid_request", f"model_version: {' and '.join(pin[:64] for pin in pins)} contradict each other"
        )
    return next(iter(pins), None)


async def _read_whole(request: Request, settings: Settings, deadline: float, share: Share) -> bytes:
    first = b""
    body = BytesIO()

    async def write(data: bytes) -> None:
        nonlocal first
        if first:
            body.write(first)
            first = b""
        if body.tell():
            body.write(data)
        else:
            first = data  # most pictures come in one piece

    await _read(request, settings, deadline, share, write)
    return first or body.getvalue()  # without a copy, as this is the only reference to it


async def _read(
    request: Request, settings: Settings, deadline: float, share: Share, write: Callable[[bytes], Awaitable[None]]
) -> None:
    """Hand the body on as it comes."""
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit():
        if int(declared) > limit:
            raise _too_large(limit)
        share.require(int(declared))
    size = 0
    seconds = min(settings.body_timeout_s, deadline - time.monotonic())

    def late() -> Failure:
        return Failure("body_timeout", f"{size:,} bytes came within {seconds:.3g} s")

    with budget.Bounded(request, seconds, late) as bounded:
        share.begin(bounded.end)
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            share.take(len(chunk))
            await write(chunk)
        share.stop()
    if not size:
        raise Failure("missing_body", "the body is empty")


def _too_large(limit: int) -> Failure:
    return Failure("body_too_large", f"the limit is {limit:,} bytes")


async def _from_json(body: bytes, settings: Settings, share: Share) -> Picture:
    cut = Cut(body, _rest(settings, 1))
    try:
        picture = await _picture(PredictRequest.model_validate_json(cut.rest), cut, share)
    except ValidationError as error:
        raise _json_failure(error) from None
    share.give_back(len(body))
    return picture


async def _picture(request: PredictRequest, cut: Cut, share: Share) -> Picture:
    if "image_url" in request.model_fields_set:
        return Picture(b"", request.metadata, request.model_version, request.image_url, share)
    return Picture(await cut.decode(request.image, share), request.metadata, request.model_version)


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


def _from_form(form: Form, share: Share) -> Picture:
    names = [part.name for part in form.parts]
    if unknown := sorted(set(names) - {"image", "image_url", "metadata", "model_version"}):
        raise Failure("invalid_request", f"unknown part: {unknown[0][:100]}")
    if len(set(names)) != len(names):
        raise Failure("invalid_request", "a part was sent twice")
    parts = {part.name: part for part in form.parts}
    image, url = parts.get("image"), parts.get("image_url")
    if (image is None) == (url is None):
        raise Failure("invalid_request", "exactly one of the parts 'image' and 'image_url' is needed")
    if image and not image.is_file:
        raise Failure("invalid_request", "the part 'image' is no file (it needs a filename)")
    for name in ("image_url", "model_version"):
        if name in parts and parts[name].is_file:
            raise Failure("invalid_request", f"the part '{name}' is text, not a file")
    pin = parts["model_version"].text() if "model_version" in parts else None
    text = parts["metadata"].text() if "metadata" in parts else ""
    metadata = _parse_metadata(text) if text else {}
    if url is not None:
        return Picture(b"", metadata, pin, url.text(), share)
    return Picture(image.content.getvalue() if image else b"", metadata, pin)


def _parse_metadata(text: str) -> Metadata:
    try:
        return _METADATA.validate_json(text)
    except ValidationError as error:
        raise _metadata_failure(error) from None


def _require_small(metadata: Metadata, limit: int) -> None:
    if metadata and len(json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode()) > limit:
        raise Failure("invalid_metadata", f"metadata: the limit is {limit:,} bytes")
