"""Heat maps: which expert the tokens of a domain or class go to, and which classes are confused.

Letters: L layers, D domains, C classes, E experts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from trainer.monitor.pictures.drawing import (
    GREY,
    INK,
    blank,
    cut,
    font,
    readable_on,
    shade,
    width_of,
)
from trainer.monitor.pictures.information import mutual_information, specialisation

MARGIN, TITLE, LINE = 20, 34, 18
CELL_WIDTH, CELL_HEIGHT = 40, 22
PANELS = 4
"""Panels beside each other."""
MOST_ROWS = 40
"""Rows of a panel; of more classes those are shown whose routing is least like the average."""
MOST_LABELS = 60
"""Classes up to which a confusion matrix names them."""

Table = npt.NDArray[np.float64]


def expert_heat_maps(
    counts: Table, layers: Sequence[tuple[str, str]], names: Sequence[str], title: str
) -> Image.Image:
    """A panel per layer: each row's tokens by expert, and what an expert tells of the row.

    Args:
        counts: [L, rows, E] tokens; a row without any is left out.
        layers: two lines to call each layer by.
        names: what to call each row.
        title: first line.

    Returns:
        The picture.
    """
    shown, note = _rows_shown(counts)
    names = [names[row] for row in shown]
    label = min(150, max(width_of(name, 12) for name in names) + 10)
    panel = max(counts.shape[-1] * CELL_WIDTH, 150) + 24
    lines = -(-len(layers) // PANELS)
    block = 2 * LINE + len(shown) * CELL_HEIGHT + LINE + 16
    wide = 2 * MARGIN + label + min(PANELS, len(layers)) * panel
    picture, draw = blank(max(wide, 2 * MARGIN + width_of(title, 18)), TITLE + 24 + lines * block)
    draw.text((MARGIN, 12), title, INK, font(18))
    draw.text(
        (MARGIN, 36),
        f"per cent of the row's tokens, and the bits that the expert tells of it{note}",
        GREY,
        font(12),
    )
    for number, layer in enumerate(layers):
        top = TITLE + 24 + number // PANELS * block
        left = MARGIN + label + number % PANELS * panel
        if number % PANELS == 0:
            for row, name in enumerate(names):
                y = top + 2 * LINE + row * CELL_HEIGHT + 4
                draw.text((MARGIN, y), cut(name, 12, label - 6), INK, font(12))
        bits = mutual_information(counts[number])
        draw.text((left, top), f"{layer[0]} {layer[1]}", INK, font(13))
        draw.text((left, top + 17), f"{bits:.3f} bit", GREY, font(12))
        _cells(draw, counts[number][shown], left, top + 2 * LINE)
    return picture


def _rows_shown(counts: Table) -> tuple[list[int], str]:
    """The rows to show in order, and a remark if these are not all."""
    seen = np.flatnonzero(counts.sum((0, 2)))
    if len(seen) <= MOST_ROWS:
        return [int(row) for row in seen], ""
    telling = np.sum([specialisation(table) for table in counts], axis=0)
    most = np.sort(seen[np.argsort(-telling[seen], kind="stable")[:MOST_ROWS]])
    return [int(row) for row in most], f"; the {MOST_ROWS} most specialised of {len(seen)}"


def _cells(draw: ImageDraw.ImageDraw, table: Table, left: int, top: int) -> None:
    shares = table / table.sum(1, keepdims=True).clip(min=1e-300)
    for (row, expert), share in np.ndenumerate(shares):
        x, y = left + expert * CELL_WIDTH, top + row * CELL_HEIGHT
        colour = shade(float(share))
        draw.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), colour)
        draw.text(
            (x + CELL_WIDTH // 2, y + CELL_HEIGHT // 2), f"{100 * share:.0f}",
            readable_on(colour), font(12), anchor="mm",
        )  # fmt: skip
    for expert in range(table.shape[1]):
        x, y = left + expert * CELL_WIDTH + CELL_WIDTH // 2, top + len(table) * CELL_HEIGHT + 8
        draw.text((x, y), f"e{expert}", GREY, font(12), anchor="mm")


def confusion_picture(confusion: Table, classes: Sequence[str], title: str) -> Image.Image:
    """Draws a confusion matrix, each true class's images by predicted class.

    Args:
        confusion: [C, C] images, true class first.
        classes: class names.
        title: first line.

    Returns:
        The picture.
    """
    number = len(classes)
    named = number <= MOST_LABELS
    cell = max(2, min(34, 900 // number))
    label = min(160, max(width_of(name, 12) for name in classes) + 10) if named else 24
    side = cell * number
    wide = max(2 * MARGIN + label + side, 2 * MARGIN + width_of(title, 18))
    picture, draw = blank(wide, TITLE + 28 + side + label + MARGIN)
    draw.text((MARGIN, 12), title, INK, font(18))
    draw.text((MARGIN, 36), "rows: true class, columns: predicted; per cent", GREY, font(12))
    left, top = MARGIN + label, TITLE + 24
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1e-300)
    for (row, column), share in np.ndenumerate(shares):
        x, y, colour = left + column * cell, top + row * cell, shade(float(share))
        line = int(cell >= 10)
        draw.rectangle((x, y, x + cell - 1 - line, y + cell - 1 - line), colour)
        if cell >= 26 and share > 0:
            draw.text(
                (x + cell // 2, y + cell // 2), f"{100 * share:.0f}",
                readable_on(colour), font(12), anchor="mm",
            )  # fmt: skip
    if not named:
        draw.rectangle((left, top, left + side, top + side), outline=GREY)
        return picture
    size = min(12, cell - 1)
    flat = all(width_of(name, size) < cell for name in classes)
    for place, name in enumerate(classes):
        middle = place * cell + cell // 2
        text = cut(name, size, label - 8)
        draw.text((left - 6, top + middle), text, INK, font(size), anchor="rm")
        if flat:
            draw.text((left + middle, top + side + 4), text, INK, font(size), anchor="mt")
        else:
            _upright(picture, text, left + middle, top + side + 4, size, label)
    return picture


def _upright(picture: Image.Image, text: str, x: int, y: int, size: int, room: int) -> None:
    """Writes a word that ends at (x, y), from below to there."""
    strip, draw = blank(room, size + 6)
    draw.text((room, (size + 6) // 2), text, INK, font(size), anchor="rm")
    picture.paste(strip.rotate(90, expand=True), (x - (size + 6) // 2, y))
