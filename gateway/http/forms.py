"""A form, read as it comes: what arrived is parsed at once, piece by piece, and only what is wanted of it is kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.problems import Failure

_PIECE = 2**16
"""So many bytes are parsed at once: a few milliseconds, should they be made to look like boundaries."""
_MAX_PARTS = 8
_EXTENDED_FILENAME = re.compile(rb";\s*filename\*", re.IGNORECASE)
"""A file name that is not ASCII, as some clients write it (RFC 5987); the parser of options drops it."""


@dataclass
class Part:
    """A part of a form; `is_file` where it came with a file name, or with the type of one."""

    name: str = ""
    is_file: bool = False
    limit: int = 0
    """The most bytes that are kept; 0: none."""
    content: BytesIO = field(default_factory=BytesIO)

    def text(self) -> str:
        """The content as text, without a byte order mark."""
        try:
            return self.content.getvalue().decode("utf-8-sig")
        except UnicodeDecodeError:
            return self.content.getvalue().decode("latin-1")


class Form:
    """Write the body into it; `parts` are those that are complete.

    Args:
        content_type: the header, with the boundary.
        limits: the most bytes of each part, by its name. Of others nothing is kept, nor of a second one.

    Raises:
        Failure: invalid_multipart; for a part over its limit invalid_metadata or invalid_request.
    """

    def __init__(self, content_type: str, limits: Mapping[str, int]) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise Failure("invalid_multipart", "the content type has no boundary")
        self.parts: list[Part] = []
        self._limits = dict(limits)
        self._part = Part()
        self._begun = 0
        self._name, self._value, self._disposition = bytearray(), bytearray(), b""
        self._type = b""
        self._is_whole = False
        try:
            self._parser: MultipartParser | None = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_begin,
                    "on_header_field": self._on_header_name,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_end,
                    "on_end": self._on_last,
                },
            )
        except FormParserError as error:
            raise Failure("invalid_multipart", str(error)) from None

    async def write(self, data: bytes) -> None:
        """Read on."""
        for at in range(0, len(data), _PIECE):
            if at:
                await asyncio.sleep(0)
            assert self._parser is not None
            try:
                self._parser.write(data[at : at + _PIECE])
            except FormParserError:
                raise Failure("invalid_multipart", "the form cannot be parsed") from None

    def close(self) -> None:
        """There is no more to read. The parser knows this form, and would keep it and its picture in memory."""
        self._parser = None

    def require_whole(self) -> None:
        """Raise where the form ended early: a part that was not read to its end would be missing in silence."""
        if not self._is_whole:
            raise Failure("invalid_multipart", "the form ends before its closing boundary")

    def _on_last(self) -> None:
        self._is_whole = True

    def _on_begin(self) -> None:
        self._part = Part()
        self._begun += 1
        if self._begun > _MAX_PARTS:
            raise Failure("invalid_multipart", f"the limit is {_MAX_PARTS} parts")

    # The parser bounds the headers of a part, each in size and all in number.
    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        elif self._name.lower() == b"content-type":
            self._type = bytes(self._value).strip().lower()
        self._name, self._value = bytearray(), bytearray()

    def _on_headers(self) -> None:
        disposition, kind = self._disposition, self._type
        options = parse_options_header(disposition)[1]
        self._disposition = self._type = b""
        if b"name" not in options:
            raise Failure("invalid_multipart", "a part has no name")
        self._part.name = options[b"name"].decode(errors="replace")
        self._part.is_file = (
            b"filename" in options
            or kind.startswith((b"image/", b"application/octet-stream"))
            or _EXTENDED_FILENAME.search(disposition) is not None
        )
        self._part.limit = self._limits.pop(self._part.name, 0)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if not part.limit:
            return
        if part.content.tell() + end - start > part.limit:
            code = "invalid_metadata" if part.name == "metadata" else "invalid_request"
            raise Failure(code, f"{part.name}: the limit is {part.limit:,} bytes")
        part.content.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        self.parts.append(self._part)
