"""Routing maps: which expert each patch of some images goes to, as one picture.

A row per image, the image itself first and beside it a map per layer; the experts' colours and the
share of patches that each got are in the legend and under the maps.

Letters: N images, E experts, H x W the grid of patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from trainer.monitor.pictures.drawing import (
    GREY,
    INK,
    PAPER,
    Colour,
    Picture,
    blank,
    cut,
    expert_colours,
    font,
    layer_title,
    width_of,
)

TILE, GAP, MARGIN, LABELS = 112, 10, 20, 118
HEADING, COLUMNS, BARS = 86, 34, 46
MOST_LAYERS = 12
"""Maps in a row; of more layers an even choice is shown."""

Grid = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shown:
    """An image of the fixed set.

    Attributes:
        pixels: uint8 [h, w, 3], as the model sees it.
        domain: where it is from.
        label: its class name.
        held_out: whether that domain is the held-out one.
    """

    pixels: Picture
    domain: str
    label: str
    held_out: bool


def routing_picture(
    shown: Sequence[Shown],
    maps: Mapping[str, Grid],
    experts: Sequence[str],
    title: str,
) -> Image.Image:
    """Draws the routing maps.

    Args:
        shown: the N images.
        maps: layer path -> [N, H, W], the number of the expert that each patch went to.
        experts: what to call each expert in the legend.
        title: first line.

    Returns:
        The picture.
    """
    layers = _even_choice(list(maps), MOST_LAYERS)
    colours = expert_colours(len(experts))
    width = 2 * MARGIN + LABELS + (1 + len(layers)) * (TILE + GAP) - GAP
    width = max(width, 2 * MARGIN + width_of(title, 18), 640)
    height = HEADING + COLUMNS + len(shown) * (TILE + GAP) + BARS + MARGIN
    picture, draw = blank(width, height)
    draw.text((MARGIN, MARGIN - 4), cut(title, 18, width - 2 * MARGIN), INK, font(18))
    _legend(draw, experts, colours, width)
    for column, layer in enumerate(layers):
        left = MARGIN + LABELS + (column + 1) * (TILE + GAP)
        for line, text in enumerate(layer_title(layer)):
            draw.text((left, HEADING + 15 * line), cut(text, 12, TILE), INK, font(12))
        for row in range(len(shown)):
            picture.paste(_map(maps[layer][row], colours), (left, _top(row)))
        _shares(draw, maps[layer], colours, left, _top(len(shown)))
    draw.text((MARGIN + LABELS, HEADING + 15), "image", INK, font(12))
    for row, image in enumerate(shown):
        picture.paste(_tile(image.pixels), (MARGIN + LABELS, _top(row)))
        _row_label(draw, image, _top(row))
    bottom = _top(len(shown))
    for line, text in enumerate(("share of these", "patches")):
        draw.text((MARGIN, bottom + 13 * line), text, GREY, font(12))
    if len(layers) < len(maps):
        note = f"{len(layers)} of {len(maps)} layers"
        draw.text((MARGIN, bottom + 28), note, GREY, font(11))
    return picture


def _top(row: int) -> int:
    return HEADING + COLUMNS + row * (TILE + GAP)


def _even_choice(layers: list[str], most: int) -> list[str]:
    if len(layers) <= most:
        return layers
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]


def _legend(
    draw: ImageDraw.ImageDraw, experts: Sequence[str], colours: Sequence[Colour], width: int
) -> None:
    left, top = MARGIN, MARGIN + 28
    for name, colour in zip(experts, colours, strict=True):
        wide = 20 + width_of(name, 13) + 18
        if left + wide > width and left > MARGIN:
            left, top = MARGIN, top + 19
        draw.rectangle((left, top, left + 13, top + 13), colour)
        draw.text((left + 20, top - 1), name, INK, font(13))
        left += wide


def _row_label(draw: ImageDraw.ImageDraw, image: Shown, top: int) -> None:
    lines = [(image.domain, 14, INK), (image.label, 12, GREY)]
    if image.held_out:
        lines.append(("held out", 12, (180, 70, 0)))
    y = top + TILE // 2 - 9 * len(lines)
    for text, size, colour in lines:
        draw.text((MARGIN, y), cut(text, size, LABELS - 8), colour, font(size))
        y += size + 5


def _tile(pixels: Picture) -> Image.Image:
    image = Image.fromarray(pixels)
    smooth = min(image.size) >= TILE
    return image.resize(
        (TILE, TILE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    )


def _map(grid: Grid, colours: Sequence[Colour]) -> Image.Image:
    """One map [H, W] as a tile; large patches get a thin white line between them."""
    rows, columns = grid.shape
    table = np.array(colours, dtype=np.uint8)
    tile = Image.fromarray(table[grid]).resize((TILE, TILE), Image.Resampling.NEAREST)
    if TILE // max(rows, columns) >= 8:
        draw = ImageDraw.Draw(tile)
        for row in range(1, rows):
            draw.line((0, row * TILE // rows, TILE, row * TILE // rows), PAPER)
        for column in range(1, columns):
            draw.line((column * TILE // columns, 0, column * TILE // columns, TILE), PAPER)
    return tile


def _shares(
    draw: ImageDraw.ImageDraw, maps: Grid, colours: Sequence[Colour], left: int, top: int
) -> None:
    """A bar of the experts' shares of all patches [N, H, W], the largest one's in per cent."""
    counts = np.bincount(maps.ravel(), minlength=len(colours))
    edges = left + np.round(TILE * np.cumsum(counts) / counts.sum()).astype(int)
    start = left
    for edge, colour in zip(edges, colours, strict=True):
        if edge > start:
            draw.rectangle((start, top + 2, int(edge) - 1, top + 15), colour)
        start = int(edge)
    most = int(counts.argmax())
    text = f"expert {most}: {100 * counts[most] / counts.sum():.0f} %"
    draw.text((left, top + 19), text, GREY, font(12))
