"""Draws cartons: `python examples/draw.py`. They are drawings, so they are free.

Writes the two sample pictures of this folder, and the golden pictures of the exam (`export/golden`): small ones, in
as many formats, modes and sizes as a handful can cover.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageOps

HERE = Path(__file__).resolve().parent
SIZE = 640
CARDBOARD, SIDE, TOP, TAPE = (186, 142, 94), (150, 110, 70), (208, 168, 120), (222, 205, 160)


def carton(damaged: bool) -> Image.Image:
    """A carton on a grey floor; damaged, it is crushed at a corner, torn open and stained."""
    chance = random.Random(7)
    picture = Image.new("RGB", (SIZE, SIZE), (203, 205, 208))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 430, SIZE, SIZE), fill=(160, 162, 165))
    draw.ellipse((95, 470, 590, 570), fill=(120, 122, 125))
    front = [(120, 240), (400, 260), (400, 530), (120, 500)]
    side = [(400, 260), (540, 200), (540, 460), (400, 530)]
    top = [(120, 240), (270, 190), (540, 200), (400, 260)]
    if damaged:
        front[0], top[0] = (165, 305), (165, 305)
        side[1] = top[2] = (515, 240)
        front[3] = (150, 470)
    for corners, colour in ((front, CARDBOARD), (side, SIDE), (top, TOP)):
        draw.polygon(corners, fill=colour)
    draw.polygon([(245, 249), (275, 251), (405, 195), (378, 194)], fill=TAPE)
    draw.rectangle((160, 400, 260, 460), fill=(238, 236, 230))
    for i in range(12):
        draw.line((170 + 7 * i, 408, 170 + 7 * i, 440), fill=(30, 30, 30), width=1 + chance.randrange(4))
    if damaged:
        tear = [
            (250, 300),
            (290, 330),
            (270, 350),
            (330, 380),
            (300, 400),
            (360, 440),
            (330, 360),
            (350, 340),
            (300, 310),
        ]
        draw.polygon(tear, fill=(52, 36, 24))
        draw.line(tear[:6], fill=(232, 214, 180), width=5)
        draw.polygon([(165, 305), (230, 290), (215, 340), (190, 370), (160, 350)], fill=(128, 92, 58))
        for _ in range(40):
            x, y = chance.randrange(130, 390), chance.randrange(290, 500)
            draw.line((x, y, x + chance.randrange(-40, 40), y + chance.randrange(-25, 25)), fill=(120, 86, 54), width=2)
        draw.ellipse((300, 440, 390, 515), fill=(122, 88, 60))
    return picture.filter(ImageFilter.GaussianBlur(1))


def photographed(picture: Image.Image) -> Image.Image:
    """With the noise of a camera."""
    return Image.blend(picture, Image.effect_noise(picture.size, 18).convert("RGB"), 0.06)


def golden(folder: Path) -> None:
    """Write the golden pictures."""
    damaged, intact = carton(True), carton(False)
    upright = Image.Exif()
    upright[0x0112] = 6  # lies on its side, and says so
    damaged.save(folder / "damaged-large.jpg", quality=60)
    intact.resize((320, 320)).rotate(90).save(folder / "intact-turned.jpg", quality=70, exif=upright)
    damaged.crop((100, 180, 560, 560)).resize((230, 190)).convert("L").save(folder / "damaged-grey.jpg", quality=70)
    ImageOps.mirror(intact).resize((240, 240)).convert("CMYK").save(folder / "intact-cmyk.jpg", quality=70)
    small = damaged.resize((150, 200))
    small.putalpha(small.convert("L").point(lambda value: 0 if value > 195 else 255))
    small.save(folder / "damaged-transparent.png", optimize=True)
    intact.crop((60, 120, 600, 600)).resize((300, 260)).save(folder / "intact-wide.webp", quality=60)
    ImageOps.mirror(damaged).resize((160, 160)).quantize(32).save(folder / "damaged-palette.gif")
    intact.resize((96, 96)).convert("I;16").point(lambda value: value * 256).save(
        folder / "intact-16-bit.tiff", compression="tiff_deflate"
    )


if __name__ == "__main__":
    for name, damaged in (("parcel-intact", False), ("parcel-damaged", True)):
        photographed(carton(damaged)).save(HERE / f"{name}.jpg", quality=88)
    golden(HERE.parent / "export" / "golden")
