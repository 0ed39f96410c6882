"""The bytes of a picture -> the uint8 tensor that the classifier was trained on.

This one file is run by Triton (`model.py` beside it), by training, by evaluation and by the release
check, so a served picture cannot be prepared differently from a training picture. It imports nothing
of the project, keeps no state, and runs on Python 3.10 (NVIDIA's 24.10 image) and later.

The steps, in order:

1. Recognise the format from the header (`FORMATS`), and refuse more than `MAX_PIXELS`, or a JPEG of more than
   `MAX_SCANNED`, before decoding.
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
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

MAX_PIXELS = 50_000_000
"""Width x height above which a picture is refused unread: four times a 12-megapixel camera frame."""

MAX_SCANNED = 20 * MAX_PIXELS
"""Width x height x scans above which a JPEG is refused unread; so are more than `MAX_SCANS`. Each scan is decoded
over the whole picture, and may be a few bytes long: without a limit, 20 MB would keep a processor for hours."""

MAX_SCANS = 1000
"""A progressive JPEG has about ten."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of what is decoded. JPEG includes MPO, the several pictures in one .jpg of many phones."""

Image.init()  # register the plugins now, so that the first request does not pay for it

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8", b"II*\x00", b"MM\x00*")
_START_OF_SCAN, _END_OF_PICTURE = b"\xda", b"\xd9"
_SCAN = np.frombuffer(b"\xff" + _START_OF_SCAN, np.uint16)[0]
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""Of a JPEG, the next one; in the compressed data of a scan only stuffed zeros and restarts follow an 0xFF."""
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
    early. `image_corrupt`: of a known format, but broken. `image_too_large`: over `MAX_PIXELS` or `MAX_SCANNED`.
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
    with _open(data) as picture:
        orientation = _decode(picture, size)
        picture = _canonical(picture)
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return np.asarray(picture)


def _open(data: bytes) -> Image.Image:
    """Read the header alone; refuse what is no picture or too many pixels."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("image_too_large", f"more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:
        # Only UnidentifiedImageError is documented, but plugins leak whatever their parsers raise.
        if isinstance(error, UnidentifiedImageError) and not data.startswith(_SIGNATURES):
            raise PictureError("image_unsupported", f"not a picture in one of {', '.join(FORMATS)}") from error
        raise _broken(data, error) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PictureError("image_too_large", f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    most = min(MAX_SCANS, MAX_SCANNED // (width * height))
    if picture.format in ("JPEG", "MPO") and _most_scans(data) > most and _scans(data, most) > most:
        raise PictureError("image_too_large", f"{width} x {height} in more than {most} scans")
    return picture


def _most_scans(data: bytes) -> int:
    """Scans of a JPEG file, and what only looks like one: found without reading the file, a thousand times as fast."""
    # At even and at odd places, as numbers of two bytes; `bytes.count` would take a twelfth of the time of decoding.
    pairs = [np.frombuffer(data, np.uint16, (len(data) - first) // 2, first) for first in (0, 1)]
    return sum(int(np.count_nonzero(each == _SCAN)) for each in pairs)


def _scans(data: bytes, most: int) -> int:
    """Scans of the first picture of a JPEG file, counted up to one more than `most`."""
    count, position = 0, 2
    while count <= most and (marker := _MARKER.search(data, position)) and marker[1] != _END_OF_PICTURE:
        count += marker[1] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def _decode(picture: Image.Image, size: int) -> int:
    """Decode the pixels in place; return the EXIF orientation (1 to 8) that is still to be applied."""
    try:
        picture.draft(None, (size, size))
        picture.load()
    except MemoryError as error:
        raise PictureError("image_too_large", "no memory to decode it") from error
    except Exception as error:
        raise _broken(b"", error) from error
    try:  # After load(): Pillow turns a TIFF upright itself while loading, and then drops the tag.
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _broken(data: bytes, error: Exception) -> PictureError:
    riff_length = int.from_bytes(data[4:8], "little") + 8 if data.startswith(b"RIFF") else 0
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or len(data) < riff_length:
        return PictureError("image_truncated", "the file ends before the picture does")
    return PictureError("image_corrupt", "the file is damaged and cannot be decoded")


def _canonical(picture: Image.Image) -> Image.Image:
    """Bring any mode to L, RGB or RGBA as the table above says."""
    mode = picture.mode
    try:
        if picture.has_transparency_data:
            return picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
        if mode in ("L", "RGB"):
            return picture
        if mode.startswith("I"):
            samples = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)
            return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
        if mode == "F":
            samples = np.nan_to_num(np.asarray(picture, dtype=np.float32), nan=0.0, posinf=1.0, neginf=0.0)
            return Image.fromarray(np.rint(np.clip(samples, 0.0, 1.0) * 255).astype(np.uint8))
        if mode == "LAB":
            return _from_lab(picture)
        return picture.convert("L" if mode == "1" else "RGB")
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        raise PictureError("image_unsupported", f"pixels of mode {mode} cannot be converted to RGB") from error
    except AssertionError as error:
        # Pillow's, for a palette picture without a palette. Anything but a PictureError would fail the whole batch.
        raise _broken(b"", error) from error


def _from_lab(picture: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None  # None is only returned for in-place conversion
    return converted
