"""Preprocessing: every format and mode has one documented outcome, and nothing unreadable gets through."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.conftest import EXAMPLES, ROOT
from tests.fuzzing import handmade
from tests.offline import PREPROCESSING

PictureError = PREPROCESSING.PictureError


def preprocess(data: bytes, size: int = 224) -> np.ndarray:
    return np.asarray(PREPROCESSING.preprocess(data, size))


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def quadrants(size: int = 64) -> Image.Image:
    """Red, green / blue, white: no two orientations look the same."""
    picture = Image.new("RGB", (size, size), "white")
    half = size // 2
    for colour, corner in (((255, 0, 0), (0, 0)), ((0, 255, 0), (half, 0)), ((0, 0, 255), (0, half))):
        picture.paste(colour, (*corner, corner[0] + half, corner[1] + half))
    return picture


def colour_at(pixels: np.ndarray, row: float, column: float) -> tuple[int, ...]:
    return tuple(int(v) for v in pixels[int(row * len(pixels)), int(column * len(pixels))])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_gives_the_same_picture(kind: str) -> None:
    picture = Image.open(EXAMPLES[0]).resize((300, 300))
    pixels = preprocess(encode(picture, kind))
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    tolerance = {"PNG": 0, "BMP": 0, "TIFF": 0, "GIF": 8}.get(kind, 3)
    assert np.abs(pixels.astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("P", 0, (200, 10, 60)),
        ("RGB", (200, 10, 60), (200, 10, 60)),
        ("RGBA", (200, 10, 60, 255), (200, 10, 60)),
        ("RGBA", (200, 10, 60, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (40, 255), (40, 40, 40)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I", 257 * 100, (100, 100, 100)),
        ("I", -5, (0, 0, 0)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 7.0, (255, 255, 255)),
        ("F", float("nan"), (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb_as_documented(mode: str, colour: object, expected: tuple[int, ...]) -> None:
    picture = Image.new(mode, (40, 30), colour)
    if mode == "P":
        picture.putpalette([200, 10, 60])
    pixels = preprocess(encode(picture, "TIFF" if mode not in ("P", "1") else "PNG"))
    assert np.abs(pixels.reshape(-1, 3).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    picture = Image.new(mode, (20, 20), 0)
    if mode == "P":
        picture.putpalette([9, 9, 9])
    transparent = (0, 0, 0) if mode == "RGB" else 0
    assert (preprocess(encode(picture, transparency=transparent)) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    """A camera stores the scene turned; whatever way it did, we see the scene upright."""
    stored_as = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = quadrants() if stored_as is None else quadrants().transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    pixels = preprocess(encode(stored, kind, exif=exif, **options))
    for place, expected in (((0.25, 0.25), (255, 0, 0)), ((0.25, 0.75), (0, 255, 0)), ((0.75, 0.25), (0, 0, 255))):
        assert np.abs(np.subtract(colour_at(pixels, *place), expected)).max() < 30


def test_a_broken_exif_block_counts_as_upright() -> None:
    exif = b"Exif\0\0" + b"\xff" * 40
    assert colour_at(preprocess(encode(quadrants(), "JPEG", quality=95, exif=exif)), 0.25, 0.25)[0] > 200


def test_an_orientation_out_of_range_counts_as_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert colour_at(preprocess(encode(quadrants(), "JPEG", quality=95, exif=exif)), 0.25, 0.25)[0] > 200


def test_the_first_picture_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        pixels = preprocess(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert colour_at(pixels, 0.5, 0.5)[0] > 200


def test_sides_are_stretched_on_their_own() -> None:
    wide = quadrants(64).resize((400, 50))
    assert colour_at(preprocess(encode(wide)), 0.25, 0.75) == (0, 255, 0)


def test_jpeg_is_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    preprocess(encode(Image.new("RGB", (4000, 3000), "grey"), "JPEG"))
    assert decoded[0] == (500, 375)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_odd_sizes_work(size: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        assert preprocess(encode(Image.new("RGB", size, "grey"), kind)).shape == (224, 224, 3)


def test_the_result_is_the_same_twice(jpeg: bytes) -> None:
    assert (preprocess(jpeg) == preprocess(jpeg)).all()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("parcel-damaged.jpg", "14ea600f3d9f57e11c26bac3f4d4538964a7d6e0f7f3522beecdd1145e78a650"),
        ("parcel-intact.jpg", "31cc0ec78b0bdf15c75de2a6467e75905945d44409bc6b6fb9dd52853e77f3bb"),
    ],
)
def test_a_new_decoder_cannot_drift_unnoticed(name: str, digest: str) -> None:
    """Pinned: a library that decodes or scales differently is a change of the pipeline, and needs a new number."""
    assert hashlib.sha256(preprocess((ROOT / "examples" / name).read_bytes()).tobytes()).hexdigest() == digest


# ---- what cannot be used ----


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing: a bomb costs its sender a few bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 2**20) + b"IDAT" + zlib.compress(bytes(1000))


def with_scans(side: int, more: int) -> bytes:
    """A progressive JPEG that repeats its last scan, of a few bytes: each costs a pass over the whole picture."""
    jpeg = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * more + jpeg[-2:]


def bad_pictures() -> dict[str, tuple[str, bytes]]:
    good = encode(Image.open(EXAMPLES[0]), "JPEG")
    webp = encode(Image.open(EXAMPLES[0]), "WEBP")
    return {
        "no bytes": ("image_empty", b""),
        "text": ("image_unsupported", b"this is no picture"),
        "zeros": ("image_unsupported", bytes(1000)),
        "PDF": ("image_unsupported", b"%PDF-1.7\n" + bytes(200)),
        "SVG": ("image_unsupported", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "ICO, which is not taken": ("image_unsupported", encode(Image.new("RGB", (16, 16)), "ICO")),
        "half a JPEG": ("image_truncated", good[: len(good) // 2]),
        "a JPEG without its last bytes": ("image_truncated", good[:-200]),
        "half a PNG": ("image_truncated", encode(Image.open(EXAMPLES[0]))[:20000]),
        "half a WebP": ("image_truncated", webp[: len(webp) // 2]),
        "a JPEG header": ("image_corrupt", good[:20]),
        "a PNG signature": ("image_corrupt", b"\x89PNG\r\n\x1a\n"),
        "a bomb of 100 megapixels": ("image_too_large", png_header(10_000, 10_000)),
        "a bomb of 4 gigapixels": ("image_too_large", png_header(65_535, 65_535)),
        "a bomb of 2,000 scans": ("image_too_large", with_scans(64, 2000)),
        "a palette picture without a palette": ("image_corrupt", handmade.png(8, 8, bytes(9 * 8), colour=3)),
    }


@pytest.mark.parametrize("case", bad_pictures())
def test_an_unusable_picture_has_a_code(case: str) -> None:
    code, data = bad_pictures()[case]
    with pytest.raises(PictureError) as caught:
        preprocess(data)
    assert caught.value.code == code
    assert caught.value.code in PictureError.CODES


def test_pixels_are_limited_before_decoding() -> None:
    """At the limit it is decoded; one column more, and it is refused though it is a complete picture."""
    side = 7071
    assert side * side <= PREPROCESSING.MAX_PIXELS < side * (side + 1)
    assert preprocess(encode(Image.new("1", (side, side)), "PNG")).shape == (224, 224, 3)
    with pytest.raises(PictureError, match="image_too_large"):
        preprocess(encode(Image.new("1", (side + 1, side)), "PNG"))


def test_scans_are_limited_by_the_work_they_make() -> None:
    """A few more than usual are decoded; the larger the picture, the fewer may be."""
    assert preprocess(with_scans(64, 900)).shape == (224, 224, 3)
    assert preprocess(with_scans(2500, 100)).shape == (224, 224, 3)
    with pytest.raises(PictureError, match="in more than 160 scans"):
        preprocess(with_scans(2500, 200))


def test_what_only_looks_like_scans_is_none() -> None:
    """Behind the picture, or inside a block of metadata, as the thumbnail of a camera is."""
    marker = b"\xff\xda\0\2" * 2000
    jpeg = encode(quadrants(), "JPEG", comment=marker, quality=95)
    assert (preprocess(jpeg + marker) == preprocess(encode(quadrants(), "JPEG", quality=95))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_no_mutation_raises_anything_else(kind: str) -> None:
    """Flipped, cut and doubled bytes: a picture or a `PictureError`, never another exception."""
    original = encode(Image.open(EXAMPLES[0]).resize((64, 64)), kind)
    chance = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(original)
        for position in chance.integers(0, len(data), chance.integers(1, 20)):
            data[position] = chance.integers(256)
        if chance.random() < 0.3:
            data = data[: chance.integers(len(data))]
        with contextlib.suppress(PictureError):
            assert preprocess(bytes(data)).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "model_repository").glob("*/*/*.py")), ids=lambda p: "/".join(p.parts[-3:])
)
def test_the_steps_run_on_the_python_of_nvidias_image(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))
