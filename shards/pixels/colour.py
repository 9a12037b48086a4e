"""DomainBed's colour augmentation: jitter, then sometimes grey, from numbers that are drawn first.

Drawing and applying are apart, so that the loader may draw and the model's device apply, a whole
batch at a time, to the same effect up to rounding. From step to step pixels stay *levels*: whole
numbers from 0 to 255 as float32. They are what torchvision's steps give on uint8, without its
repeated conversions, which take as long as the arithmetic.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms.v2 import functional

from shards.pixels.decoding import Pixels

DRAWS = 9
"""Length of a draw: the order of the four steps, three factors, the turn of hue, grey or not."""

_JITTER = 0.3
_GREY = 0.1
_TO_LEVEL = 255.999 / 255  # then cut off: torchvision's way from [0, 1] to levels


def draw_colour() -> torch.Tensor:
    """Draw what happens to one image, float32 [DRAWS], from torch's default generator."""
    order = torch.randperm(4).float()
    low, high = 1 - _JITTER, 1 + _JITTER
    *factors, turn = torch.rand(4).tolist()
    scales = [low + factor * (high - low) for factor in factors]
    grey = float(torch.rand(1) < _GREY)
    return torch.cat([order, torch.tensor([*scales, (2 * turn - 1) * _JITTER, grey])])


def apply_colour(image: Pixels, draw: torch.Tensor) -> Pixels:
    """Apply a draw [DRAWS] to one image: levels [3, H, W], or Pillow's image if it was one."""
    steps = _STEPS if isinstance(image, torch.Tensor) else _PILLOW_STEPS
    result = image.float() if isinstance(image, torch.Tensor) else image
    amounts = draw[4:8].tolist()
    for number in draw[:4].int().tolist():
        result = steps[number](result, amounts[number])
    if isinstance(result, torch.Tensor):
        return _grey(result) if draw[-1] else result
    return functional.rgb_to_grayscale(result, 3) if draw[-1] else result


def apply_colour_batch(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Apply a draw to every image of a batch, on whatever device they are; gives levels.

    `images` are uint8 [b, 3, H, W]; `draws` float32 [b, DRAWS] on the CPU. There the images are
    sorted by their first step, then by their second, and so on: each step meets a run of images
    whose length is known, and all that the device has to know travels at once, unawaited.
    """
    order, number = draws[:, :4].int(), len(draws)
    sorted_by = [order[:, place].argsort(stable=True) for place in range(4)]
    # From each order to the next, from the last to the images' own; and what is done, in each.
    orders = [torch.arange(number), *sorted_by, torch.arange(number)]
    moves = [before.argsort()[after] for before, after in itertools.pairwise(orders)]
    amounts = [draws[rows, 4 + order[rows, place].long()] for place, rows in enumerate(sorted_by)]
    told = torch.stack([*moves, *amounts, draws[:, -1]]).float()
    if images.is_cuda:
        told = told.pin_memory()
    told = told.to(images.device, non_blocking=True)
    indices, amount_of = told[:5].int(), told[5:, :, None, None, None]
    levels = images
    for place in range(4):
        levels = levels.index_select(0, indices[place]).float()
        lengths = order[:, place].bincount(minlength=4).tolist()
        runs = zip(
            torch.split(levels, lengths), torch.split(amount_of[place], lengths), strict=True
        )
        for step, (run, amount) in zip(_STEPS, runs, strict=True):
            if len(run) and (changed := step(run, amount)) is not run:
                run.copy_(changed)
    levels = levels.index_select(0, indices[4])
    return torch.where(amount_of[4] > 0, _luminance(levels), levels)


def shift_hue(levels: torch.Tensor, shift: float | torch.Tensor) -> torch.Tensor:
    """Turn the hue of images; equals torchvision's `adjust_hue` to one level.

    The `levels` [..., 3, H, W] stay as they were. The `shift`, part of a full turn of the colour
    circle, lies in [-0.5, 0.5]; a tensor must broadcast against [..., 1, H, W].
    """
    red, green, blue = levels.unbind(dim=-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = red == value, green == value
    distance = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    distance /= chroma.clamp(min=1)
    # hue in sixths of a turn: 2 x the channel of the maximum + the signed distance of the others
    hue = torch.where(is_green, 2.0, 4.0).masked_fill_(is_red, 0.0).add_(distance).unsqueeze(-3)
    sector = hue.add_(shift * 6) + _sectors(levels.device)
    turns = sector * (1 / 6)
    sector -= turns.floor_().mul_(6)  # the remainder, several times faster
    ramp = torch.minimum(sector, torch.sub(4, sector, out=turns), out=turns).clamp_(0, 1)
    fall = ramp.mul_(chroma.unsqueeze(-3))
    return torch.sub(value.unsqueeze(-3), fall, out=fall).mul_(_TO_LEVEL).floor_()


@functools.cache
def _sectors(device: torch.device) -> torch.Tensor:
    """Where R, G and B fall off in the hue circle [3, 1, 1]; brought to a device only once."""
    with torch.inference_mode(False):  # training uses what an evaluation made
        return torch.tensor([5.0, 3.0, 1.0], device=device)[:, None, None]


def _brightness(levels: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Blend with black, in place; like the next two, torchvision's function."""
    return levels.mul_(factor).clamp_(0, 255).floor_()


def _contrast(levels: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Blend with the mean luminance, in place."""
    return _blend(levels, _luminance(levels).mean(dim=(-3, -2, -1), keepdim=True), factor)


def _saturation(levels: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Blend with the luminance, in place."""
    return _blend(levels, _luminance(levels), factor)


_STEPS: tuple[Callable[[Any, Any], Any], ...] = (_brightness, _contrast, _saturation, shift_hue)
_PILLOW_STEPS: tuple[Callable[[Any, Any], Any], ...] = (
    functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
    functional.adjust_hue,
)  # fmt: skip


def _blend(levels: torch.Tensor, other: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Blend in place; one factor is rounded as torchvision's blend rounds it."""
    if isinstance(factor, torch.Tensor):
        levels.mul_(factor).add_(other * (1 - factor))
    else:
        levels.mul_(factor).add_(other, alpha=1 - factor)
    return levels.clamp_(0, 255).floor_()


def _grey(levels: torch.Tensor) -> torch.Tensor:
    """Take the luminance for all three channels."""
    return _luminance(levels).expand_as(levels)


def _luminance(levels: torch.Tensor) -> torch.Tensor:
    """Weigh the channels: levels [..., 1, H, W]."""
    red, green, blue = levels.unbind(dim=-3)
    weighed = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return weighed.floor_().unsqueeze(-3)
