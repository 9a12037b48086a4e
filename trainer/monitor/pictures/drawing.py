"""What all our pictures share: fonts, colours that the colour-blind tell apart, labelled panels."""

import colorsys
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Picture = npt.NDArray[np.uint8]

INK, GREY, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)

OKABE_ITO: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (90, 90, 90),
)
"""Okabe and Ito's palette: told apart with every common kind of colour blindness."""

SCALE = np.array(
    [[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]], dtype=float
)
"""White to dark blue, for shares from 0 to 1; its lightness alone tells the order."""


def expert_colours(number: int) -> list[Colour]:
    """A colour per expert: the palette, and beyond its eight evenly spaced hues."""
    more = number - len(OKABE_ITO)
    hues = (colorsys.hsv_to_rgb(i / more, 0.45, 0.75 if i % 2 else 0.95) for i in range(more))
    others = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]
    return [*OKABE_ITO, *others][:number]


def shade(share: float) -> Colour:
    """The colour of a share in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    red, green, blue = SCALE[low] + (place - low) * (SCALE[low + 1] - SCALE[low])
    return round(red), round(green), round(blue)


def readable_on(colour: Colour) -> Colour:
    """Ink or paper, whichever stands out."""
    red, green, blue = colour
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib ships; Pillow's own font knows hardly more than ASCII."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", size)


def width_of(text: str, size: int) -> int:
    """Pixels that a line of text takes."""
    left, _, right, _ = font(size).getbbox(text)
    return round(right - left)


def cut(text: str, size: int, width: int) -> str:
    """The text, with its end left out if it is wider than `width` pixels."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture and what draws on it."""
    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def layer_title(path: str) -> tuple[str, str]:
    """Two lines for a layer: `blocks.2.attn.qkv` is block 2, attn.qkv."""
    head, _, rest = path.rpartition("blocks.")[2].partition(".")
    return (f"block {head}", rest) if head.isdigit() else (path, "")
