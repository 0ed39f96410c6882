"""Preprocessing: every format and mode has one documented outcome, and nothing unreadable gets through."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from export import backend, config
from export.steps import REPOSITORY
from tests.conftest import EXAMPLES, ROOT
from tests.fuzzing import bombs, handmade, markers
from tests.fuzzing.seeds import seeds
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
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
        ("I", 200, (200, 200, 200)),
        ("I;16", 200, (1, 1, 1)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 1.5, (255, 255, 255)),
        ("F", 7.0, (7, 7, 7)),
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
        "a JPEG header": ("image_truncated", good[:20]),
        "a PNG signature": ("image_truncated", b"\x89PNG\r\n\x1a\n"),
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
    side = 7211
    assert side * side <= PREPROCESSING.MAX_PIXELS < side * (side + 1)
    assert preprocess(encode(Image.new("1", (side, side)), "PNG")).shape == (224, 224, 3)
    with pytest.raises(PictureError, match="image_too_large"):
        preprocess(encode(Image.new("1", (side + 1, side)), "PNG"))


def test_scans_are_limited_by_the_work_they_make() -> None:
    """A few more than usual are decoded; the larger the picture, the fewer may be."""
    assert preprocess(with_scans(64, 900)).shape == (224, 224, 3)
    assert preprocess(with_scans(2500, 100)).shape == (224, 224, 3)
    with pytest.raises(PictureError, match="in more than 166 scans"):
        preprocess(with_scans(2500, 200))


def test_what_only_looks_like_scans_is_none() -> None:
    """Behind the picture, or inside a block of metadata, as the thumbnail of a camera is."""
    marker = b"\xff\xda\0\2" * 2000
    jpeg = encode(quadrants(), "JPEG", comment=marker, quality=95)
    assert (preprocess(jpeg + marker) == preprocess(encode(quadrants(), "JPEG", quality=95))).all()


def test_scans_are_counted_as_the_decoder_finds_them() -> None:
    """Seen by what each of them leaves in the pixels, whatever lies between them."""
    seen = 0
    for number in range(200):
        for data in markers.jpegs(random.Random(number)):
            if (scans := markers.decoded(data)) is not None:
                assert PREPROCESSING._scans(PREPROCESSING._File(data), 10**6) == scans, (number, data.hex(" "))
                seen += 1
    assert seen > 500


@pytest.mark.parametrize("alone", [b"\xff\x01\x7f\x7f", b"\xff\xd3\x7f\x7f", b"\xff\xfe\0\0", b"\xff" * 10_000 + b"\0"])
def test_no_marker_hides_scans(alone: bytes) -> None:
    jpeg = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    with pytest.raises(PictureError, match="in more than 1000 scans"):
        preprocess(jpeg[:-2] + (alone + scan) * 1500 + jpeg[-2:])


def test_scans_reach_the_decoder_a_few_at_a_time() -> None:
    """So that the time is looked at in between, though all were miscounted; and none is cut that could come whole."""
    places = sorted(random.Random(1).sample(range(400_000), 1500))
    data = bytearray(500_000)
    for place in (*places, *range(450_000, 460_000, 10)):
        data[place : place + 2] = b"\xff\xda"
    file = PREPROCESSING._File(bytes(data))
    file.scans = PREPROCESSING._likely_scans(file.getvalue())
    pieces = list(iter(lambda: file.read(65536), b""))
    assert b"".join(pieces) == data
    for piece in pieces:
        assert piece.count(b"\xff\xda") <= 26
        assert len(piece) == 65536 or piece.endswith(b"\xff\xda") or piece is pieces[-1]


def test_a_picture_that_takes_too_long_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: hundreds of scans that no limit counted. Whole, they would take several times as long."""
    monkeypatch.setattr(PREPROCESSING, "MAX_SCANS", 10**6)
    monkeypatch.setattr(PREPROCESSING, "MAX_SCANNED", 10**15)
    monkeypatch.setattr(PREPROCESSING, "MAX_SECONDS", 0.2)
    data = with_scans(2000, 3000)
    start = time.thread_time()
    with pytest.raises(PictureError, match=r"image_too_large: decoding takes longer than 0\.2 s"):
        preprocess(data)
    abandoned = time.thread_time() - start
    monkeypatch.setattr(PREPROCESSING, "MAX_SECONDS", 4 * abandoned)
    with pytest.raises(PictureError, match="image_too_large"):
        preprocess(data)


def endless() -> dict[str, bytes]:
    """Files of some megabytes that keep Pillow reading for a long time before there is a single pixel."""
    jpeg = encode(quadrants(), "JPEG")
    exif = b"Exif\0\0a"
    gif = encode(Image.new("P", (8, 8)), "GIF")
    frame = gif.index(b",")
    png = encode(quadrants())
    return {
        "empty segments": jpeg[:20] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[20:],
        "an EXIF block in crumbs": jpeg[:20] + (b"\xff\xe1\0\x09" + exif) * 500_000 + jpeg[20:],
        "comments in a GIF": gif[:frame] + b"!\xfe\1a\0" * 1_000_000 + gif[frame:],
        "empty chunks": png[:33] + handmade.chunk(b"tEXt", b"") * 500_000 + png[33:],
        "run lengths of nothing": handmade.run_length_bmp(3000, 3000, b"\0\2\0\0" * 1_000_000),
    }


