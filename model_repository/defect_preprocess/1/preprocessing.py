"""The bytes of a picture -> the uint8 tensor that the classifier was trained on.

This one file is run by Triton (`model.py` beside it), by training, by evaluation and by the release
check, so a served picture cannot be prepared differently from a training picture. It imports nothing
of the project, keeps no state, and runs on Python 3.10 (NVIDIA's 24.10 image) and later.

The steps, in order:

1. Recognise the format from the header (`FORMATS`), and refuse more than `MAX_PIXELS`, a JPEG of more than
   `MAX_SCANNED`, or a TIFF in parts that make more work than its pixels, before decoding.
2. Decode. JPEG is decoded at the smallest DCT scale (1/1, 1/2, 1/4, 1/8) that is not below the target,
   which costs a fraction of a full decode. Of an animation or a multi-page file, the first picture counts.
3. Bring every Pillow mode to L, RGB or RGBA:

   =============================  ==========================================================================
   mode                           becomes
   =============================  ==========================================================================
   1, L, P, RGB, RGBX, HSV        L or RGB, as Pillow converts them
   CMYK, YCbCr                    RGB by Pillow's formula; embedded colour profiles are not applied
   LAB                            RGB, through the sRGB profile
   LA, La, PA, RGBA, RGBa         RGBA
   1, L, P, RGB with a            RGBA
   transparent colour (tRNS)
   I;16, I;16L, I;16B, I;16N      L, 0..65535 scaled to 0..255
   I                              L, clipped to 0..65535 and scaled like I;16 (it holds 16-bit PNG and TIFF)
   F                              L, clipped to 0..1 and scaled to 0..255; what is not a number becomes 0
   =============================  ==========================================================================

4. Stretch to a square with an antialiased bilinear filter. The sides are scaled on their own, because
   the training pictures were stretched to squares.
5. Lay what is transparent on white.
6. Turn upright as the EXIF orientation says. An unreadable EXIF block counts as "upright".

Whatever the file is, it is given up after `MAX_SECONDS` of a processor's time, at the next place where Pillow reads on.
"""

from __future__ import annotations

import io
import re
import struct
import time
from collections.abc import Callable
from typing import IO

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 50_000_000
"""Width x height above which a picture is refused unread: four times a 12-megapixel camera frame."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Width x height x scans above which a JPEG is refused unread; so are more than `MAX_SCANS`. Each scan is decoded
over the whole picture, and may be a few bytes long: without a limit, 20 MB would keep a processor for hours."""

MAX_SCANS = 1000
"""A progressive JPEG has about ten."""

MAX_PARTS = 200_000
"""Strips or tiles of a TIFF: 50 megapixels in the smallest tiles, 16 x 16. More are refused unread."""

MAX_SECONDS = 5.0
"""Processor time after which a picture is given up: twice what decoding the dearest sound one takes. It is looked at
between two reads of the file, so what a decoder does in one go comes on top: docs/operations.md has the figures. It is
the processor's time, not the clock's, so that no picture is refused because others keep the machine busy."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of what is decoded. JPEG includes MPO, the several pictures in one .jpg of many phones."""

