"""The contact sheet: some images of every domain and class."""

import io
import warnings

import numpy as np

from shards.preview.contents import SIDE, Contents
from shards.read.naming import printable

_GAP, _PER_CELL = 6, 3  # pixels between cells, pictures of a cell
_MOST_CLASSES = 40
_LETTERS = 24


def contact_sheet(contents: Contents) -> bytes:
    """The contact sheet as a PNG file: some images of every domain and class."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    index = contents.index
    count = min(len(index.classes), _MOST_CLASSES)
    classes = np.linspace(0, len(index.classes) - 1, count).round().astype(int)
    wide, high = _PER_CELL * SIDE + _GAP, SIDE + _GAP
    shape = (high * count, wide * len(index.domains), 3)
    mosaic = np.full(shape, 255, np.uint8)
    for domain in range(len(index.domains)):
        labels = index.labels(domain)
        for row, label in enumerate(classes):
            places = np.flatnonzero(labels == label)
            some = places[np.linspace(0, len(places) - 1, min(len(places), _PER_CELL)).astype(int)]
            for column, place in enumerate(some.tolist()):
                x, y = domain * wide + column * SIDE, row * high
                mosaic[y : y + SIDE, x : x + SIDE] = contents.picture(domain, place)
    left, top = 10 + 8 * max(len(_label(index.classes[label])) for label in classes), 56
    width, height = left + shape[1], top + shape[0]
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        axes.imshow(mosaic, extent=(left, width, height, top), interpolation="nearest")
        axes.text(8, 20, f"{index.name}: {contents.summary()}", size=13)
        for domain, name in enumerate(index.domains):
            axes.text(left + domain * wide, top - 8, _label(name), size=12)
        for row, label in enumerate(classes):
            name = _label(index.classes[label])
            axes.text(left - 8, top + row * high + SIDE / 2, name, size=12, ha="right",
                      va="center")  # fmt: skip
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _label(name: str) -> str:
    line = printable(name)
    return line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…"
