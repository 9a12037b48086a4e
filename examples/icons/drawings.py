"""Icon themes as freedesktop.org lays them out: which files there are, and their pixels."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIDE = 64
"""Of all pictures, in pixels."""
BACKGROUND = (255, 255, 255)
"""What shows where a drawing is transparent."""
FAINTEST = 48
"""A drawing whose pixels are all nearer to the background than this (of 255) shows nothing."""
_SIZE = re.compile(r"(\d+)(?:x\d+)?(?:@(\d)x)?")


@dataclass(frozen=True)
class Drawing:
    """One drawing of a theme.

    Attributes:
        name: of the icon, such as `go-up` or `go-up-symbolic`.
        path: the file, links followed.
    """

    name: str
    path: Path

    @property
    def own_name(self) -> str:
        """Name of the file itself; another one where `name` is an alias."""
        return self.path.stem


def _distance(file: Path) -> tuple[int, bool]:
    """How well a file serves at `SIDE`, the least best: its size, larger before smaller; vectors.

    A folder without a number, such as `scalable`, holds vectors for every size.
    """
    found = [match for part in file.parts if (match := _SIZE.fullmatch(part))]
    size = int(found[-1][1]) * int(found[-1][2] or 1) if found else SIDE
    return (size - SIDE if size >= SIDE else 1000 - size), file.suffix != ".svg"


def drawings(theme: Path) -> list[Drawing]:
    """One drawing a name, in the file that suits `SIDE` best; those that are no links first.

    Links that end outside the theme are left out.
    """
    best: dict[str, tuple[tuple[int, bool], Path]] = {}
    home = theme.resolve()
    for folder, folders, files in os.walk(theme):
        folders.sort()  # of two files that suit as well the first is taken, on every disk
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix not in (".svg", ".png"):
                continue
            rank = _distance(path.relative_to(theme))
            if path.stem not in best or rank < best[path.stem][0]:
                target = path.resolve()
                if target.is_file() and target.is_relative_to(home):
                    best[path.stem] = (rank, target)
    found = [Drawing(name, path) for name, (_, path) in best.items()]
    return sorted(found, key=lambda d: (d.name != d.own_name, d.name))


def distinct(found: list[Drawing]) -> Iterator[Drawing]:
    """Without the aliases of drawings that are there already."""
    seen: set[str] = set()
    for drawing in found:
        if drawing.own_name not in seen:
            seen.add(drawing.own_name)
            yield drawing


def _rendered(path: Path, width: int | None, height: int | None) -> Image.Image:
    """An SVG, without fonts: text would look different on every machine."""
    data = resvg_py.svg_to_bytes(
        svg_path=str(path), width=width, height=height, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(data)))


def picture(path: Path) -> Image.Image | None:
    """A drawing at `SIDE`, centred, with transparency; None if it cannot be read."""
    try:
        if path.suffix == ".svg":
            drawn: Image.Image = _rendered(path, SIDE, None)
            drawn = _rendered(path, None, SIDE) if drawn.height > SIDE else drawn
        else:
            drawn = Image.open(path)
        drawn = drawn.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    zoom = SIDE / max(drawn.size)
    size = [max(1, round(side * zoom)) for side in drawn.size]
    drawn = drawn.resize((size[0], size[1]), Image.Resampling.LANCZOS) if zoom != 1 else drawn
    page = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUND, 0))
    page.paste(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return page


def on_background(drawn: Image.Image) -> Image.Image | None:
    """A drawing as RGB; None if nothing is to be seen."""
    page = Image.new("RGBA", drawn.size, (*BACKGROUND, 255))
    result = Image.alpha_composite(page, drawn).convert("RGB")
    contrast = np.abs(np.asarray(result, int) - BACKGROUND).max()
    return result if contrast >= FAINTEST else None


def fingerprint(image: Image.Image) -> str:
    """Hash of the pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()