Image.init()  # register the plugins now, so that the first request does not pay for it

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8", b"II*\x00", b"MM\x00*")
_START_OF_SCAN, _END_OF_PICTURE = b"\xda", b"\xd9"
_SCAN = b"\xff" + _START_OF_SCAN
_SCAN_PAIR = np.frombuffer(_SCAN, np.uint16)[0]
_MARKER = re.compile(rb"\xff([^\x00-\xbf\xd0-\xd8\xff])")
"""Of a JPEG, the next one that a length follows, or the end. Stuffed zeros, restarts and what else stands alone do not
count, nor does what the decoder passes over while it looks for a restart."""
_STEP = 256
"""Bytes of a JPEG that the decoder gets at once where scans follow each other closely: 25 of them."""
_COMPRESSION, _PARTS, _PART_SIZES, _SIDES = 259, (273, 324), (279, 325), (256, 257, 322, 323)
_TAGS = {_COMPRESSION, *_PARTS, *_PART_SIZES, *_SIDES}
"""Of a TIFF: where strips and tiles begin, how many bytes they have; sides of the picture, and of a tile."""
_TIFF_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "u1", 8: "u2", 9: "u4", 13: "u4", 16: "u8", 17: "u8", 18: "u8"}
_PIECE = 2**20
"""Pixels that are brought to 8 bits at once."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be used, with a stable `code` that reaches the client.

    `image_empty`: no bytes. `image_unsupported`: in none of `FORMATS`. `image_truncated`: the file ends
    early. `image_corrupt`: of a known format, but broken. `image_too_large`: over `MAX_PIXELS`, `MAX_SCANNED` or
    another of the limits above, or more than there is memory for.
    """

    CODES = ("image_empty", "image_unsupported", "image_truncated", "image_corrupt", "image_too_large")

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def preprocess(data: bytes, size: int) -> np.ndarray:
    """Decode one picture and bring it to the classifier's input.

    Args:
        data: the file's bytes, in one of `FORMATS`.
        size: side of the result in pixels: the classifier's (`settings.json` beside this file), or more where
            training crops from it.

    Returns:
        uint8 array of shape (size, size, 3): rows, columns, RGB.

    Raises:
        PictureError: the picture is empty, unsupported, truncated, corrupt or too large.
    """
    if not data:
        raise PictureError("image_empty", "the picture has no bytes")
    try:
        return _prepare(_File(data), size)
    except _TooLong as error:
        raise PictureError("image_too_large", f"decoding takes longer than {MAX_SECONDS:g} s") from error
    except MemoryError as error:
        raise PictureError("image_too_large", "there is no memory to decode it") from error
    except PictureError:
        raise
    except Exception as error:
        raise _broken(data, error) from error


class _TooLong(BaseException):
    """Decoding does. No `Exception`, because Pillow takes some of those for damage that it can live with."""


class _File(io.BytesIO):
    """The bytes of a picture as Pillow reads them: where it reads on is where it can be stopped."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.scans: np.ndarray | None = None
        """Of a JPEG, places where a scan may begin: none is behind a read before the time was looked at."""
        self._end = time.thread_time() + MAX_SECONDS
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BytesIO`, while there is time; where scans may begin, less than asked for."""
        self._reads += 1
        if self._reads % 16 == 0 or size is None or not 0 <= size < 4096:  # looking takes longer than reading a little
            self.look_at_the_time()
        if self.scans is not None and size is not None and size > 0:
            size = min(size, self._until_scan() or size)
        return super().read(size)

    def look_at_the_time(self) -> None:
        """Raise `_TooLong` where there is none left."""
        if time.thread_time() > self._end:
            raise _TooLong

    def _until_scan(self) -> int:
        """How far it is to the last scan within `_STEP` bytes, or the next one; 0: there is none."""
        assert self.scans is not None
        place = self.tell()
        # Never in the midst of a scan that could be read whole: arithmetic coding cannot wait for the rest of one.
        first, beyond = (int(found) for found in np.searchsorted(self.scans, (place, place + _STEP)))
        return 0 if first == len(self.scans) else int(self.scans[max(first, beyond - 1)]) + len(_SCAN) - place


class _Directory(TiffImagePlugin.ImageFileDirectory_v2):
    """What Pillow reads a directory of TIFF or EXIF with, so that one cannot name the same bytes again and again.

    65,535 entries may each have all of the file as their value: 2 MB that fill any memory.
    """

    is_bounded = True

    def load(self, fp: IO[bytes]) -> None:
        """As Pillow's. Behind as many bytes as there are the directory counts as broken, which ends it."""
        super().load(_Once(fp))  # type: ignore[arg-type]


