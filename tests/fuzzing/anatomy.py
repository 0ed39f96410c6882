"""Where the parts of a picture file begin and end: chunks, segments, blocks, directory entries; and its checksums."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.fuzzing.handmade import PNG_SIGNATURE


@dataclass(frozen=True)
class Piece:
    """Bytes from `start` to `end` that belong together, and the order of the bytes in their numbers."""

    start: int
    end: int
    order: Literal["big", "little"]


def parts(format_: str, data: bytes) -> list[Piece]:
    """The parts of a whole file, in the order of their places; what is no part is compressed pixels or padding."""
    found = {
        "JPEG": _segments,
        "MPO": _segments,
        "PNG": _png_chunks,
        "WEBP": _riff_chunks,
        "BMP": _bmp_headers,
        "GIF": _gif_blocks,
        "TIFF": _directories,
    }[format_](data)
    return sorted((part for part in found if part.start < part.end <= len(data)), key=lambda part: part.start)


def with_checksums(format_: str, data: bytes) -> bytes:
    """The file with the checksums and the total length that its bytes should have, where its format has them."""
    if format_ == "WEBP":
        return data[:4] + struct.pack("<I", max(0, len(data) - 8)) + data[8:]
    if format_ != "PNG":
        return data
    repaired = bytearray(data)
    for part in _png_chunks(data):
        if part.end <= len(data):
            struct.pack_into(">I", repaired, part.end - 4, zlib.crc32(data[part.start + 4 : part.end - 4]))
    return bytes(repaired)


def _png_chunks(data: bytes) -> Iterator[Piece]:
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        yield Piece(position, position + 12 + length, "big")
        position += 12 + length


def _segments(data: bytes) -> Iterator[Piece]:
    """Up to the first scan; behind it, of several pictures in one file, those of the others."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        (length,) = struct.unpack_from(">H", data, position + 2)
        yield Piece(position, position + 2 + length, "big")
        position += 2 + length
        if data[position - length - 1] == 0xDA and (following := data.find(b"\xff\xd8\xff", position)) > 0:
            position = following + 2


def _riff_chunks(data: bytes) -> Iterator[Piece]:
    yield Piece(0, 12, "little")
    position = 12
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        yield Piece(position, position + 8 + length + length % 2, "little")
        position += 8 + length + length % 2


def _bmp_headers(data: bytes) -> Iterator[Piece]:
    (information,) = struct.unpack_from("<I", data, 14)
    (pixels,) = struct.unpack_from("<I", data, 10)
    yield Piece(0, 14, "little")
    yield Piece(14, 14 + information, "little")
    yield Piece(14 + information, pixels, "little")  # the palette


def _gif_blocks(data: bytes) -> Iterator[Piece]:
    position = 13 + _colours(data[10])
    yield Piece(0, 13, "little")
    yield Piece(13, position, "little")
    while position < len(data) and data[position] in (0x21, 0x2C):
        start = position
        position += 2 if data[start] == 0x21 else 11 + _colours(data[start + 9])
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
        yield Piece(start, position, "little")


def _colours(flags: int) -> int:
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


def _directories(data: bytes) -> Iterator[Piece]:
    order: Literal["big", "little"] = "little" if data.startswith(b"II") else "big"
    sign = "<" if order == "little" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    head, count, entry, pointer = (16, "Q", 20, "Q") if big else (8, "H", 12, "I")
    yield Piece(0, head, order)
    (position,) = struct.unpack_from(sign + pointer, data, 8 if big else 4)
    seen: set[int] = set()  # a mutation may have made them a loop
    while 0 < position < len(data) and position not in seen:
        seen.add(position)
        (entries,) = struct.unpack_from(sign + count, data, position)
        position += struct.calcsize(sign + count)
        for _ in range(min(entries, (len(data) - position) // entry)):
            yield Piece(position, position + entry, order)
            position += entry
        (position,) = struct.unpack_from(sign + pointer, data, position)
