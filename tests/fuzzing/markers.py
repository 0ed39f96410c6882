"""JPEGs of random markers, whose scans leave traces in the pixels: so it can be seen how many of them were decoded.

The picture is progressive, grey, and one block, or two, wide. Each scan sets a coefficient of its own, which nothing
else touches, to the same value. Between the scans lies what decoders skip: segments, markers that stand alone, fill
bytes, garbage, lengths that lie; what looks like a scan in them would leave its trace as well.
"""

from __future__ import annotations

import io
import math
import random
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

_MOST = 24
"""Scans in a picture, with what looks like one: more would leave the range of its pixels."""
_VALUE = 20
_CODES = (*range(0x01, 0xC0), *range(0xC0, 0xFF))
_ALONE = (0x01, *range(0xD0, 0xD8))


def _segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


class _Writer:
    """Parts of one file."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.width, self.restarts = chance.choice(((8, False), (8, True), (16, False), (16, True)))
        # Not the first coefficient, which is coded in another way.
        self.left = chance.sample(range(1, 64), _MOST)

    def head(self) -> bytes:
        # Of a block: codes of one and two bits, for "a number of five bits follows" and "no more".
        huffman = bytes([0x10, 1, 1, *bytes(14), 0x05, 0x00])
        return (
            b"\xff\xd8"
            + _segment(0xDB, b"\0" + b"\1" * 64)
            + _segment(0xC2, struct.pack(">BHHBBBB", 8, 8, self.width, 1, 1, 0x11, 0))
            + _segment(0xC4, huffman)
            + (_segment(0xDD, b"\0\1") if self.restarts else b"")
        )

    def scan(self, between: bytes = b"") -> bytes:
        """With `between` in front of the restart, if there is one."""
        if not self.left:
            return b""
        coefficient = self.left.pop()
        header = _segment(0xDA, bytes([1, 1, 0, coefficient, coefficient, 0]))
        if self.width == 8:
            return header + b"\x53"  # 0, then 10100: 20; filled up with 1
        return header + (b"\x53" + between + b"\xff\xd0\x53" if self.restarts else b"\x51\x4f")

    def beside(self) -> bytes:
        """Something that is no scan of this picture, but may hold what looks like one."""
        chance = self.chance
        kind = chance.choices(range(8), (6, 6, 3, 3, 3, 3, 2, 1))[0]
        if kind == 0:
            return bytes([0xFF, chance.choice(_ALONE)]) + chance.choice((b"", b"\x7f\x7f", b"\0\5"))
        if kind == 1:
            return _segment(chance.choice((0xE0, 0xE1, 0xE2, 0xEE, 0xFE, 0xDC)), self._content())
        if kind == 2:
            return bytes([0xFF, chance.choice((0xE1, 0xE0, 0xFE)), 0, chance.choice((0, 1, 3, 200))]) + self._content()
        if kind == 3:
            return b"\xff" * chance.randrange(1, 6)
        if kind == 4:
            return b"\xff" * chance.randrange(1, 4) + b"\0" + bytes(chance.choice((0, 1)))
        if kind == 5:
            return bytes(value % 255 for value in chance.randbytes(chance.randrange(1, 6)))
        if kind == 6:
            return bytes([0xFF, chance.choice(_CODES)]) + self._content()
        return b"\xff\xd9" + chance.choice((b"", b"\xff\xd8"))

    def _content(self) -> bytes:
        chance = self.chance
        others = (b"", b"\x7f\x7f", b"\xff\xd9", b"\xff\xd8", chance.randbytes(9))
        return self.scan() if chance.random() < 0.5 else chance.choice(others)


def jpegs(chance: random.Random) -> Iterator[bytes]:
    """A file, growing scan by scan: what comes early is seen though what comes late makes the decoder give up."""
    writer = _Writer(chance)
    data = writer.head()
    for _ in range(chance.randrange(1, 13)):
        data += writer.scan(writer.beside() if chance.random() < 0.3 else b"")
        for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
            data += writer.beside()
        yield data + b"\xff\xd9"


def decoded(data: bytes) -> int | None:
    """How many coefficients of its first block the decoder set; None: it refused the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = np.asarray(Image.open(io.BytesIO(data)))[:8, :8].astype(float) - 128
    except (OSError, SyntaxError):
        return None
    return int((abs(_TRANSFORM @ block @ _TRANSFORM.T) > _VALUE / 2).sum())


_TRANSFORM = np.array(
    [
        [math.sqrt((1 if row == 0 else 2) / 8) * math.cos((2 * column + 1) * row * math.pi / 16) for column in range(8)]
        for row in range(8)
    ]
)
"""Of 8 pixels to 8 frequencies."""
