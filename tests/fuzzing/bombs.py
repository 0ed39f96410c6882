"""Files that are small on the wire and large, deep or endless when they are opened. Each is made whole, not mutated."""

from __future__ import annotations

import functools
import struct
import zlib

from PIL import Image

from tests.fuzzing import handmade
from tests.fuzzing.seeds import Seed, encode, seeds

_SIDE = 7200
"""Of a square just below the limit of 52 megapixels."""
_SCANS = 20_000
"""In a progressive JPEG. Each takes a few bytes, and is decoded over all of the picture: this file, for minutes."""


def bomb(corpus: int, number: int) -> Seed:
    """Bomb `number` of a corpus: of each kind in turn, and of each kind its files in turn."""
    kinds = (_declared, _texts, _exif, _repeated, largest)
    files = kinds[number % len(kinds)]()
    return files[(corpus + number // len(kinds)) % len(files)]


@functools.cache
def _declared() -> list[Seed]:
    """Sizes that nothing follows, that are zero, or that overflow 16 or 32 bits when they are multiplied."""
    sizes = [(0, 0), (0, 100), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (65536, 65536), (_SIDE, _SIDE)]
    found = []
    for width, height in sizes:
        size = f"{width} x {height} declared"
        found.append(Seed(size, "PNG", handmade.png(width, height, bytes(1000), colour=2)))
        bmp = bytearray(handmade.run_length_bmp(1, 1, b"\1\1\0\1"))
        struct.pack_into("<II", bmp, 18, width, height)
        found.append(Seed(size, "BMP", bytes(bmp)))
        tiff = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
        strips = [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 2**31)]
        found.append(Seed(size, "TIFF", handmade.exif(tiff + strips)))
    gif = bytearray(_seed("GIF").data)
    gif[6:10] = b"\xff\xff\xff\xff"
    jpeg = bytearray(_seed("JPEG").data)
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65535, 65535)
    webp = bytearray(next(seed.data for seed in seeds() if seed.format == "WEBP" and seed.data[12:16] == b"VP8X"))
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"  # 16384 x 16384
    sized = {"GIF": bytes(gif), "JPEG": bytes(jpeg), "WEBP": bytes(webp)}
    return found + [Seed("the largest declared", format_, data) for format_, data in sized.items()]


@functools.cache
def largest() -> list[Seed]:
    """One colour compresses a thousandfold. Just below the limit of pixels: they must be answered."""
    row = b"\xff\7" * (_SIDE // 255) + bytes((_SIDE % 255, 7)) + b"\0\0"
    return [
        of_one_colour("L", "PNG", compress_level=1),
        of_one_colour("RGBA", "PNG", compress_level=1),
        of_one_colour("L", "JPEG"),
        of_one_colour("CMYK", "JPEG", progressive=True),
        of_one_colour("RGB", "WEBP", lossless=True, method=0),
        of_one_colour("L", "GIF"),
        *(of_one_colour(mode, "TIFF", compression="tiff_adobe_deflate") for mode in ("F", "I;16", "LAB")),
        Seed(f"{_SIDE} x {_SIDE}, run lengths", "BMP", handmade.run_length_bmp(_SIDE, _SIDE, row * _SIDE)),
    ]


def of_one_colour(mode: str, format_: str, **options: object) -> Seed:
    """A picture of that mode, almost as large as one may be."""
    data = encode(Image.new(mode, (_SIDE, _SIDE)), format_, **options)
    return Seed(f"{_SIDE} x {_SIDE} of one colour, {mode}", format_, data)


@functools.cache
def _texts() -> list[Seed]:
    """Chunks beside the pixels that inflate to 64 MiB, or are simply large."""
    inflating = zlib.compress(bytes(64 * 2**20))
    chunks = {
        "zTXt": b"comment\0\0" + inflating,
        "iTXt": b"comment\0\1\0\0\0" + inflating,
        "iCCP": b"profile\0\0" + inflating,
        "tEXt": b"comment\0" + bytes(2**21),
        "zTXt of EXIF": b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9999999999\n" + b"ff" * 2**18),
    }
    png = _seed("PNG").data
    icc = b"\xff\xe2\xff\xffICC_PROFILE\0\1\xff" + bytes(65519)
    return [
        *(
            Seed(f"a large {kind}", "PNG", png[:33] + handmade.chunk(kind[:4].encode(), content) + png[33:])
            for kind, content in chunks.items()
        ),
        Seed("hundred iTXt", "PNG", png[:33] + handmade.chunk(b"iTXt", chunks["iTXt"]) * 100 + png[33:]),
        Seed("255 profiles", "JPEG", b"\xff\xd8" + icc * 15 + _seed("JPEG").data[2:]),
        Seed("many comments", "JPEG", b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65533)) * 30 + _seed("JPEG").data[2:]),
    ]


@functools.cache
def _exif() -> list[Seed]:
    """Blocks that lie, in each format that has them."""
    found = []
    for name, block in handmade.lying_exif().items():
        segment = b"Exif\0\0" + block[:65000]
        jpeg = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + _seed("JPEG").data[2:]
        png = _seed("PNG").data
        picture = Image.new("RGB", (20, 20), "grey")
        found += [
            Seed(f"EXIF: {name}", "JPEG", jpeg),
            Seed(f"EXIF: {name}", "PNG", png[:33] + handmade.chunk(b"eXIf", block) + png[33:]),
            Seed(f"EXIF: {name}", "WEBP", encode(picture, "WEBP", exif=block)),
            Seed(f"only a directory: {name}", "TIFF", block),
        ]
    return found


@functools.cache
def _repeated() -> list[Seed]:
    """The same part again and again."""
    progressive = encode(Image.new("L", (_SIDE, _SIDE), 128), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    frame = encode(Image.new("P", (1, 1)), "GIF")
    start = frame.index(b",")
    page = handmade.exif([(256, 4, 1, 1), (257, 4, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)])
    pages = b"".join(page[8:-4] + struct.pack("<I", 8 + (number + 1) * (len(page) - 8)) for number in range(3000))
    return [
        Seed(f"{_SCANS} more scans", "JPEG", progressive[:-2] + scan * _SCANS + b"\xff\xd9"),
        Seed(f"{_SCANS} hidden scans", "JPEG", progressive[:-2] + (b"\xff\1\x7f\x7f" + scan) * _SCANS + b"\xff\xd9"),
        Seed("a hundred thousand frames", "GIF", frame[:start] + frame[start:-1] * 100_000 + b";"),
        Seed("three thousand pages", "TIFF", page[:8] + pages),
        Seed("ten thousand pictures", "MPO", _seed("MPO").data + b"\xff\xd8\xff\xd9" * 10_000),
        Seed("a hundred thousand empty chunks", "PNG", _seed("PNG").data[:33] + handmade.chunk(b"tEXt", b"") * 100_000),
    ]


def _seed(format_: str) -> Seed:
    return next(seed for seed in seeds() if seed.format == format_)
