"""What our pictures of tables share: places in pixels, shares as colours, text as it is written."""

import io
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D, IdentityTransform

PIXELS = 72
"""Dots per inch at which a point, the unit of font sizes, is a pixel."""
GREY = "#6e6e6e"
DARK = 0.58
"""Share beyond which a cell's number is white."""
LETTERS = 24
"""Letters of a name that are shown."""
MATRIX = 900
"""Most pixels along a confusion matrix, unless its classes would have less than 2 each."""

literally = mpl.rc_context({"text.parse_math": False})
"""Within it, or a function that it decorates, a text with `$` is no formula."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture, and axes that measure it in pixels from its upper left corner."""
    figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def png(figure: Figure) -> bytes:
    """The picture as a file; text that reaches beyond the figure's edge widens it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()  # so that the layout is done
        whole = figure.get_tightbbox().padded(0.2)
        figure.savefig(file, format="png", dpi="figure", bbox_inches=whole)
    return file.getvalue()


def printable(text: str) -> str:
    """A text in one line; what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def label(name: str) -> str:
    """A name in one line of `LETTERS` letters at most."""
    line = printable(name)
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"


def share_table(
    axes: Axes,
    counts: npt.NDArray[Any],
    corner: tuple[float, float],
    cell: tuple[float, float],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> None:
    """Draws counts [rows, columns] as cells: their share of the row by colour, and in per cent.

    The axes are of a `canvas`. `corner` is x and y at the upper left, `cell` the width and height
    of a cell; a small one goes without its number. Rows are named at the left, columns below.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)
    (left, top), (wide, high) = corner, cell
    x, y = left + wide * np.arange(len(shares.T) + 1), top + high * np.arange(len(shares) + 1)
    line = 1 if min(cell) >= 10 else 0
    axes.pcolormesh(x, y, shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=line)
    bottom, x, y = y[-1], x[:-1] + wide / 2, y[:-1] + high / 2
    if wide >= 26:
        _numbers(axes, shares, np.stack(np.meshgrid(x, y), -1))
    size = min(12, high - 1)
    for name, place in zip(rows, y, strict=bool(rows)):
        axes.text(left - 6, place, label(name), size=size, ha="right", va="center_baseline")
    turn = 90 if any(len(name) * size * 0.7 >= wide for name in columns) else 0
    for name, place in zip(columns, x, strict=bool(columns)):
        axes.text(place, bottom + 5, label(name), size=size, ha="center", va="top", rotation=turn)


def _numbers(axes: Axes, shares: npt.NDArray[np.float64], places: npt.NDArray[np.float64]) -> None:
    """Writes shares at places [..., 2] as one collection: ten times as fast as a text for each."""
    some = shares > 0
    numbers = PathCollection(
        [_outline(f"{100 * share:.0f}") for share in shares[some]],
        offsets=places[some],
        offset_transform=axes.transData,
        facecolors=["white" if share > DARK else "black" for share in shares[some]],
        linewidths=0,
    )
    numbers.set_transform(IdentityTransform())  # outlines are in pixels already
    axes.add_collection(numbers, autolim=False)


@cache
def _outline(number: str) -> Path:
    """A number's outline around (0, 0)."""
    path = TextPath((0, 0), number, size=12)
    box = path.get_extents()
    return path.transformed(Affine2D().translate(*(-(box.p0 + box.p1) / 2)))


@literally
def confusion_figure(
    matrices: Mapping[str, npt.NDArray[np.int64]], classes: Sequence[str], title: str
) -> Figure:
    """Draws confusion matrices, int64 [C, C] by name, at most three beside each other.

    The C classes are named as far as there is room, at the outer matrices.
    """
    cell = max(2, min(34, MATRIX // len(classes)))
    names = classes if cell >= 15 else ()
    number, across = len(matrices), min(3, len(matrices))
    side = cell * len(classes)
    wide, high = max(side, 8 * max(map(len, matrices))) + 24, side + 46
    figure, axes = canvas(wide * across, high * -(-number // across))
    axes.text(0, -24, title, size=18)
    axes.text(
        0, -6, "rows: true class, columns: predicted; per cent of the row", size=12, color=GREY
    )
    for place, (name, counts) in enumerate(matrices.items()):
        left, top = place % across * wide, place // across * high + 34
        axes.text(left, top - 8, printable(name), size=13)
        share_table(
            axes, counts, (left, top), (cell, cell),
            names if place % across == 0 else (), names if place + across >= number else (),
        )  # fmt: skip
    return figure
