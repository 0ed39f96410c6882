"""Files as programs and devices write them: what is sound is prepared as the plain picture, never silently white.

What is recognised and not taken is named, and "damaged" is never said of it. `../shared/cases` has one file of each
kind where it is there; the kinds are made here.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import EXAMPLES, ROOT, GatewayProcess, http, process_of
from tests.fuzzing import handmade
from tests.offline import PREPROCESSING
from tests.test_preprocessing import encode, grown, preprocess, quadrants
from triton_runtime.server import Endpoint

PictureError = PREPROCESSING.PictureError
CASES = ROOT.parent / "shared/cases/pictures"


def photograph(mode: str = "RGB", size: tuple[int, int] = (200, 150)) -> Image.Image:
    return Image.open(EXAMPLES[0]).convert(mode).resize(size)


def refusal(data: bytes) -> str:
    with pytest.raises(PictureError) as caught:
        preprocess(data)
    return str(caught.value)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Behind the header of a PNG."""
    return png[:33] + b"".join(chunks) + png[33:]


# ---- PNG ----


def spoilt(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


EXTRAS = {
    "a large compressed text": handmade.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "a large text": handmade.chunk(b"tEXt", b"comment\0" + b"c" * 2**21),
    "a text without a key": handmade.chunk(b"tEXt", b""),
    "a text of unknown compression": handmade.chunk(b"zTXt", b"comment\0\7abc"),
    "a large profile": handmade.chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**21))),
    "a profile of unknown compression": handmade.chunk(b"iCCP", b"profile\0\7"),
    "no density": handmade.chunk(b"pHYs", b""),
    "no gamma": handmade.chunk(b"gAMA", b""),
    "no intent": handmade.chunk(b"sRGB", b""),
    "frames out of order": handmade.chunk(b"acTL", struct.pack(">II", 2, 0)) + handmade.chunk(b"fcTL", bytes(26)) * 2,
    "an EXIF block with a wrong checksum": spoilt(handmade.chunk(b"eXIf", handmade.exif([(0x0112, 3, 1, 6)]))),
    "transparency with a wrong checksum": spoilt(handmade.chunk(b"tRNS", bytes(6))),
    "a text with a wrong checksum": spoilt(handmade.chunk(b"tEXt", b"comment\0" + b"c")),
    "a private chunk with a wrong checksum": spoilt(handmade.chunk(b"prVt", b"anything")),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_png_has_beside_its_pixels_changes_nothing(extra: str) -> None:
    png = encode(quadrants())
    expected = preprocess(png)
    assert (preprocess(with_chunks(png, EXTRAS[extra])) == expected).all()
    assert (preprocess(png[:-12] + EXTRAS[extra] + png[-12:]) == expected).all()


def test_a_text_that_inflates_to_anything_takes_no_memory() -> None:
    bomb = handmade.chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(64 * 2**20)))
    assert grown(with_chunks(encode(quadrants()), *[bomb] * 50)) < 40, "MiB; the file has 3"


def test_pixels_with_a_wrong_checksum_in_the_header_are_damaged() -> None:
    png = bytearray(encode(quadrants()))
    png[30] ^= 1
    assert refusal(bytes(png)).startswith("image_corrupt")


