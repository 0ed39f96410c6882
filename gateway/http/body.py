"""The body of a request, in any of its forms, to a picture, or where it is, and its metadata.

Bounded in size and time, and in what all bodies hold together; nothing is written to disk. A body is read up to its
limit and no further, compressed or not. However large it is, and whatever is in it, other requests go on meanwhile:
what takes long is done in pieces (forms.py, json_body.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from io import BytesIO

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from gateway.api.schemas import ONE_PICTURE, BatchRequest, Metadata, PredictRequest
from gateway.http.deadline import TIMEOUT_HEADER, TIMEOUT_PARAMETER, Bounded
from gateway.http.forms import Form
from gateway.http.json_body import Cut
from gateway.http.memory import Share
from gateway.problems import Failure
from gateway.settings import Settings

_METADATA: TypeAdapter[Metadata | None] = TypeAdapter(Metadata | None)
Write = Callable[[bytes], Awaitable[None]]
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0|II[*+]\0|MM\0[*+]", re.DOTALL
)
"""How files of pictures begin, of which some begin like a text."""
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_SIGNATURE_BYTES = 12
_INFLATED = 2**18
"""So many bytes are decompressed at once: a millisecond."""
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
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary", "description": "The same, without saying what it is."}
        },
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
    TIMEOUT_PARAMETER,
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
    if media_type == "multipart/form-data":
        rest = _rest(settings, 1)
        limits = {"image": settings.max_body_bytes, "image_url": rest, "metadata": rest, "model_version": rest}
        form = Form(content_type, limits)
        try:
            await _read(request, settings, deadline, share, form.write)
        finally:
            form.close()
        form.require_whole()
        picture = _from_form(form, share)
    elif media_type == "application/json":
        picture = await _from_json(await _read_whole(request, settings, deadline, share), settings, share)
    else:
        is_picture = media_type.startswith("image/") or media_type == "application/octet-stream"
        body = await _read_whole(request, settings, deadline, share, None if is_picture else media_type)
        picture = Picture(body, {})
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
        raise _not_taken(media_type, "send application/json")
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
    pins = dict.fromkeys(filter(None, [*in_query, in_body]))  # `?model_version=` names none
    if len(pins) > 1:
        raise Failure(
            "invalid_request", f"model_version: {' and '.join(pin[:64] for pin in pins)} contradict each other"
        )
    return next(iter(pins), None)


async def _read_whole(
    request: Request, settings: Settings, deadline: float, share: Share, media_type: str | None = None
) -> bytes:
    """The body. With a `media_type`, which says nothing of pictures, it has to begin as one."""
    first = b""
    body = BytesIO()
    is_known = media_type is None

    async def write(data: bytes) -> None:
        nonlocal first, is_known
        if first:
            body.write(first)
            first = b""
        if body.tell():
            body.write(data)
        else:
            first = data  # most pictures come in one piece
        if not is_known and len(first) + body.tell() >= _SIGNATURE_BYTES:
            is_known = require_picture()

    def require_picture() -> bool:
        begin = first[:_SIGNATURE_BYTES] or body.getvalue()[:_SIGNATURE_BYTES]
        if not _is_file(begin):
            raise _no_picture(media_type or "", begin)
        return True

    await _read(request, settings, deadline, share, write)
    if not is_known:
        require_picture()
    return first or body.getvalue()  # without a copy, as this is the only reference to it


def _is_file(begin: bytes) -> bool:
    """Whether a body that says nothing of itself is a picture or another file, which preprocessing knows to name."""
    return bool(_SIGNATURES.match(begin) or _BINARY.search(begin[:_SIGNATURE_BYTES]))


def _no_picture(media_type: str, begin: bytes) -> Failure:
    if begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return _not_taken(media_type, "the body looks like JSON: send application/json")
    if begin.startswith(b"--"):
        return _not_taken(media_type, "the body looks like a form: send multipart/form-data with its boundary")
    if begin.startswith((b"/9j/", b"iVBORw0KGgo", b"data:")):
        return _not_taken(media_type, "the body looks like base64: send the bytes, or JSON with the text in it")
    kinds = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
    return _not_taken(media_type, f"the body does not begin as {kinds}: send such a file, as image/jpeg or the like")


def _not_taken(media_type: str, instead: str) -> Failure:
    what = f"{media_type[:100]} is not taken" if media_type else "there is no content type"
    return Failure("unsupported_media_type", f"{what}; {instead}")


async def _read(request: Request, settings: Settings, deadline: float, share: Share, write: Write) -> None:
    """Hand the body on as it comes, decompressed.

    It may take `GATEWAY_BODY_TIMEOUT_S`, and so long again whenever enough came meanwhile; until `deadline` at most
    where the client itself named a time.
    """
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit():
        if int(declared) > limit:
            raise _too_large(limit)
        share.require(int(declared))
    encodings = _encodings(request)
    size = counted = held = 0
    seconds = settings.body_timeout_s
    enough = max(1, int(settings.body_rate * seconds))
    now = time.monotonic()
    end = deadline if TIMEOUT_HEADER in request.headers else float("inf")
    turn = now + seconds

    def late() -> Failure:
        if end <= turn:
            return Failure("body_timeout", f"{size:,} bytes came within the time of {TIMEOUT_HEADER}")
        least = f"it has {seconds:g} s, and longer while {settings.body_rate:,} bytes come each second"
        return Failure("body_timeout", f"{size - counted:,} bytes of the body came in {seconds:g} s; {least}")

    def more() -> float:
        nonlocal counted, turn
        if end <= turn or size - counted < enough:
            return 0.0
        now = time.monotonic()
        counted, turn = size, now + seconds
        return min(turn, end) - now

    async def hold(data: bytes) -> None:
        nonlocal held
        held += len(data)
        if held > limit:
            raise _too_large(limit)
        share.take(len(data))
        await write(data)

    inflater = _Inflater(hold) if encodings else None
    with Bounded(request, min(turn, end) - now, late, more) as bounded:
        share.begin(bounded.end)
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            await (inflater.write(chunk) if inflater else hold(chunk))
        share.stop()
    if not size:
        raise Failure("missing_body", "the body is empty")
    if inflater:
        inflater.close()
        if not held:
            raise Failure("missing_body", "what was compressed is empty")


def _encodings(request: Request) -> list[str]:
    """How the body is compressed: not at all, or with gzip, the one encoding that is taken."""
    values = [value for name, value in request.scope["headers"] if name == b"content-encoding"]
    if not values:
        return []
    names = map(str.strip, b",".join(values).decode("latin-1").lower().split(","))
    encodings = [name for name in names if name not in ("", "identity")]
    if encodings not in ([], ["gzip"], ["x-gzip"]):
        named = ", ".join(encodings)[:100]
        raise Failure(
            "unsupported_media_type", f"Content-Encoding: {named} is not taken; send gzip, or the body as it is"
        )
    return encodings


class _Inflater:
    """Write a gzip stream into it, and it hands on what it holds, in pieces; what is never asked for is not made."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    async def write(self, data: bytes) -> None:
        """Read on."""
        is_full = False
        while data or is_full:
            if self._stream.eof:
                if not data:
                    return
                raise Failure("invalid_encoding", "something comes after the end of the gzip stream")
            try:
                piece = self._stream.decompress(data, _INFLATED)
            except zlib.error as error:
                raise Failure("invalid_encoding", f"gzip: {str(error)[:100]}") from None
            is_full = len(piece) == _INFLATED  # there may be more of it, though all that came was read
            if piece:
                await self._write(piece)
                await asyncio.sleep(0)
            data = self._stream.unconsumed_tail or self._stream.unused_data

    def close(self) -> None:
        """There is no more."""
        if not self._stream.eof:
            raise Failure("invalid_encoding", "the gzip stream ends early")


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
    metadata = request.metadata or {}
    if request.image_url is not None:
        return Picture(b"", metadata, request.model_version or None, request.image_url, share)
    return Picture(await cut.decode(request.image or "", share), metadata, request.model_version or None)


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
    if image and not image.is_file and not _is_file(image.content.getvalue()):
        raise Failure(
            "invalid_request",
            "the part 'image' is no file: send it with a filename or as image/* (curl -F image=@parcel.jpg)",
        )
    for name in ("image_url", "model_version"):
        if name in parts and parts[name].is_file:
            raise Failure("invalid_request", f"the part '{name}' is text, not a file")
    pin = (parts["model_version"].text() or None) if "model_version" in parts else None
    text = parts["metadata"].text() if "metadata" in parts else ""
    metadata = _parse_metadata(text) if text else {}
    if url is not None:
        return Picture(b"", metadata, pin, url.text(), share)
    return Picture(image.content.getvalue() if image else b"", metadata, pin)


def _parse_metadata(text: str) -> Metadata:
    try:
        return _METADATA.validate_json(text) or {}
    except ValidationError as error:
        raise _metadata_failure(error) from None


def _require_small(metadata: Metadata, limit: int) -> None:
    if metadata and len(json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode()) > limit:
        raise Failure("invalid_metadata", f"metadata: the limit is {limit:,} bytes")