class _Once:
    """A file of which no more can be read than it holds, and a little."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek
        here = file.tell()
        self._left = file.seek(0, io.SEEK_END) + 2**16
        file.seek(here)

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise OSError("its entries overlap")
        self._left -= size
        return self._file.read(size)


if not hasattr(TiffImagePlugin.ImageFileDirectory_v2, "is_bounded"):
    TiffImagePlugin.ImageFileDirectory_v2 = _Directory  # type: ignore[misc]


def _prepare(file: _File, size: int) -> np.ndarray:
    with _open(file) as decoded:
        orientation = _decode(decoded, size)
        file.look_at_the_time()
        picture = _canonical(decoded)
        if picture is not decoded:
            decoded.close()  # resizing needs memory of its own
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return np.asarray(picture)


def _open(file: _File) -> Image.Image:
    """Read the header alone; refuse what is no picture or makes too much work."""
    data = file.getvalue()
    if data.startswith((b"II", b"MM")):
        _check_parts(data)
    try:
        picture = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("image_too_large", f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        if not data.startswith(_SIGNATURES):
            raise PictureError("image_unsupported", f"not a picture in one of {', '.join(FORMATS)}") from error
        raise
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PictureError("image_too_large", f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    if picture.format in ("JPEG", "MPO"):
        file.scans = _likely_scans(data)
        most = min(MAX_SCANS, MAX_SCANNED // (width * height))
        if len(file.scans) > most and _scans(file, most) > most:
            raise PictureError("image_too_large", f"{width} x {height} in more than {most} scans")
    return picture


def _likely_scans(data: bytes) -> np.ndarray:
    """Where a JPEG has scans, or what only looks like one: found without reading it, a thousand times as fast."""
    # At even and at odd places, as numbers of two bytes; `bytes.find` would take a twelfth of the time of decoding.
    pairs = [np.frombuffer(data, np.uint16, (len(data) - first) // 2, first) for first in (0, 1)]
    return np.sort(np.concatenate([2 * np.flatnonzero(each == _SCAN_PAIR) + i for i, each in enumerate(pairs)]))


def _scans(file: _File, most: int) -> int:
    """Scans of the first picture of a JPEG file, as the decoder finds them, counted up to one more than `most`."""
    data = file.getvalue()
    count, position = 0, 2
    while count <= most and (marker := _MARKER.search(data, position)) and marker[1] != _END_OF_PICTURE:
        file.look_at_the_time()
        count += marker[1] == _START_OF_SCAN
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return count


def _check_parts(data: bytes) -> None:
    """Refuse a TIFF whose strips or tiles make more work than its pixels and bytes would.

    They may lie on top of each other in the file, and tiles may reach far out of the picture. What no directory can be
    read from is left to Pillow, which says what is wrong.
    """
    try:
        tags = _tags(data)
    except struct.error:
        return
    if max(count for tag in (*_PARTS, *_PART_SIZES) for count, _ in tags.get(tag, [(0, 0)])) > MAX_PARTS:
        raise PictureError("image_too_large", f"more than {MAX_PARTS:,} strips or tiles")
    sizes = sum(total for tag in _PART_SIZES for _, total in tags.get(tag, []))
    # Without compression nothing reads the sizes, and some are wrong.
    if sizes > 2 * len(data) + 2**16 and any(total != 1 for _, total in tags.get(_COMPRESSION, [])):
        raise PictureError("image_too_large", "its strips or tiles overlap in the file")
    width, height, across, down = (max([total for _, total in tags.get(tag, [])], default=0) for tag in _SIDES)
    tiles = -(-width // across) * -(-height // down) if across and down else 0
    if across * down > MAX_PIXELS or tiles * across * down > 8 * MAX_PIXELS:
        raise PictureError("image_too_large", f"tiles of {across} x {down} for {width} x {height} pixels")


def _tags(data: bytes) -> dict[int, list[tuple[int, int]]]:
    """Of each tag of a TIFF's first directory that decides how much work it makes, each time: values and their sum.

    Raises:
        struct.error: there is no such directory.
    """
    order = "<" if data.startswith(b"II") else ">"
    pointer, number, entry, inline = ("Q", "Q", "HHQ", 8) if 43 in data[2:4] else ("I", "H", "HHI", 4)
    (start,) = struct.unpack_from(order + pointer, data, inline)
    (entries,) = struct.unpack_from(order + number, data, start)
    start += struct.calcsize(number)
    found: dict[int, list[tuple[int, int]]] = {}
    step = struct.calcsize(order + entry) + inline
    for place in range(start, min(start + entries * step, len(data) - step + 1), step):
        tag, kind, count = struct.unpack_from(order + entry, data, place)
        if tag in _TAGS and kind in _TIFF_TYPES:
            values = place + step - inline
            numbers = np.dtype(order + _TIFF_TYPES[kind])
            if count * numbers.itemsize > inline:
                (values,) = struct.unpack_from(order + pointer, data, values)
            there = max(0, min(count, (len(data) - values) // numbers.itemsize))
            each = np.frombuffer(data, numbers, there, values if there else 0)
            most = len(data) if tag in _PART_SIZES else 2**32  # what is not there cannot be read
            found.setdefault(tag, []).append((there, int(each[each <= most].sum(dtype=float))))
    return found


def _decode(picture: Image.Image, size: int) -> int:
    """Decode the pixels in place; return the EXIF orientation (1 to 8) that is still to be applied."""
    picture.draft(None, (size, size))
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(b"", error) from error
    try:  # After load(): Pillow turns a TIFF upright itself while loading, and then drops the tag.
        return int(picture.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return 1


def _broken(data: bytes, error: Exception) -> PictureError:
    message = str(error).lower()
    if "memory" in message or message.endswith("error -9"):  # as Pillow's decoders say it
        return PictureError("image_too_large", "there is no memory to decode it")
    riff_length = int.from_bytes(data[4:8], "little") + 8 if data.startswith(b"RIFF") else 0
    if isinstance(error, EOFError) or "truncated" in message or len(data) < riff_length:
        return PictureError("image_truncated", "the file ends before the picture does")
    return PictureError("image_corrupt", "the file is damaged and cannot be decoded")


def _canonical(picture: Image.Image) -> Image.Image:
    """Bring any mode to L, RGB or RGBA as the table above says."""
    mode = picture.mode
    try:
        if picture.has_transparency_data:
            if mode == "RGBA":
                return picture  # `convert` would copy it
            return picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        if mode in ("L", "RGB"):
            return picture
        if mode.startswith("I"):
            return _grey(picture, _of_integers)
        if mode == "F":
            return _grey(picture, _of_floats)
        if mode == "LAB":
            return _from_lab(picture)
        return picture.convert("L" if mode == "1" else "RGB")
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        raise PictureError("image_unsupported", f"pixels of mode {mode} cannot be converted to RGB") from error
    except AssertionError as error:
        # Pillow's, for a palette picture without a palette. Anything but a PictureError would fail the whole batch.
        raise _broken(b"", error) from error


def _grey(picture: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> Image.Image:
    """An L picture, converted a piece at a time: the numbers between are four times as large as the picture."""
    width, height = picture.size
    grey = np.empty((height, width), np.uint8)
    across = min(width, _PIECE)
    down = max(1, _PIECE // width)
    for left in range(0, width, across):
        for top in range(0, height, down):
            right, bottom = min(left + across, width), min(top + down, height)
            grey[top:bottom, left:right] = convert(picture.crop((left, top, right, bottom)))
    return Image.fromarray(grey)


def _of_integers(picture: Image.Image) -> np.ndarray:
    samples = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)
    return ((samples * 255 + 32767) // 65535).astype(np.uint8)


def _of_floats(picture: Image.Image) -> np.ndarray:
    samples = np.nan_to_num(np.asarray(picture, dtype=np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(samples, 0.0, 1.0) * 255).astype(np.uint8)


def _from_lab(picture: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None  # None is only returned for in-place conversion
    return converted
