"""Routing maps: which expert each patch of some images goes to, as one picture.

A row per image, the image itself first and beside it a map per layer; the experts' colours and the
share of patches that each got are in the legend and under the maps.

Letters: N images, L layers, E experts, H x W the grid of patches.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from trainer.evaluate.drawing import GREY, canvas, label, literally

TILE, GAP = 112, 10
MOST_LAYERS = 12
"""Maps in a row; of more layers an even choice is shown."""
OKABE_ITO = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#5a5a5a",
)  # fmt: skip
"""Okabe and Ito's palette: told apart with every common kind of colour blindness."""

Colour = str | tuple[float, float, float]
ExpertNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shown:
    """An image as the model sees it, uint8 [h, w, 3], its domain and its class's name."""

    pixels: npt.NDArray[np.uint8]
    domain: str
    label: str
    held_out: bool


@literally
def routing_figure(
    images: Sequence[Shown], maps: Mapping[str, ExpertNumbers], experts: Sequence[str], title: str
) -> Figure:
    """Draws the routing maps of N images.

    `maps` has of each layer's path [N, H, W], the number of the expert that each patch went to;
    `experts` are the E experts' names in the legend.
    """
    evenly = np.linspace(0, len(maps) - 1, min(len(maps), MOST_LAYERS)).round().astype(int)
    layers, pitch = [list(maps)[place] for place in evenly], TILE + GAP
    colours, bottom = expert_colours(len(experts)), len(images) * pitch
    figure, axes = canvas((1 + len(layers)) * pitch - GAP, bottom + 36)
    _legend(axes, experts, colours, title, len(layers))
    axes.text(0, -5, "image", size=12)
    for row, image in enumerate(images):
        top = row * pitch
        axes.imshow(image.pixels, extent=(0, TILE, top + TILE, top), aspect="auto")
        middle = top + TILE / 2 - 9 * image.held_out
        _at_the_left(axes, middle - 9, image.domain, "black", 14)
        _at_the_left(axes, middle + 9, image.label, GREY)
        if image.held_out:
            _at_the_left(axes, middle + 27, "held out", "#b44600")
    _at_the_left(axes, bottom + 9, "share of these patches", GREY)
    if len(layers) < len(maps):
        _at_the_left(axes, bottom + 27, f"{len(layers)} of {len(maps)} layers", GREY)
    _tiles(axes, np.stack([maps[layer] for layer in layers]), colours)
    for column, layer in enumerate(layers, start=1):
        axes.text(column * pitch, -5, "\n".join(layer_title(layer)).rstrip(), size=12)
        _shares(axes, maps[layer], colours, column * pitch, bottom)
    return figure


def _at_the_left(axes: Axes, y: float, text: str, colour: str, size: int = 12) -> None:
    axes.text(-10, y, label(text), size=size, color=colour, ha="right", va="center")


def expert_colours(number: int) -> list[Colour]:
    """A colour per expert: the palette, and beyond its eight evenly spaced hues."""
    more = max(0, number - len(OKABE_ITO))
    hues: list[Colour] = [
        colorsys.hsv_to_rgb(i / more, 0.45, 0.75 if i % 2 else 0.95) for i in range(more)
    ]
    return [*OKABE_ITO, *hues][:number]


def layer_title(path: str) -> tuple[str, str]:
    """Two lines for a layer: `blocks.2.attn.qkv` is block 2, attn.qkv."""
    head, _, rest = path.rpartition("blocks.")[2].partition(".")
    return (f"block {head}", rest) if head.isdigit() else (path, "")


def _legend(
    axes: Axes, experts: Sequence[str], colours: Sequence[Colour], title: str, layers: int
) -> None:
    """The experts' colours, as many in a line as there is room for, and the title above."""
    across = min(len(experts), max(4, (1 + layers) * (TILE + GAP) // 150))
    top = -46 - 20 * -(-len(experts) // across)
    patches = [Patch(color=c, label=name) for c, name in zip(colours, experts, strict=True)]
    axes.legend(
        handles=patches, ncols=across, loc="upper left", bbox_to_anchor=(0, top),
        bbox_transform=axes.transData, frameon=False, borderpad=0, borderaxespad=0, fontsize=13,
        handlelength=1, handleheight=1, labelspacing=0.4, columnspacing=1.4,
    )  # fmt: skip
    axes.text(0, top - 14, title, size=18)


def _tiles(axes: Axes, maps: npt.NDArray[np.int64], colours: Sequence[Colour]) -> None:
    """All maps [L, N, H, W] as one mesh with gaps, in the columns beside the images."""
    layers, images, high, wide = maps.shape
    cells = np.full((images, high + 1, layers, wide + 1), np.nan)  # a last one for the gap
    cells[:, :high, :, :wide] = maps.transpose(1, 2, 0, 3)
    x, y = (
        np.add.outer(np.arange(first, first + number) * (TILE + GAP), np.linspace(0, TILE, n + 1))
        for first, number, n in ((1, layers, wide), (0, images, high))
    )
    line = 1 if TILE // max(high, wide) >= 8 else 0
    axes.pcolormesh(
        x.ravel(), y.ravel(), cells.reshape(y.size, x.size)[:-1, :-1],
        cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5,
        edgecolors="white", linewidth=line,
    )  # fmt: skip


def _shares(
    axes: Axes, maps: ExpertNumbers, colours: Sequence[Colour], left: float, top: float
) -> None:
    """A bar of the experts' shares of all patches [N, H, W], the largest one's in per cent."""
    shares = np.bincount(maps.ravel(), minlength=len(colours)) / maps.size
    starts = left + TILE * (np.cumsum(shares) - shares)
    axes.barh(top + 9, TILE * shares, height=14, left=starts, color=colours)
    most = int(shares.argmax())
    text = f"expert {most}: {100 * shares[most]:.0f} %"
    axes.text(left, top + 27, text, size=12, color=GREY, va="center")
