"""The bytes of a picture -> the uint8 tensor that the classifier was trained on.

This one file is run by Triton (`model.py` beside it), by training, by evaluation and by the release
check, so a served picture cannot be prepared differently from a training picture. It imports nothing
of the project, keeps no state, and runs on Python 3.10 (NVIDIA's 24.10 image) and later.

The steps, in order:

1. Recognise the format from the header (`FORMATS`), and refuse more than `MAX_PIXELS`, a JPEG of more than
   `MAX_SCANNED`, or a TIFF in parts that make more work than its pixels, before decoding. What is recognised and not
   taken is named. What a PNG has beside its pixels is left out unread, whatever is wrong with it.
2. Decode. JPEG is decoded at the smallest DCT scale (1/1, 1/2, 1/4, 1/8) that is not below the target,
   which costs a fraction of a full decode. Of an animation or a multi-page file, the first picture counts; what it
   leaves uncovered is white. A JPEG whose rows are all there needs no end marker. An AVIF is decoded in a process of
   its own, because that is done in one go and nothing else could stop it.
3. Bring every Pillow mode to L, RGB or RGBA:

   =============================  ==========================================================================
   mode                           becomes
   =============================  ==========================================================================
   1, L, P, RGB, RGBX, HSV        L or RGB, as Pillow converts them
   CMYK, YCbCr                    RGB by Pillow's formula; embedded colour profiles are not applied
   LAB                            RGB, through the sRGB profile
   LA, La, PA, RGBA, RGBa         RGBA; alpha that is 0 everywhere in a BMP counts as unused
   1, L, P, RGB with a            RGBA
   transparent colour (tRNS)
   I;16, I;16L, I;16B, I;16N      L, 0..65535 scaled to 0..255; RGBA with a transparent value
   I                              L, numbers up to 255 as such, else as I;16, negative ones as 0; beyond
                                  -65535..65535 it is refused
   F                              L, clipped to 0..1 and scaled to 0..255; what is not a number becomes 0. Whole
                                  numbers up to 255, or 65535, are scaled as such; all else beyond -1..2 is refused
   =============================  ==========================================================================

4. Stretch to a square with an antialiased bilinear filter. The sides are scaled on their own, because
   the training pictures were stretched to squares.
5. Lay what is transparent on white.
6. Turn upright as the EXIF orientation says (of a PNG: the one in eXIf). An unreadable EXIF block counts as "upright".

Whatever the file is, it is abandoned after `MAX_SECONDS` of a processor's time, where Pillow reads on the next time.
"""

from __future__ import annotations

import io
import os
import re
import resource
import select
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

import numpy as np
from PIL import AvifImagePlugin, Image, ImageCms, TiffImagePlugin

MAX_PIXELS = 52_000_000
"""Width x height above which a picture is refused unread. What is sold as 50 megapixels has up to 51.3: 8160 x 6144 in
phones, 8272 x 6200 in cameras."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Width x height x scans above which a JPEG is refused unread; so are more than `MAX_SCANS`. Each scan is decoded
over the whole picture, and may be a few bytes long: without a limit, 20 MB would keep a processor for hours."""

MAX_SCANS = 1000
"""A progressive JPEG has about ten."""

MAX_PARTS = MAX_PIXELS // 16**2
"""Strips or tiles of a TIFF: the largest picture in the smallest tiles. More are refused unread."""

MAX_SECONDS = 5.0
"""Processor time after which a picture is abandoned: twice what decoding the dearest sound one takes. It is looked at
between two reads of the file, so what a decoder does in one go comes on top: docs/operations.md has the figures. It is
the processor's time, not the clock's, so that no picture is refused because others keep the machine busy."""

MAX_APART = 2**30
"""Bytes of memory that the process of an AVIF may take beside what it begins with."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow's names of what is decoded. JPEG includes MPO, the several pictures in one .jpg of many phones."""

Image.init()  # register the plugins now, so that the first request does not pay for it
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one picture is not to take every processor

