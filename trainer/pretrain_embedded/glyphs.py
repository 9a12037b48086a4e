"""Random glyph images for pretraining the embedded backbone, rendered with matplotlib's fonts.

Every glyph is rendered once and stored as a signed distance field. A batch is then drawn with
tensor operations only: moving, bending, thickening, outlining and softening a glyph are all cheap
on a distance field, so drawing never holds up the training step.

Letters in shape comments: G glyphs in the bank, B images in the batch, S side of the image (32).
"""

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

from trainer.prepare.vit_embedded import GLYPH_CLASSES, IMAGE_SIZE

TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmti10", "cmmi10"),
)
"""Fonts the weights are trained on, by file name without suffix."""

HELD_OUT_FONTS = ("cmss10", "cmtt10", "STIXGeneralBolIta")
"""Fonts kept for validation only."""

_RENDER, _BANK = 128, 64  # sides in pixels: of a rendered glyph, of a stored distance field
_BOX = 0.6875  # longest side of the glyph as a fraction of the canvas


def _render(font_path: Path, characters: Iterable[str]) -> Tensor:
    """Characters centred and at one size, as masks [G, 128, 128]."""
    font = ImageFont.truetype(str(font_path), 160)
    masks = []
    for character in characters:
        page = Image.new("L", (480, 480))
        ImageDraw.Draw(page).text((120, 120), character, font=font, fill=255)
        box = page.getbbox()
        if box is None:
            raise ValueError(f"font {font_path.name} draws nothing for {character!r}")
        glyph = page.crop(box)
        zoom = _BOX * _RENDER / max(glyph.size)
        width, height = (max(1, round(side * zoom)) for side in glyph.size)
        canvas = Image.new("L", (_RENDER, _RENDER))
        glyph = glyph.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(glyph, ((_RENDER - width) // 2, (_RENDER - height) // 2))
        masks.append(torch.from_numpy(np.array(canvas)) > 127)
    return torch.stack(masks)


def _distance(mask: Tensor) -> Tensor:
    """Distance in pixels from every pixel to the nearest true one, [G, 128, 128]."""
    squared = np.stack([distance_transform_edt(~glyph) ** 2 for glyph in mask.numpy()]).round()
    return torch.from_numpy(squared).float().sqrt()  # torch's root: its last bit is in the weights


def _signed_distance(mask: Tensor) -> Tensor:
    """Distance to the edge, positive inside, in glyph sizes: [G, 128, 128] to [G, 64, 64].

    One glyph size is the longest side of the glyph's bounding box.
    """
    signed = (_distance(~mask) - _distance(mask)) / (_BOX * _RENDER)
    return F.avg_pool2d(signed[:, None], _RENDER // _BANK)[:, 0]


class GlyphBank:
    """Distance fields of every character of every class in some fonts.

    Attributes:
        fields: signed distances in glyph sizes, positive inside, [G, 64, 64].
        labels: class number of every glyph, [G].
        weights: sampling weights that make all classes equally frequent, [G].
    """

    def __init__(self, fonts: Iterable[str], classes: tuple[str, ...] = GLYPH_CLASSES) -> None:
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        characters = "".join(classes)
        masks = [_render(folder / f"{font}.ttf", characters) for font in fonts]
        labels = [index for index, group in enumerate(classes) for _ in group]
        self.fields = torch.cat([_signed_distance(mask) for mask in masks])
        self.labels = torch.tensor(labels).repeat(len(masks))
        self.weights = 1.0 / torch.bincount(self.labels).float()[self.labels]


class GlyphSampler:
    """Draws labelled random images from a bank; equal seeds give equal images."""

    def __init__(self, bank: GlyphBank, seed: int) -> None:
        self._bank, self._generator = bank, torch.Generator().manual_seed(seed)

    def batch(self, size: int, difficulty: float) -> tuple[Tensor, Tensor]:
        """One batch: images [B, 3, 32, 32] in [-1, 1] and class numbers [B].

        Args:
            size: B.
            difficulty: 0 draws large, centred, upright glyphs, white on black; 1 draws the full
                range of places, shapes, strokes, resolutions, polarities, colours and noise.
        """
        chosen = torch.multinomial(self._bank.weights, size, True, generator=self._generator)
        distance = self._place(self._bank.fields[chosen], difficulty)
        ink = self._coarsen(self._ink(distance, difficulty), difficulty)
        return self._paint(ink, difficulty) * 2 - 1, self._bank.labels[chosen]

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._generator)

    def _noise(self, batch: int, channels: int, cells: int) -> Tensor:
        """Smooth noise of about unit variance with `cells` cells a side, [B, C, S, S]."""
        coarse = torch.randn(batch, channels, cells, cells, generator=self._generator)
        return F.interpolate(coarse, IMAGE_SIZE, mode="bicubic", align_corners=False)

    def _place(self, fields: Tensor, t: float) -> Tensor:
        """Scale, turn, shear, shift and bend; returns distances in image pixels [B, S, S]."""
        n = len(fields)
        size = self._uniform(0.85 - 0.35 * t, 0.85 + 0.15 * t, n)  # fraction of the image side
        angle = self._uniform(-t, t, n) * math.radians(25)
        shear = self._uniform(-0.3 * t, 0.3 * t, n)
        aspect = torch.exp(self._uniform(-0.25 * t, 0.25 * t, n))
        room = (1 - size).clamp(min=0) + 0.06
        shift = self._uniform(-t, t, n, 2) * room[:, None]
        cos, sin, zoom = angle.cos(), angle.sin(), _BOX / size
        rows = [(cos - shear * sin) * aspect, (sin + shear * cos) * aspect, -sin / aspect]
        matrix = torch.stack([*rows, cos / aspect], -1).view(n, 1, 2, 2) * zoom.view(n, 1, 1, 1)
        axis = (torch.arange(IMAGE_SIZE) + 0.5) * (2 / IMAGE_SIZE) - 1
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        bend = self._uniform(0, 0.1 * t, n, 1, 1, 1) * self._noise(n, 2, 4)
        points = grid + bend.permute(0, 2, 3, 1) - shift.view(n, 1, 1, 2)
        points = (matrix @ points.flatten(1, 2)[..., None]).view_as(points)
        moved = F.grid_sample(fields[:, None], points, padding_mode="border", align_corners=False)
        return moved[:, 0] * (size * IMAGE_SIZE).view(n, 1, 1)

    def _ink(self, distance: Tensor, t: float) -> Tensor:
        """Draw filled glyphs, some as outlines, in a random stroke width; coverage in [0, 1]."""
        n = len(distance)
        swell = self._uniform(0.2 - 0.4 * t, 0.2 + t, n, 1, 1)
        softness = self._uniform(0.3, 0.3 + 0.4 * t, n, 1, 1)
        outlined = self._uniform(0, 1, n, 1, 1) < 0.15 * t
        depth = torch.where(outlined, 0.5 + 0.5 * swell - distance.abs(), distance + swell)
        return torch.sigmoid(depth / softness)

    def _coarsen(self, ink: Tensor, t: float) -> Tensor:
        """Lower the resolution of some images and the number of grey levels of others."""
        n = len(ink)
        coarse = ink.clone()
        group = self._uniform(0, 1, n) / max(t, 1e-6)
        for index, mode in enumerate(("nearest", "bilinear", "bicubic")):
            members = ((group >= index / 6) & (group < (index + 1) / 6)).nonzero()[:, 0]
            cells = int(torch.randint(8, 17, (), generator=self._generator))
            if len(members):
                small = F.adaptive_avg_pool2d(ink[members, None], cells)
                coarse[members] = F.interpolate(small, IMAGE_SIZE, mode=mode)[:, 0].clamp(0, 1)
        steps = torch.randint(1, 6, (n, 1, 1), generator=self._generator)
        posterised = self._uniform(0, 1, n, 1, 1) < 0.2 * t
        return torch.where(posterised, (coarse * steps).round() / steps, coarse)

    def _paint(self, ink: Tensor, t: float) -> Tensor:
        """Colour ink and background, add texture and noise; [B, S, S] to [B, 3, S, S]."""
        n = len(ink)
        tint = 0.2 * self._uniform(-t, t, 2, n, 3, 1, 1)
        dark = self._uniform(0, 0.35 * t, n, 1, 1, 1) + tint[0]
        light = 1 - self._uniform(0, 0.35 * t, n, 1, 1, 1) + tint[1]
        cells = int(torch.randint(3, 17, (), generator=self._generator))
        texture = self._uniform(0, 0.12 * t, n, 1, 1, 1) * self._noise(n, 1, cells)
        image = torch.lerp((dark + texture).clamp(0, 1), light.clamp(0, 1), ink[:, None])
        inverted = self._uniform(0, 1, n, 1, 1, 1) < 0.5 * t
        image = torch.where(inverted, 1 - image, image)
        grain = torch.randn(image.shape, generator=self._generator)
        return (image + self._uniform(0, 0.06 * t, n, 1, 1, 1) * grain).clamp(0, 1)
