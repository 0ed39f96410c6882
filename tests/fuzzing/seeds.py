"""Good pictures in every format, mode and variant that the preprocessing takes: what the mutations start from."""

from __future__ import annotations

import functools
import io
import itertools
import struct
from dataclasses import dataclass

from PIL import Image, ImageCms

from tests.conftest import ROOT
from tests.fuzzing import handmade

SIDE = 96
"""Small, so that a mutation hits structure about as often as pixels, and thousands are decoded quickly."""

_PREDICTOR, _SUBSAMPLING = 317, 530  # tags of TIFF
TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
}
"""Format, as Pillow names it -> the content type that a client would send."""


@dataclass(frozen=True)
class Seed:
    """A good picture. `format` is a key of `TYPES`."""

    name: str
    format: str
    data: bytes


@functools.cache
def seeds() -> list[Seed]:
    """Every variant, of one photograph or another."""
    # Copies: saving leaves options of its format behind in a picture.
    photographs = (picture.copy() for picture in itertools.cycle(_photographs()))

    def made(format_: str, name: str, mode: str = "RGB", *, frames: bool = False, **options: object) -> Seed:
        if frames:
            options |= {"save_all": True, "append_images": [next(photographs), next(photographs)]}
        return Seed(name, format_, encode(_in_mode(next(photographs), mode), format_, **options))

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    meta = {"exif": handmade.exif([(0x0112, 3, 1, 6)]), "icc_profile": icc}
    return [
        made("JPEG", "baseline", quality=80),
        made("JPEG", "progressive", progressive=True),
        made("JPEG", "no subsampling, own tables", subsampling=0, optimize=True),
        made("JPEG", "grey", "L"),
        made("JPEG", "CMYK", "CMYK"),
        made("JPEG", "restart markers", restart_marker_blocks=4),
        made("JPEG", "EXIF and ICC", exif=b"Exif\0\0" + handmade.exif([(0x0112, 3, 1, 6)]), icc_profile=icc),
        made("JPEG", "comment and XMP", comment=b"c" * 50, xmp=b'<x tiff:Orientation="6"/>'),
        made("MPO", "three pictures", frames=True),
        *(made("PNG", f"mode {mode}", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        made("PNG", "EXIF and ICC", **meta),
        made("PNG", "transparent colour", "P", transparency=3),
        made("PNG", "animated", frames=True),
        Seed("interlaced", "PNG", handmade.adam7(_in_mode(next(photographs), "L"))),
        made("WEBP", "lossy"),
        made("WEBP", "lossless", lossless=True),
        made("WEBP", "lossy, alpha, EXIF and ICC", "RGBA", **meta),
        made("WEBP", "animated", frames=True),
        *(made("BMP", f"mode {mode}", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
        Seed("run lengths", "BMP", handmade.run_lengths(_in_mode(next(photographs), "L"))),
        Seed("OS/2 header", "BMP", handmade.os2(next(photographs))),
        made("GIF", "palette", "P", interlace=False),
        made("GIF", "interlaced", "P", interlace=True),
        made("GIF", "transparent, with comment", "L", transparency=9, comment=b"c" * 300),
        made("GIF", "animated", frames=True, loop=0, duration=40, disposal=2),
        *(made("TIFF", f"mode {mode}", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")),
        *(made("TIFF", f"mode {mode}", mode) for mode in ("LAB", "I;16", "I;16B", "I", "F")),
        *(made("TIFF", kind, compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(made("TIFF", kind, "1", compression=kind) for kind in ("group3", "group4", "tiff_ccitt")),
        *(made("TIFF", kind, compression=kind) for kind in ("lzma", "zstd")),
        made("TIFF", "strips", compression="tiff_lzw", strip_size=1024),
        made("TIFF", "mode YCbCr", "YCbCr", compression="tiff_lzw", tiffinfo={_SUBSAMPLING: (1, 1)}),
        made("TIFF", "differences", compression="tiff_lzw", tiffinfo={_PREDICTOR: 2}),
        made("TIFF", "BigTIFF", big_tiff=True),
        made("TIFF", "EXIF and ICC", **meta),
        made("TIFF", "pages", frames=True),
    ]


def encode(picture: Image.Image, format_: str, **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


@functools.cache
def _photographs() -> list[Image.Image]:
    """The photographs that the repository carries: the same everywhere, so that a seed means the same corpus."""
    paths = sorted((ROOT / "export/golden").glob("*.jpg")) + sorted((ROOT / "examples").glob("*.jpg"))
    return [Image.open(path).convert("RGB").resize((SIDE, SIDE)) for path in paths]


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    grey = picture.convert("L")
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
        assert converted is not None  # None is only returned for in-place conversion
        return converted
    if mode.startswith("I;16"):
        order = ">H" if mode == "I;16B" else "<H"
        return Image.frombytes(mode, grey.size, b"".join(struct.pack(order, value * 257) for value in grey.tobytes()))
    if mode in ("I", "F"):
        return grey.convert(mode).point(lambda value: value * (257 if mode == "I" else 1 / 255) + 0)
    return grey.convert("LA") if mode == "LA" else picture.convert(mode)