_Any = TypeVar("_Any")

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (b"\xff\xd8\xff", _PNG, b"RIFF", b"BM", b"GIF8", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_OTHERS = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"RIFF....WAVE", "a WAV sound"),
        (rb"RIFF....AVI ", "an AVI video"),
        (rb"RIFF....(?!WEBP)[^\0]{4}", "a RIFF file without a picture"),
        (rb"\x89PNG\r\n\x1a\n....CgBI", "a PNG of Apple's own kind (CgBI): convert it to a plain one"),
        (rb"....ftypcrx ", "a raw CR3 file"),
        (rb"....ftyp(?!.{0,200}avi[fs])(?=.{0,200}(hei[cxms]|hev[cxms]))", "HEIC: convert it to JPEG"),
        (rb"....ftyp(?!.{0,200}avi[fs])", "a video or another MP4 file"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
        (rb"%PDF", "PDF"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
        (rb"\0\0[\x02\x0a]\0{5}", "TGA"),
        (rb"\0\0[\x01\x02]\0", "ICO"),
        (rb"8BPS", "a Photoshop file"),
        (rb"gimp xcf", "a GIMP file"),
        (rb"DDS |qoif|FLIF|BPG\xfb|#\?RADIANCE|v/1\x01|P[1-7]\s|SIMPLE  =", "a picture in a rare format"),
        (rb"IIR[OS]|IIU\0|FUJIFILM|FOVb", "a raw file of a camera"),
        (rb".{128}DICM", "DICOM"),
        (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive, or compressed"),
        (rb"\x1aE\xdf\xa3|OggS|FLV\x01|\0\0\x01\xba", "a video"),
        (rb"ID3|fLaC", "a sound"),
        (rb"(?i:(\xef\xbb\xbf)?\s{0,99}(<svg|<\?xml.{0,900}<svg))", "SVG"),
        (rb"(?i:(\xef\xbb\xbf)?\s{0,99}<(!doctype html|html))", "an HTML page"),
        (rb"/9j/|iVBORw0KGgo|data:", "text that stands for a picture (base64): send the bytes"),
    )
)
"""How what is not taken begins, and its name."""
_FRAMES = {
    0xC3: "lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    0xCB: "lossless JPEG",
    0xF7: "JPEG-LS",
}
"""Kinds of JPEG that hardly anything writes or reads, by the marker of their frame."""
_START_OF_SCAN, _END_OF_PICTURE = b"\xda", b"\xd9"
_SCAN = b"\xff" + _START_OF_SCAN
_SCAN_PAIR = np.frombuffer(_SCAN, np.uint16)[0]
_MARKER = re.compile(rb"\xff([^\x00-\xbf\xd0-\xd8\xff])")
"""Of a JPEG, the next one that a length follows, or the end. Stuffed zeros, restarts and what else stands alone do not
count, nor does what the decoder passes over while it looks for a restart."""
_BEHIND_SCAN = re.compile(rb"\xff(?![\x00\xd0-\xd7\xff])|\xff\Z")
_MORE_SCAN = b"".join(bytes(range(1, 250)) * 2 + bytes((0xFF, 0xD0 + i % 8)) for i in range(16))
"""What a JPEG's scan might go on with: anything, and every restart."""
_STEP = 256
"""Bytes of a JPEG that the decoder gets at once where scans follow each other closely: 25 of them."""
_COMPRESSION, _PARTS, _PART_SIZES, _SIDES = 259, (273, 324), (279, 325), (256, 257, 322, 323)
_SMALL_TILES = 2**22
"""Pixels that the tiles of a small picture may have together: all are decoded in one go, however far out they lie."""
_JPEG_IN_TIFF = {6, 7}
"""Compressions whose strips or tiles are JPEGs, of many scans perhaps."""
_ROWS = 278
"""Of a TIFF: rows of a strip."""
_TAGS = {_ROWS, _COMPRESSION, *_PARTS, *_PART_SIZES, *_SIDES}
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

    `image_empty`: no bytes. `image_unsupported`: in none of `FORMATS`, or of a kind of one that is not taken; the file
    may be sound. `image_truncated`: the file ends early. `image_corrupt`: of a known format, but broken.
    `image_too_large`: over `MAX_PIXELS`, `MAX_SCANNED` or another of the limits above, or there is no memory for it.
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
    file = _File(data)
    if data.startswith(_PNG):
        file = _guarded(file, lambda: file.instead(_pixels_of_png(file)))
    prepare = _apart if _is_avif(data) else _prepare
    try:
        return _guarded(file, lambda: prepare(file, size))
    except PictureError as error:
        whole = _whole_scan(data) if error.code in ("image_truncated", "image_corrupt") else None
        if whole is None:
            raise
        # Every row is there if it does not matter what follows.
        ended, longer = (file.instead(whole + more + b"\xff" + _END_OF_PICTURE) for more in (b"", _MORE_SCAN))
        pixels = _guarded(ended, lambda: _prepare(ended, size))
        if not np.array_equal(pixels, _guarded(longer, lambda: _prepare(longer, size))):
            raise PictureError("image_truncated", "the file ends before the picture does") from error
        return pixels


def _guarded(file: _File, work: Callable[[], _Any]) -> _Any:
    """The outcome of some work on a file; whatever it raises becomes a `PictureError`."""
    try:
        return work()
    except _TooLong as error:
        raise PictureError("image_too_large", f"decoding takes longer than {MAX_SECONDS:g} s") from error
    except MemoryError as error:
        raise PictureError("image_too_large", "there is no memory to decode it") from error
    except PictureError:
        raise
    except Exception as error:
        raise _broken(file, error) from error


class _TooLong(BaseException):
    """Decoding does. No `Exception`, because Pillow takes some of those for damage that it can live with."""


class _File(io.BytesIO):
    """The bytes of a picture as Pillow reads them: where it reads on is where it can be stopped."""

    def __init__(self, data: bytes, end: float | None = None) -> None:
        super().__init__(data)
        self.scans: np.ndarray | None = None
        """Of a JPEG, places where a scan may begin: none is behind a read before the time was looked at."""
        self.is_short = False
        """Whether more was asked for than there is."""
        self._end = time.thread_time() + MAX_SECONDS if end is None else end
        self._reads = 0

    def instead(self, data: bytes) -> _File:
        """Other bytes, for which there is no more time than for these."""
        return _File(data, self._end)

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BytesIO`, while there is time; where scans may begin, less than asked for."""
        self._reads += 1
        if self._reads % 16 == 0 or size is None or not 0 <= size < 4096:  # looking takes longer than reading a little
            self.look_at_the_time()
        if self.scans is not None and size is not None and size > 0:
            size = min(size, self._until_scan() or size)
        found = super().read(size)
        if size is not None and len(found) < size and (not found or size < 4096):  # decoders ask for more than that
            self.is_short = True
        return found

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
        covered = _covered(decoded, file.getvalue())
        orientation = _decode(decoded, size)
        file.look_at_the_time()
        picture = _canonical(decoded, file.getvalue())
        if picture is not decoded:
            decoded.close()  # resizing needs memory of its own
        if covered:
            _uncover(picture, covered)
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return np.asarray(picture)


def _is_avif(data: bytes) -> bool:
    length = int.from_bytes(data[:4], "big")
    return data[4:8] == b"ftyp" and any(data[i : i + 4] in (b"avif", b"avis") for i in range(8, min(length, 256), 4))


def _apart(file: _File, size: int) -> np.ndarray:
    """As `_prepare`, in a process of its own that has a limit of processor time and memory, and that may crash."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            _limit_this_process()
            try:
                answer = b"+" + _guarded(file, lambda: _prepare(file, size)).tobytes()
            except PictureError as error:
                answer = b"-" + str(error).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
            status = 0
        finally:
            os._exit(status)  # whatever happens: there is only one of everything else that this process seems to be
    os.close(writing)
    answer = b""
    try:
        with os.fdopen(reading, "rb") as pipe:
            end = time.monotonic() + 20 * MAX_SECONDS  # should it not even run
            while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                if not (piece := os.read(pipe.fileno(), 2**16)):
                    break
                answer += piece
    finally:
        if not answer:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer[:1] == b"+":
        return np.frombuffer(answer, np.uint8, offset=1).reshape(size, size, 3)
    if answer:
        code, _, detail = answer[1:].decode().partition(": ")
        raise PictureError(code, detail)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGXCPU:
        raise PictureError("image_corrupt", "the file is damaged and cannot be decoded")
    raise _TooLong


def _limit_this_process() -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + MAX_APART
    for limit, wanted in ((resource.RLIMIT_CPU, max(1, round(MAX_SECONDS))), (resource.RLIMIT_AS, size)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _open(file: _File) -> Image.Image:
    """Read the header alone; refuse what is no picture or makes too much work."""
    data = file.getvalue()
    if data.startswith((b"II", b"MM")):
        _check_parts(data)
    try:
        picture = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("image_too_large", f"more than {MAX_PIXELS:,} pixels") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PictureError("image_too_large", f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    if picture.format in ("JPEG", "MPO"):
        file.scans = _likely_scans(data)
        most = min(MAX_SCANS, MAX_SCANNED // (width * height))
        if len(file.scans) > most and _scans(file, most) > most:
            raise PictureError("image_too_large", f"{width} x {height} in more than {most} scans")
    return picture


def _pixels_of_png(file: _File) -> bytes:
    """A PNG without what its pixels do not need, which may be large, inflate to anything, or be damaged."""
    data = file.getvalue()
    view = memoryview(data)
    kept, start, place = [], 0, len(_PNG)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        behind = place + 12 + length
        if behind > len(data) or kind == b"IEND":
            break
        if kind[0] & 32 and not (
            kind in (b"tRNS", b"eXIf")
            and zlib.crc32(view[place + 4 : behind - 4]).to_bytes(4, "big") == view[behind - 4 : behind]
        ):
            kept.append(view[start:place])
            start = behind
            if len(kept) % 1024 == 0:
                file.look_at_the_time()
        place = behind
    return b"".join([*kept, view[start:]]) if kept else data


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers of a JPEG, and where their contents begin, up to that of the first scan."""
    place, marker = 2, 0
    while marker != _START_OF_SCAN[0] and (found := _MARKER.search(data, place)):
        marker, place = found[1][0], found.end()
        yield marker, place
        place += max(2, int.from_bytes(data[place : place + 2], "big"))


def _whole_scan(data: bytes) -> bytes | None:
    """A JPEG up to the end of its only scan, where one may hold all of a picture; else None."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    components = 0
    for marker, place in _segments(data):
        if marker in (0xC0, 0xC1):
            components = data[place + 7] if place + 7 < len(data) else 0
        if marker == _START_OF_SCAN[0] and components and data[place + 2 : place + 3] == bytes([components]):
            behind = _BEHIND_SCAN.search(data, place + 2 + 2 * components)
            return data[: behind.start()] if behind else data
    return None


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
    if across * down > MAX_PIXELS or tiles * across * down > max(2 * width * height, _SMALL_TILES):
        raise PictureError("image_too_large", f"tiles of {across} x {down} for {width} x {height} pixels")
    compressions = {total for _, total in tags.get(_COMPRESSION, [])}
    rows = max((total for _, total in tags.get(_ROWS, [])), default=0) or height
    part = across * down or width * min(rows, height)
    if compressions & _JPEG_IN_TIFF and len(_likely_scans(data)) * part > MAX_SCANNED:
        raise PictureError("image_too_large", "too many scans for its strips or tiles")


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
    picture.load()
    try:  # After load(): Pillow turns a TIFF upright itself while loading, and then drops the tag.
        return int(picture.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return 1


def _broken(file: _File, error: Exception) -> PictureError:
    """What is wrong with a file that Pillow does not decode."""
    data = file.getvalue()
    message = str(error).lower()
    if "memory" in message or message.endswith("error -9"):  # as Pillow's decoders say it
        return PictureError("image_too_large", "there is no memory to decode it")
    if (kind := _unsupported(file, error)) is not None:
        return PictureError("image_unsupported", f"{kind}; taken are {', '.join(FORMATS)}")
    if isinstance(error, EOFError) or "truncated" in message or len(data) < _length(data) or file.is_short:
        return PictureError("image_truncated", "the file ends before the picture does")
    return PictureError("image_corrupt", "the file is damaged and cannot be decoded")


def _length(data: bytes) -> int:
    """How long a WebP or an AVIF says that it is at least; 0: no such file."""
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8
    place, length = 0, int.from_bytes(data[:4], "big") * _is_avif(data)
    while length >= 8 and place + length <= len(data):
        place += length
        length = int.from_bytes(data[place : place + 4], "big")
    return place + length


def _unsupported(file: _File, error: Exception) -> str | None:
    """What kind of file this is, where it is none that is taken; None: it is one, and something is wrong with it."""
    data = file.getvalue()
    for pattern, name in _OTHERS:
        if pattern.match(data):
            return name
    if not data.startswith(_SIGNATURES) and not _is_avif(data):
        return "not a picture in a known format"
    if data.startswith(b"\xff\xd8\xff"):
        return _unsupported_jpeg(data)
    if data.startswith((b"II", b"MM")):
        try:
            compression = max((total for _, total in _tags(data).get(_COMPRESSION, [])), default=1)
            if compression not in TiffImagePlugin.COMPRESSION_INFO:
                return f"a TIFF of a rare kind (compression {compression})"
            TiffImagePlugin.TiffImageFile(io.BytesIO(data)).close()
        except Exception as reason:  # Pillow's, which it kept to itself
            error = reason
    message = str(error)
    if file.is_short:
        return None
    # Pillow says so of bit fields, depths and compressions of a BMP, and of modes and compressions of a TIFF.
    if re.search("unsupported|unknown pixel mode|unknown data organization|not available", message, re.IGNORECASE):
        return f"a {'BMP' if data.startswith(b'BM') else 'TIFF'} of a rare kind ({message})"
    return None


def _unsupported_jpeg(data: bytes) -> str | None:
    for marker, place in _segments(data):
        if marker in _FRAMES:
            return _FRAMES[marker]
        if marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) and len(data) > place + 7:
            bits, components = data[place + 2], data[place + 7]
            if bits != 8:
                return f"a JPEG of {bits} bits a sample, not 8"
            if components not in (1, 3, 4):
                return f"a JPEG of {components} components"
    return None


def _covered(picture: Image.Image, data: bytes) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the first frame of an animation, where that is not all of the picture."""
    box = None
    if picture.format == "GIF" and picture.tile:
        box = picture.tile[0].extents
    elif picture.format == "WEBP" and (frame := data.find(b"ANMF", 12, 2**20)) > 0 and data[12:16] == b"VP8X":
        left, top, across, down = (
            int.from_bytes(data[frame + place : frame + place + 3], "little") for place in (8, 11, 14, 17)
        )
        box = (2 * left, 2 * top, 2 * left + across + 1, 2 * top + down + 1)
    return box if box != (0, 0, *picture.size) else None


def _uncover(picture: Image.Image, covered: tuple[int, int, int, int]) -> None:
    """Make white what the first frame of an animation does not cover, in place."""
    (left, top, right, bottom), (width, height) = covered, picture.size
    for box in ((0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom), (right, top, width, bottom)):
        if box[0] < box[2] and box[1] < box[3]:
            picture.paste("white", box)


def _canonical(picture: Image.Image, data: bytes = b"") -> Image.Image:
    """Bring any mode to L, RGB or RGBA as the table above says."""
    mode = picture.mode
    try:
        if picture.format == "PNG" and "transparency" in picture.info:
            if mode.startswith("I"):
                return _grey_with_transparent(picture, picture.info["transparency"])
            picture.info["transparency"] = _in_8_bits(picture.info["transparency"], mode, data[24])
        if picture.format == "BMP" and mode == "RGBA" and picture.getbbox(alpha_only=True) is None:
            picture.putalpha(255)  # Windows programs leave it 0 in 32 bits
        if picture.has_transparency_data:
            if mode == "RGBA":
                return picture  # `convert` would copy it
            return picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        if mode in ("L", "RGB"):
            return picture
        if mode.startswith("I"):
            white = _scale_of_integers(picture) if mode == "I" else 65535
            return _grey(picture, lambda piece: _of_integers(piece, white))
        if mode == "F":
            scale = _scale_of_floats(picture)
            return _grey(picture, lambda piece: _of_floats(piece, scale))
        if mode == "LAB":
            return _from_lab(picture)
        return picture.convert("L" if mode == "1" else "RGB")
    except PictureError:
        raise
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        raise PictureError("image_unsupported", f"pixels of mode {mode} cannot be converted to RGB") from error
    except AssertionError as error:
        # Pillow's, for a palette picture without a palette. Anything but a PictureError would fail the whole batch.
        raise PictureError("image_corrupt", "the file is damaged and cannot be decoded") from error


def _in_8_bits(transparent: _Any, mode: str, depth: int) -> _Any:
    """A PNG's transparent colour as its pixels are after decoding; it is given in the depth of the file."""
    if mode == "L" and depth in (2, 4):
        return transparent * 255 // (2**depth - 1)
    if mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in transparent)
    return transparent


def _pieces(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover a picture: the numbers between its depth and 8 bits are several times as large as it."""
    width, height = picture.size
    across = min(width, _PIECE)
    down = max(1, _PIECE // width)
    for left in range(0, width, across):
        for top in range(0, height, down):
            yield left, top, min(left + across, width), min(top + down, height)


def _grey(picture: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> Image.Image:
    """An L picture, converted a piece at a time."""
    grey = np.empty((picture.height, picture.width), np.uint8)
    for box in _pieces(picture):
        left, top, right, bottom = box
        grey[top:bottom, left:right] = convert(picture.crop(box))
    return Image.fromarray(grey)


def _grey_with_transparent(picture: Image.Image, transparent: int) -> Image.Image:
    """An RGBA picture of a grey one of 16 bits, transparent where it has exactly one value."""
    alpha = _grey(picture, lambda piece: np.where(np.asarray(piece) == transparent, 0, 255).astype(np.uint8))
    grey = _grey(picture, _of_integers)
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _scale_of_integers(picture: Image.Image) -> int:
    """The number that is white where a sample has 32 bits: 255 where no number is larger, else 65535."""
    lowest, highest = 0, 0
    for box in _pieces(picture):
        samples = np.asarray(picture.crop(box), dtype=np.int64)
        lowest, highest = min(lowest, int(samples.min())), max(highest, int(samples.max()))
    if highest > 65535 or lowest < -65535:
        worst = max(highest, lowest, key=abs)
        raise PictureError("image_unsupported", f"its numbers reach {worst}: integers of 0 to 65535 are taken")
    return 255 if lowest >= 0 and highest <= 255 else 65535


def _of_integers(picture: Image.Image, white: int = 65535) -> np.ndarray:
    samples = np.asarray(picture, dtype=np.int64)
    return ((np.clip(samples, 0, white) * 255 + white // 2) // white).astype(np.uint8)


def _scale_of_floats(picture: Image.Image) -> int:
    """The number that is white: 1, or 255 or 65535 where only whole numbers up to that occur, and more than 1."""
    lowest, highest, whole = 0.0, 0.0, True
    for box in _pieces(picture):
        samples = np.asarray(picture.crop(box), dtype=np.float32)
        samples = np.where(np.isfinite(samples), samples, np.float32(0))
        lowest, highest = min(lowest, float(samples.min())), max(highest, float(samples.max()))
        whole = whole and bool((samples == np.rint(samples)).all())
    if whole and lowest >= 0 and 1 < highest <= 65535:
        return 255 if highest <= 255 else 65535
    if lowest < -1 or highest > 2:  # a little beyond is what sharpening and resizing leave
        worst = max(highest, lowest, key=abs)
        raise PictureError("image_unsupported", f"its numbers reach {worst:g}: floats of 0 to 1 are taken")
    return 1


def _of_floats(picture: Image.Image, scale: int) -> np.ndarray:
    samples = np.nan_to_num(np.asarray(picture, dtype=np.float32), nan=0.0, posinf=scale, neginf=0.0)
    return np.rint(np.clip(samples, 0.0, scale) * (255 / scale)).astype(np.uint8)


def _from_lab(picture: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None  # None is only returned for in-place conversion
    return converted
