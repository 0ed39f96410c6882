"""Files that Pillow cannot write: the parts of a PNG, interlacing, old and run-length BMPs, EXIF blocks that lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, rows apart, columns apart: of each pass."""


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    """A PNG; `pixels` are its rows, each behind its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def adam7(grey: Image.Image) -> bytes:
    """An interlaced PNG of a grey picture."""
    pixels = np.asarray(grey)
    rows = [b"\0" + row.tobytes() for y, x, down, across in _ADAM7 for row in pixels[y::down, x::across]]
    return png(grey.width, grey.height, b"".join(rows), interlace=1)


def run_lengths(grey: Image.Image) -> bytes:
    """A BMP of a grey picture, run-length encoded (BI_RLE8)."""
    rows = np.asarray(grey)[::-1]
    runs = b"".join(b"".join(bytes((1, value)) for value in row) + b"\0\0" for row in rows) + b"\0\1"
    return run_length_bmp(grey.width, grey.height, runs)


def run_length_bmp(width: int, height: int, runs: bytes) -> bytes:
    """A BMP whose pixels are `runs` of BI_RLE8."""
    palette = b"".join(bytes((value, value, value, 0)) for value in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    offset = 14 + len(info) + len(palette)
    return struct.pack("<2sIHHI", b"BM", offset + len(runs), 0, 0, offset) + info + palette + runs


def os2(picture: Image.Image) -> bytes:
    """A BMP with the 12-byte header of OS/2."""
    row = 3 * picture.width
    stored = np.zeros((picture.height, (row + 3) // 4 * 4), np.uint8)
    stored[:, :row] = np.asarray(picture)[::-1, :, ::-1].reshape(picture.height, row)
    pixels = stored.tobytes()
    info = struct.pack("<IHHHH", 12, picture.width, picture.height, 1, 24)
    return struct.pack("<2sIHHI", b"BM", 26 + len(pixels), 0, 0, 26) + info + pixels


def exif(entries: Iterable[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A TIFF structure of one directory, as EXIF has it: entries of tag, type, count, value; the next directory."""
    packed = [struct.pack("<HHII", *entry) for entry in entries]
    count = min(len(packed), 65535)
    return b"II*\0" + struct.pack("<IH", 8, count) + b"".join(packed[:count]) + struct.pack("<I", following)


def lying_exif() -> dict[str, bytes]:
    """EXIF blocks that loop, point out of themselves, or declare more than they hold."""
    orientation, sub_directory, maker_note = 0x0112, 0x8769, 0x927C
    return {
        "a directory that follows itself": exif([(orientation, 3, 1, 6)], following=8),
        "a directory inside itself": exif([(orientation, 3, 1, 6), (sub_directory, 4, 1, 8), (maker_note, 4, 1, 8)]),
        "four thousand million values": exif([(orientation, 3, 2**32 - 1, 8)]),
        "an offset beyond the end": exif([(orientation, 12, 2**16, 2**31)]),
        "an orientation that is text": exif([(orientation, 2, 4, 0x41414141)]),
        "an orientation of no values": exif([(orientation, 3, 0, 0)]),
        "an orientation over zero": exif([(orientation, 5, 1, 26)]) + struct.pack("<II", 1, 0),
        "an unknown type": exif([(orientation, 99, 1, 6)]),
        "five thousand entries": exif([(orientation, 3, 1, 6)] * 5000),
        "all the same offset": exif([(tag, 7, 60000, 8) for tag in range(0x9000, 0x9400)]),
        "cut off": exif([(orientation, 3, 1, 6)])[:11],
        "of another order": b"MM\0*" + exif([(orientation, 3, 1, 6)])[4:],
    }
