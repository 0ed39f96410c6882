"""JSON with pictures in base64, in steps that are short however large it is.

Parsers of JSON take the whole document at once, and nothing else happens in the process meanwhile; the same holds for
decoding. So the pictures are cut out of the text, which takes no more than finding their ends, and are decoded piece
by piece. What is left is small, or refused.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import Iterator
from io import BytesIO

from gateway.api.schemas import MAX_VALUE
from gateway.http.memory import Share
from gateway.problems import Failure

_IMAGE = re.compile(rb'"image"[ \t\r\n]*+:[ \t\r\n]*+"')
"""Where the text of a picture begins. In JSON its last quote begins a string, whatever the first one is."""
_LONG, _LONG_ESCAPED = 4 * MAX_VALUE, 12 * MAX_VALUE
"""No value of the metadata, which may have a key "image", too, is as many bytes: plain, and with escapes."""
_PIECE = 2**18
"""So many characters are decoded at once; four of them are three bytes, so it is a multiple of four."""
_ESCAPE = 6
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients, of Windows above all, write it before their JSON; it says nothing."""
_CONTROL = re.compile(rb"[\x00-\x1f]")


class Cut:
    """A document without its pictures, `rest`, which has a mark in the place of each.

    Args:
        body: the document.
        most: the largest rest that is taken, in bytes.

    Raises:
        Failure: invalid_request, the rest is larger.
    """

    def __init__(self, body: bytes, most: int) -> None:
        self._body = body
        self._places: dict[str, tuple[int, int]] = {}
        # Nobody can guess a mark; and it is too long for metadata, as what it stands for.
        secret, filler = secrets.token_hex(16), "." * MAX_VALUE
        pieces: list[bytes] = []
        start = look = len(_BYTE_ORDER_MARK) if body.startswith(_BYTE_ORDER_MARK) else 0
        left = most
        while found := _IMAGE.search(body, look, start + left):
            begin = found.end()
            end = body.find(b'"', begin)
            if end < 0:
                break
            look = end + 1
            is_plain = body.find(b"\\", begin, end) < 0
            # A string that goes on after the quote (\") is no base64: it is left to the parser.
            if end - begin <= (_LONG if is_plain else _LONG_ESCAPED) or body[end - 1] == ord("\\"):
                continue
            mark = f"{secret}{len(self._places)}{filler}"
            pieces += [body[start:begin], mark.encode()]
            left -= begin - start
            self._places[mark] = (begin, end)
            start = end
        if len(body) - start > left:
            raise Failure("invalid_request", f"body: the limit beside its pictures is {most:,} bytes")
        self.rest = b"".join([*pieces, body[start:]])

    async def decode(self, image: str, share: Share) -> bytes:
        """The picture that a string of the parsed rest is, or stands for.

        Raises:
            Failure: invalid_base64; invalid_json, a string has characters that none may have; overloaded.
        """
        place = self._places.get(image)
        begin, end = place or (0, len(image))
        share.take((end - begin) // 4 * 3)
        try:
            if place is None:
                return base64.b64decode(image, validate=True)
            return await self._decode(begin, end)
        except (binascii.Error, ValueError) as error:
            raise Failure("invalid_base64", f"image: {error}") from None

    async def _decode(self, begin: int, end: int) -> bytes:
        picture = BytesIO()
        whole, is_escaped = True, self._body.find(b"\\", begin, end) >= 0
        for text in self._plain(begin, end):
            if not whole:
                raise ValueError("Excess data after padding")
            try:
                data = binascii.a2b_base64(text, strict_mode=True)
            except binascii.Error:
                if not is_escaped and _CONTROL.search(text):  # else json found none, and these were written as \\n
                    raise Failure("invalid_json", "image: a control character in a string") from None
                raise
            if end - begin <= _PIECE:
                return data
            whole = len(data) * 4 == len(text) * 3
            picture.write(data)
            await asyncio.sleep(0)
        return picture.getvalue()  # without a copy, as this is the only reference to it

    def _plain(self, begin: int, end: int) -> Iterator[bytes | memoryview]:
        """The text without escapes, in pieces of a multiple of four characters but for the last one."""
        if self._body.find(b"\\", begin, end) < 0:
            view = memoryview(self._body)
            yield from (view[at : min(at + _PIECE, end)] for at in range(begin, end, _PIECE))
            return
        left = b""
        while begin < end:
            stop = min(begin + _PIECE, end)
            if stop < end and (escape := self._body.rfind(b"\\", stop - _ESCAPE, stop)) > 0:
                stop = escape
            try:
                left += json.loads(f'"{self._body[begin:stop].decode()}"').encode("ascii", "replace")
            except ValueError as error:
                raise Failure("invalid_json", f"image: {error}") from None
            begin = stop
            whole = len(left) // 4 * 4 if begin < end else len(left)
            yield left[:whole]
            left = left[whole:]