@pytest.mark.parametrize("case", endless())
def test_what_never_comes_to_the_pixels_is_abandoned(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREPROCESSING, "MAX_SECONDS", 0.1)
    with pytest.raises(PictureError, match="decoding takes longer"):
        preprocess(endless()[case])


def test_a_good_picture_is_nowhere_near_the_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variants of all formats, with a fifth of the time."""
    monkeypatch.setattr(PREPROCESSING, "MAX_SECONDS", 1.0)
    for seed in seeds():
        preprocess(seed.data)


def test_entries_of_a_directory_cannot_name_the_same_bytes_again_and_again() -> None:
    """In a TIFF, and in the EXIF block of a JPEG: 1500 entries whose value is all of the file."""
    value = bytes(2**21)
    entries = [(40_000 + i, 7, len(value), 0) for i in range(1500)]
    size = [
        (256, 4, 1, 8),
        (257, 4, 1, 8),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 4, 1, 8),
        (279, 4, 1, 64),
    ]
    exif = handmade.exif(entries) + value
    pieces = [b"Exif\0\0" + exif[i : i + 65000] for i in range(0, len(exif), 65000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces)
    jpeg = encode(quadrants(), "JPEG")
    for data in (handmade.exif(size + entries) + value, jpeg[:20] + segments + jpeg[20:]):
        assert grown(data) < 100, "MiB; with all of them, 3000"


def parts(*, compression: int, width: int, height: int, tile: int = 0, sizes: int, count: int) -> bytes:
    """A grey TIFF of strips, or of square tiles, each of which is the same bytes at the end of the file."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    at = len(handmade.exif([(0, 0, 0, 0)] * (10 if tile else 9)))
    content = zlib.compress(bytes(min(tile**2, 10**6) or width))
    lists = struct.pack("<I", at + 8 * count) * count + struct.pack("<I", sizes or len(content)) * count
    entries += [(277, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile)] if tile else [(277, 3, 1, 1), (278, 4, 1, 1)]
    offsets, lengths = (at, at + 4 * count) if count > 1 else (at + 8, sizes or len(content))
    entries += [(324 if tile else 273, 4, count, offsets), (325 if tile else 279, 4, count, lengths)]
    data = handmade.exif(sorted(entries)) + lists + content
    return data + bytes(max(0, at + len(lists) + sizes - len(data)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: parts(compression=1, width=16, height=300_000, sizes=16, count=300_000), "more than 203,125 strips"),
        (lambda: parts(compression=8, width=16, height=9000, sizes=10**6, count=9000), "overlap in the file"),
        (lambda: parts(compression=8, width=100, height=100, tile=40_000, sizes=99, count=1), "tiles of 40000 x 40000"),
        (
            lambda: parts(compression=8, width=1, height=7000 * 20, tile=7000, sizes=99, count=20),
            "tiles of 7000 x 7000",
        ),
    ],
    ids=["strips beyond number", "strips on top of each other", "a tile without end", "tiles out of the picture"],
)
def test_a_tiff_in_parts_that_make_more_work_than_its_pixels_is_refused(data: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(PictureError, match=f"image_too_large: .*{reason}"):
        preprocess(data())


def test_a_tiff_in_parts_is_decoded_as_the_whole() -> None:
    picture = Image.open(EXAMPLES[0]).convert("L").resize((96, 64))
    whole = preprocess(encode(picture, "TIFF"))
    strips = encode(picture, "TIFF", compression="tiff_lzw", strip_size=96)
    assert (preprocess(strips) == whole).all()
    tile = parts(compression=8, width=32, height=32, tile=32, sizes=0, count=1)
    assert (preprocess(tile) == 0).all()


# ---- memory ----


_GROWN = """
import resource, sys
from tests.offline import PREPROCESSING
data = sys.stdin.buffer.read()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    PREPROCESSING.preprocess(data, 224)
except PREPROCESSING.PictureError:
    pass
print(peak() - before)
"""


def grown(data: bytes) -> int:
    """MiB by which a process of its own grows at most while it prepares a picture."""
    command = [sys.executable, "-W", "ignore", "-c", _GROWN]
    # By way of a shell: a child's peak begins with what its parent has at the time of its start.
    shell = ["sh", "-c", '"$@"', "sh", *command]
    return int(subprocess.run(shell, input=data, stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout)


@pytest.mark.parametrize("mode", ["F", "I;16", "LAB"])
def test_the_largest_picture_takes_a_small_multiple_of_its_own_size(mode: str) -> None:
    """51.8 megapixels of four bytes are 198 MiB."""
    seed = bombs.of_one_colour(mode, "TIFF", compression="tiff_adobe_deflate")
    assert grown(seed.data) < 2.4 * 198


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
@pytest.mark.parametrize("size", [(1500, 1500), (3_000_001, 1), (1, 3_000_001), (7, 300_001)])
def test_more_than_8_bits_are_converted_in_pieces_as_at_once(mode: str, size: tuple[int, int]) -> None:
    chance = np.random.default_rng(3)
    if mode == "F":
        pixels = chance.uniform(-0.5, 1.5, size[::-1]).astype(np.float32)
        pixels[chance.random(size[::-1]) < 0.1] = np.nan
        expected = np.rint(np.clip(np.nan_to_num(pixels, nan=0.0), 0, 1) * 255)
        picture = Image.fromarray(pixels)
    else:
        kind = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
        pixels = chance.integers(-1000 if mode == "I" else 0, 65536, size[::-1]).astype(kind)
        expected = (np.clip(pixels.astype(np.int64), 0, 65535) * 255 + 32767) // 65535
        picture = Image.frombytes(mode, size, pixels.tobytes())
    assert (np.asarray(PREPROCESSING._canonical(picture)) == expected).all()


@pytest.mark.parametrize(
    "where", ["Image.open", "load", "convert", "resize", "alpha_composite", "transpose", "asarray", "getexif"]
)
def test_no_memory_is_a_fault_of_the_picture(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it runs out, which must not turn a picture either."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    exif = Image.Exif()
    exif[0x0112] = 2
    data = encode(Image.new("LA", (30, 30)), "PNG", exif=exif)
    preprocess(data)
    places = {"Image.open": (Image, "open"), "asarray": (np, "asarray"), "load": (ImageFile.ImageFile, "load")}
    places["alpha_composite"] = (Image, "alpha_composite")
    monkeypatch.setattr(*places.get(where, (Image.Image, where)), fail)
    with pytest.raises(PictureError, match="image_too_large: there is no memory"):
        preprocess(data)


# ---- the step around it ----


def step(name: str) -> backend.PythonStep:
    """The step's own `model.py`, as the exam runs it."""
    folder = REPOSITORY / name
    return backend.PythonStep(folder / "1", config.parse((folder / "config.pbtxt").read_text()))


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("decoder"), PictureError("image_corrupt", "as usual")])
def test_whatever_a_picture_raises_is_its_own_fault(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its call are answered as without it."""
    model = step("defect_preprocess")
    module = model._model._respond.__globals__
    plain = module["preprocess"]

    def preprocess(data: bytes, size: int) -> np.ndarray:
        if data == b"faulty":
            raise module["PictureError"](fault.code, fault.detail) if isinstance(fault, PictureError) else fault
        return np.asarray(plain(data, size))

    monkeypatch.setitem(module, "preprocess", preprocess)
    good = encode(quadrants())
    outputs = model.run({"IMAGE": np.array([[good], [b"faulty"], [good]], np.object_)})
    errors = [error.decode() for error in outputs["ERROR"][:, 0]]
    assert [error.partition(": ")[0] for error in errors] == ["", "image_corrupt", ""]
    assert (outputs["PIXELS"][0] == plain(good, 224)).all()
    assert (outputs["PIXELS"][2] == outputs["PIXELS"][0]).all()
    assert not outputs["PIXELS"][1].any()


@pytest.mark.parametrize("name", ["defect_preprocess", "defect_postprocess"])
def test_a_request_that_cannot_be_answered_leaves_the_others_their_answers(name: str) -> None:
    """An exception out of `execute` would fail all that Triton batched together."""
    model = step(name)
    if name == "defect_preprocess":
        good = [backend.Tensor("IMAGE", np.array([[encode(quadrants())]], np.object_))]
    else:
        good = [
            backend.Tensor("PROBABILITIES", np.float32([[0.3, 0.7]])),
            backend.Tensor("DIGEST", np.zeros((1, 32), np.uint8)),
            backend.Tensor("ERROR", np.array([[b""]], np.object_)),
            backend.Tensor("TIMES", np.zeros((1, 2), np.int64)),
        ]
    requests = [backend.InferenceRequest(tensors) for tensors in (good, [], good)]
    before, broken, after = model._model.execute(requests)
    assert broken.error is not None
    assert before.error is after.error is None
    assert len(before.output_tensors) == len(after.output_tensors) > 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
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


@pytest.mark.parametrize("compression", [1, 5, 7, 8, 34925])
def test_tiles_far_larger_than_their_picture_are_refused_unread(compression: int) -> None:
    """A picture one pixel wide, whose tiles hold 386 million: 82 kB of that kind held a step for 46 s."""
    side, tiles = 4096, 23
    entries = [
        (256, 4, 1, 1), (257, 4, 1, side * tiles), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, tiles, 200), (325, 4, tiles, 400),
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    data = head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data = data.ljust(200, b"\0") + struct.pack(f"<{tiles}I", *[600] * tiles)
    data = data.ljust(400, b"\0") + struct.pack(f"<{tiles}I", *[10] * tiles) + bytes(1000)
    with pytest.raises(PREPROCESSING.PictureError, match="image_too_large: tiles of 4096 x 4096"):
        PREPROCESSING.preprocess(data, 64)
