"""The pictures that a load sends: those given, or what cameras of other sizes would have made of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

TWELVE_MEGAPIXELS = (4000, 3000)
SIZES = (None, (320, 240), (1280, 960), (1920, 1440), (2592, 1944))
"""Of a mixed load, in turns; None is the picture as it is."""
_NOISE = 6.0
"""Standard deviation, in grey levels, of what is added to a picture made larger. Interpolated pixels are smooth and
pack into a third of the bytes that a camera's do; with it they take as many, and as long to unpack."""


def given(pictures: list[Path], folder: Path) -> list[Path]:
    """The pictures as they are."""
    return pictures


def twelve_megapixels(pictures: list[Path], folder: Path) -> list[Path]:
    """The first eight at 4000x3000."""
    return [_write(folder, i, enlarged(path, TWELVE_MEGAPIXELS)) for i, path in enumerate(pictures[:8])]


def mixed(pictures: list[Path], folder: Path) -> list[Path]:
    """Each at one of `SIZES`."""
    sized = ((path, SIZES[i % len(SIZES)]) for i, path in enumerate(_at_least(pictures, len(SIZES))))
    return [path if size is None else _write(folder, i, enlarged(path, size)) for i, (path, size) in enumerate(sized)]


KINDS: dict[str, Callable[[list[Path], Path], list[Path]]] = {
    "given": given,
    "12mp": twelve_megapixels,
    "mixed": mixed,
}
"""By the name on the command line: from pictures and a folder for new ones to the pictures to send."""


def enlarged(path: Path, size: tuple[int, int]) -> bytes:
    """A picture at `size` (width, height) as a JPEG of quality 90, grainy where it is larger than it was."""
    with Image.open(path) as picture:
        picture.load()
        grow = max(1.0, size[0] / picture.width)
        pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    if grow > 1:
        pixels = pixels + np.random.default_rng(0).normal(0, _NOISE, (*pixels.shape[:2], 1)).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _at_least(pictures: list[Path], count: int) -> list[Path]:
    return pictures * -(-count // len(pictures)) if len(pictures) < count else pictures


def _write(folder: Path, number: int, content: bytes) -> Path:
    path = folder / f"{number}.jpg"
    path.write_bytes(content)
    return path
