"""The contact sheet: some images of every domain and class."""

import io
import warnings

import numpy as np
import numpy.typing as npt

from shards.preview.contents import SIDE, Contents
from shards.read.naming import printable

_GAP, _PER_CELL = 6, 3  # pixels between cells, pictures of a cell
_WIDE, _HIGH = _PER_CELL * SIDE + _GAP, SIDE + _GAP
_MOST_CLASSES, _MOST_DOMAINS = 40, 20
_LETTERS = 24
_TOP, _MARGIN, _LEAST_WIDTH = 56, 8, 480


def contact_sheet(contents: Contents) -> bytes:
    """The sheet as a PNG file; of many classes or domains some, evenly chosen."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    index = contents.index
    classes = _evenly(len(index.classes), _MOST_CLASSES)
    domains = _evenly(len(index.domains), _MOST_DOMAINS)
    pictures = _mosaic(contents, domains, classes)
    names = [_label(index.classes[label]) for label in classes]
    left = 2 * _MARGIN + 8 * max(map(len, names))
    right, bottom = left + pictures.shape[1], _TOP + pictures.shape[0]
    width = max(right, _LEAST_WIDTH)
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure = Figure(figsize=(width / 72, bottom / 72), dpi=72)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(pictures, extent=(left, right, bottom, _TOP), interpolation="nearest")
        axes.set(xlim=(0, width), ylim=(bottom, 0))
        axes.text(_MARGIN, 20, f"{index.name}: {contents.summary()}", size=13)
        for column, domain in enumerate(domains):
            axes.text(left + column * _WIDE, _TOP - 8, _label(index.domains[domain]), size=12)
        for row, name in enumerate(names):
            middle = _TOP + row * _HIGH + SIDE / 2
            axes.text(left - _MARGIN, middle, name, size=12, ha="right", va="center")
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _mosaic(contents: Contents, domains: list[int], classes: list[int]) -> npt.NDArray[np.uint8]:
    """Pictures of each class (row) and domain (column), without text."""
    mosaic = np.full((_HIGH * len(classes), _WIDE * len(domains), 3), 255, np.uint8)
    for column, domain in enumerate(domains):
        labels = contents.index.labels(domain)
        for row, label in enumerate(classes):
            places = np.flatnonzero(labels == label)
            for number, which in enumerate(_evenly(len(places), _PER_CELL)):
                x, y = column * _WIDE + number * SIDE, row * _HIGH
                picture = contents.picture(domain, int(places[which]))
                mosaic[y : y + SIDE, x : x + SIDE] = picture
    return mosaic


def _evenly(count: int, most: int) -> list[int]:
    """Numbers below `count`, at most so many, from the first to the last."""
    chosen = np.linspace(0, max(0, count - 1), min(count, most)).round().astype(int)
    return [int(number) for number in chosen]


def _label(name: str) -> str:
    line = printable(name)
    return line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…"