def packed(pixels: np.ndarray, depth: int) -> bytes:
    """Rows of a PNG whose samples have `depth` bits, each behind the filter byte "none"."""
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    bits = (pixels[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits.reshape(len(pixels), -1))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_only_what_has_the_transparent_value_is_white(depth: int, colour: int) -> None:
    """Grey and colour, in every depth that PNG has."""
    if colour == 2 and depth < 8:
        pytest.skip("PNG has no such pictures")
    most = 2**depth - 1
    samples = np.full((32, 32, 3 if colour else 1), most // 3, np.int64)
    samples[:, 16:] = most
    transparent = struct.pack(">H", most // 3) * (3 if colour else 1)
    plain = handmade.png(32, 32, packed(samples, depth), depth=depth, colour=colour)
    expected = preprocess(plain).copy()
    expected[:, :112] = 255
    got = preprocess(with_chunks(plain, handmade.chunk(b"tRNS", transparent))).astype(int)
    far = np.r_[0:100, 124:224]  # from the edge, which is blurred
    assert np.abs(got - expected)[:, far].max() <= 1
    other = with_chunks(plain, handmade.chunk(b"tRNS", bytes(6 if colour else 2)))
    if depth > 1:
        assert (preprocess(other) == preprocess(plain)).all(), "no pixel has the transparent value"


# ---- BMP ----


def bmp(picture: Image.Image, alpha: int | None, header: int = 108) -> bytes:
    """A BMP of 32 bits with masks for all four channels."""
    rgb = np.asarray(picture.convert("RGB"))[::-1, :, ::-1]
    pixels = np.zeros((*rgb.shape[:2], 4), np.uint8)
    pixels[..., :3] = rgb
    if alpha is not None:
        pixels[..., 3] = alpha
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", header, *picture.size, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0) + masks
    info += bytes(header - len(info))
    return struct.pack("<2sIHHI", b"BM", 14 + header + pixels.nbytes, 0, 0, 14 + header) + info + pixels.tobytes()


@pytest.mark.parametrize("header", [56, 108, 124])
def test_alpha_that_is_zero_everywhere_in_a_bmp_is_unused(header: int) -> None:
    plain = preprocess(encode(photograph()))
    assert (preprocess(bmp(photograph(), 0, header)) == plain).all()
    assert (preprocess(bmp(photograph(), 255, header)) == plain).all()
    assert preprocess(bmp(photograph(), 1, header)).min() > 250, "nearly transparent is meant"


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (patched(encode(quadrants(), "BMP"), 28, "<H", 64), "depth"),
        (patched(encode(quadrants(), "BMP"), 30, "<I", 4), "compression"),
        (patched(encode(quadrants(), "BMP"), 14, "<I", 16), "header"),
        (patched(bmp(quadrants(), 255), 54, "<I", 0x3FF00000), "bitfields"),
    ],
)
def test_a_bmp_of_a_rare_kind_is_unsupported(data: bytes, name: str) -> None:
    text = refusal(data)
    assert text.startswith("image_unsupported: a BMP of a rare kind")
    assert name in text


# ---- JPEG ----

JPEGS: dict[str, dict[str, object]] = {
    "subsampled": {"quality": 90},
    "whole": {"quality": 90, "subsampling": 0},
    "restarts": {"quality": 90, "restart_marker_blocks": 5},
    "restarts each row": {"quality": 90, "restart_marker_rows": 1},
}
TAILS = {
    "nothing": b"",
    "a video": b"\0\0\0\x18ftypmp42\0\0\0\0" + random.Random(1).randbytes(20_000),
    "zeros": bytes(500),
    "a cut marker": b"\xff",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_rows_are_all_there_needs_no_end(kind: str, mode: str, tail: str) -> None:
    jpeg = encode(photograph(mode, (203, 151)), "JPEG", **JPEGS[kind])
    assert jpeg.endswith(b"\xff\xd9")
    assert (preprocess(jpeg[:-2] + TAILS[tail]) == preprocess(jpeg)).all()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("kind", [*JPEGS, "progressive"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_lacks_rows_is_truncated(kind: str, mode: str, share: float) -> None:
    jpeg = encode(photograph(mode, (203, 151)), "JPEG", **JPEGS.get(kind, {"progressive": True}))
    start = jpeg.index(b"\xff\xda")
    cut = start + int(share * (len(jpeg) - start))
    assert refusal(jpeg[:cut]).startswith("image_truncated")
    if b"restart" in kind.encode():
        cut = [i for i in range(start, cut) if jpeg[i] == 0xFF and 0xD0 <= jpeg[i + 1] <= 0xD7][-1]
        assert refusal(jpeg[:cut]).startswith("image_truncated"), "in front of a restart"
        assert refusal(jpeg[: cut + 2]).startswith("image_truncated"), "behind it"


def test_a_damaged_jpeg_is_not_taken_for_one_without_end() -> None:
    jpeg = encode(photograph(), "JPEG")
    table = jpeg.index(b"\xff\xc4")
    assert refusal(jpeg[: table + 5] + b"\xff" * 16 + jpeg[table + 21 :]).startswith("image_corrupt")


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        (1, 0xC3, "lossless JPEG"),
        (1, 0xC5, "hierarchical JPEG"),
        (1, 0xCB, "lossless JPEG"),
        (1, 0xF7, "JPEG-LS"),
        (4, 12, "a JPEG of 12 bits a sample"),
        (4, 16, "a JPEG of 16 bits a sample"),
        (9, 2, "a JPEG of 2 components"),
    ],
)
def test_a_jpeg_of_a_rare_kind_is_named(place: int, value: int, name: str) -> None:
    jpeg = encode(photograph(), "JPEG")
    assert refusal(patched(jpeg, jpeg.index(b"\xff\xc0") + place, "B", value)).startswith(f"image_unsupported: {name}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_the_beginning_of_a_file_is_truncated(kind: str) -> None:
    data = encode(photograph(), kind)
    pixels = {"JPEG": data.find(b"\xff\xda"), "PNG": data.find(b"IDAT") - 4}.get(kind, 40)
    for cut in (pixels, pixels - 3, 16, 12):
        assert refusal(data[:cut]).startswith("image_truncated"), cut


# ---- TIFF ----


@pytest.mark.parametrize(
    ("tag", "value"),
    [(259, 34712), (259, 34892), (262, 32803), (258, 24), (339, 6)],
    ids=["JPEG 2000 inside", "lossy raw inside", "a mosaic of a camera", "24 bits", "complex numbers"],
)
def test_a_tiff_of_a_rare_kind_is_unsupported(tag: int, value: int) -> None:
    pixels = bytes(64)
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 8, 279: 64, tag: value}
    size = len(handmade.exif([(key, 3, 1, 0) for key in tags]))
    data = handmade.exif([(key, 3, 1, size if key == 273 else tags[key]) for key in sorted(tags)]) + pixels
    assert refusal(data).startswith("image_unsupported: ")


def floats(low: float, high: float, *, whole: bool = False) -> np.ndarray:
    samples = np.linspace(low, high, 64 * 64, dtype=np.float32).reshape(64, 64)
    return np.rint(samples) if whole else samples


@pytest.mark.parametrize("most", [255, 65535])
def test_whole_numbers_in_floats_are_scaled_as_such(most: int) -> None:
    samples = floats(0, most, whole=True)
    got = preprocess(encode(Image.fromarray(samples), "TIFF")).astype(int)
    assert np.abs(got - preprocess(encode(Image.fromarray(samples / most), "TIFF"))).max() <= 1
    as_integers = preprocess(encode(Image.fromarray(samples.astype(np.int32)), "TIFF"))
    assert np.abs(got - as_integers).max() <= 1, "32 bits say no more of the scale than floats do"


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (floats(0.25, 254.5), "reach 254.5: floats of 0 to 1"),
        (floats(-3, 1), "reach -3: floats of 0 to 1"),
        (floats(0, 70_000, whole=True), "reach 70000: floats of 0 to 1"),
        (np.full((8, 8), 65536, np.int32), "reach 65536: integers of 0 to 65535"),
        (np.full((8, 8), 2**31 - 1, np.int32), "reach 2147483647"),
        (np.full((8, 8), -(2**31), np.int32), "reach -2147483648"),
    ],
)
def test_numbers_of_an_unknown_scale_are_refused(samples: np.ndarray, text: str) -> None:
    assert text in refusal(encode(Image.fromarray(samples), "TIFF"))


# ---- animations ----


def moved_gif(picture: Image.Image, **options: object) -> bytes:
    """A GIF whose first frame lies at 20, 30 of a screen of 100 x 100."""
    data = encode(picture, "GIF", **options)
    frame = next(i for i in range(13, len(data)) if data[i : i + 5] == b",\0\0\0\0")
    return patched(patched(patched(data, 6, "<I", 100 | 100 << 16), frame + 1, "<H", 20), frame + 3, "<H", 30)


def moved_webp(picture: Image.Image) -> bytes:
    """The same in WebP."""
    data = encode(picture, "WEBP", lossless=True)[12:]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def three(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    flags = 0x02 | (0x10 if picture.mode == "RGBA" else 0)
    frame = three(10, 15, picture.width - 1, picture.height - 1, 40) + b"\0" + data
    body = chunk(b"VP8X", bytes([flags, 0, 0, 0]) + three(99, 99)) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_what_the_first_frame_leaves_uncovered_is_white(kind: str, mode: str) -> None:
    picture = quadrants(40).convert("RGB").convert(mode)
    screen = Image.new("RGB", (100, 100), "white")
    screen.paste(picture, (20, 30))
    got = preprocess(moved_gif(picture) if kind == "GIF" else moved_webp(picture)).astype(int)
    assert np.abs(got - preprocess(encode(screen))).max() <= 1


# ---- AVIF and what is not taken ----


def test_an_avif_is_the_same_picture() -> None:
    got = preprocess(encode(photograph(), "AVIF", quality=95)).astype(int)
    assert np.abs(got - preprocess(encode(photograph()))).mean() < 3


def test_an_avif_is_turned_and_laid_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = preprocess(encode(quadrants().transpose(Image.Transpose.ROTATE_90), "AVIF", exif=exif, quality=95))
    assert np.abs(turned.astype(int) - preprocess(encode(quadrants()))).mean() < 6
    clear = preprocess(encode(Image.new("RGBA", (64, 64), (9, 9, 9, 0)), "AVIF"))
    assert clear.min() == 255


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda *_: [0 for _ in iter(int, 1)], "image_too_large: decoding takes longer"),
        (lambda *_: bytes(2**31), "image_too_large: there is no memory"),
        (lambda *_: os.kill(os.getpid(), signal.SIGSEGV), "image_corrupt"),
        (lambda *_: os._exit(3), "image_too_large"),
    ],
    ids=["time", "memory", "a crash", "an end without a word"],
)
def test_what_an_avif_may_cost_is_bounded_from_outside(
    fault: object, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding is one call that nothing could stop in this process; this one goes on, with no process left behind."""
    monkeypatch.setattr(PREPROCESSING, "MAX_SECONDS", 1.0)
    data = encode(photograph(), "AVIF")
    monkeypatch.setattr(PREPROCESSING, "_decode", fault)
    children = set(psutil.Process().children())
    before = time.process_time()
    assert refusal(data).startswith(text)
    assert time.process_time() - before < 1, "it is the other process's time"
    assert set(psutil.Process().children()) <= children
    monkeypatch.undo()
    assert preprocess(data).shape == (224, 224, 3)


def test_too_many_pixels_of_an_avif_are_refused_unread() -> None:
    data = encode(photograph(), "AVIF")
    place = data.index(b"ispe") + 8
    changed = patched(patched(data, place, ">I", 9000), place + 4, ">I", 9000)
    assert "9000 x 9000 is more than" in refusal(changed)


def test_avifs_under_load_are_answered_beside_everything_else(
    gateway: GatewayProcess, triton: Endpoint, jpeg: bytes
) -> None:
    """Each is decoded in a process that a process of Triton forks off, while others decode, answer and are asked."""
    pictures = [jpeg, *(encode(photograph(size=(400 + n, 300)), "AVIF", speed=10) for n in range(3))]
    before, count = set(process_of(triton).children()), len(pictures) * 24

    def ask(number: int) -> int:
        headers = {"Content-Type": "image/jpeg", "X-Timeout-Ms": "30000"}
        answer = http.post(f"{gateway.url}/v1/predict", content=pictures[number % len(pictures)], headers=headers)
        return answer.status_code

    with ThreadPoolExecutor(16) as pool:
        assert Counter(pool.map(ask, range(count))) == {200: count}
    assert set(process_of(triton).children()) == before


def box(brand: bytes, *others: bytes) -> bytes:
    content = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">I", len(content) + 4) + content + bytes(500)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (box(b"heic", b"mif1", b"heic"), "HEIC: convert it to JPEG"),
        (box(b"mif1", b"mif1", b"heic"), "HEIC: convert it to JPEG"),
        (box(b"hevc", b"msf1", b"hevc"), "HEIC: convert it to JPEG"),
        (box(b"mp42", b"isom"), "a video or another MP4 file"),
        (box(b"qt  "), "a video or another MP4 file"),
        (box(b"crx ", b"isom"), "a raw CR3 file"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), "a WAV sound"),
        (b"RIFF\x24\0\0\0AVI LIST" + bytes(28), "an AVI video"),
        (b"RIFF\x24\0\0\0sfbkLIST" + bytes(28), "a RIFF file without a picture"),
        (
            handmade.PNG_SIGNATURE + handmade.chunk(b"CgBI", bytes(4)) + handmade.png(8, 8, b"")[8:],
            "a PNG of Apple's own",
        ),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "JPEG 2000"),
        (b"\xff\x4f\xff\x51" + bytes(50), "JPEG 2000"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1" + bytes(50), "a Photoshop file"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "ICO"),
        (bytes(128) + b"DICM" + bytes(50), "DICOM"),
        (b"PK\3\4" + bytes(50), "an archive"),
        (b"P6\n2 2\n255\n" + bytes(12), "a picture in a rare format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"/9j/4AAQSkZJRgABAQ", "text that stands for a picture (base64)"),
        (b"data:image/png;base64,iVBORw0KGgo", "text that stands for a picture (base64)"),
        (b"this is no picture", "not a picture in a known format"),
    ],
)
def test_what_is_recognised_and_not_taken_is_named(data: bytes, name: str) -> None:
    text = refusal(data)
    assert text.startswith(f"image_unsupported: {name}")
    assert "damaged" not in text


# ---- the files themselves ----


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is not here; the kinds are made above")
@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("png-16-bit-grey-trns.png", "png-16-bit-grey.png"),
        ("bmp-32-v4-alpha-mask-all-zero.bmp", "png-bad-crc-ancillary.png"),
        ("png-itxt-xmp-2-mb.png", "png-bad-crc-ancillary.png"),
        ("png-ztxt-bomb-64-mb.png", "png-bad-crc-ancillary.png"),
        ("jpeg-samsung-no-eoi-video.jpg", "png-bad-crc-ancillary.png"),
        ("size-8160x6144-pixel-phone.jpg", ""),
        ("gif-offset-first-frame.gif", ""),
        ("jpeg-header-only.jpg", "image_truncated"),
        ("jpeg-12-bit.jpg", "image_unsupported: a JPEG of 12 bits"),
        ("webp-riff-wav.webp", "image_unsupported: a WAV sound"),
        ("tiff-float32-0-to-255.tiff", "image_unsupported: its numbers reach"),
    ],
)
def test_each_file_of_the_field_has_its_outcome(name: str, like: str) -> None:
    data = (CASES / name).read_bytes()
    if like.startswith("image_"):
        assert refusal(data).startswith(like)
    elif like:
        difference = np.abs(preprocess(data).astype(int) - preprocess((CASES / like).read_bytes()))
        assert difference.mean() < 3
    else:
        assert preprocess(data).std() >= 0
