"""DomainBed's colour augmentation: jitter, then sometimes grey, from numbers that are drawn first.

Drawing and applying are apart, so that the loader may draw and the model's device apply, a whole
batch at a time, to the same effect up to rounding.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from shards.decoding import Pixels

DRAWS = 9
"""Length of a draw: the order of the four steps, three factors, the turn of hue, grey or not."""

_JITTER = 0.3
_GREY = 0.1
_TO_LEVEL = 255.999 / 255  # then cut off: torchvision's way from [0, 1] to grey levels
_SECTORS = torch.tensor([5.0, 3.0, 1.0])[:, None, None]  # where R, G, B fall off in the hue circle


def draw_colour() -> torch.Tensor:
    """Draw what happens to one image, from torch's default generator.

    Returns:
        float32 tensor [DRAWS].
    """
    order = torch.randperm(4).float()
    low, high = 1 - _JITTER, 1 + _JITTER
    *factors, turn = torch.rand(4).tolist()
    scales = [low + factor * (high - low) for factor in factors]
    grey = float(torch.rand(1) < _GREY)
    return torch.cat([order, torch.tensor([*scales, (2 * turn - 1) * _JITTER, grey])])


def apply_colour(image: Pixels, draw: torch.Tensor) -> Pixels:
    """Apply a draw to one image.

    Args:
        image: uint8 tensor [3, H, W], or Pillow's image.
        draw: float32 tensor [DRAWS].

    Returns:
        An image of the same kind.
    """
    brightness, contrast, saturation, turn, grey = draw[4:].tolist()
    for step in draw[:4].int().tolist():
        if step == 0:
            image = functional.adjust_brightness(image, brightness)
        elif step == 1:
            image = functional.adjust_contrast(image, contrast)
        elif step == 2:
            image = functional.adjust_saturation(image, saturation)
        elif isinstance(image, Image.Image):
            image = functional.adjust_hue(image, turn)
        else:
            image = shift_hue(image, turn)
    return functional.rgb_to_grayscale(image, num_output_channels=3) if grey else image


def apply_colour_batch(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Apply a draw to every image of a batch, on whatever device they are.

    Args:
        images: uint8 tensor [b, 3, H, W].
        draws: float32 tensor [b, DRAWS] on the CPU, where choosing rows waits for no device.

    Returns:
        uint8 tensor [b, 3, H, W]; `images` is left as it was.
    """
    images = images.clone()
    steps: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
        _brightness, _contrast, _saturation, shift_hue,
    )  # fmt: skip
    for place in range(4):
        for number, step in enumerate(steps):
            rows = (draws[:, place] == number).nonzero()[:, 0]
            if len(rows):
                amount = draws[rows, 4 + number].to(images.device)[:, None, None, None]
                rows = rows.to(images.device)
                images[rows] = step(images[rows], amount)
    grey = draws[:, -1].nonzero()[:, 0].to(images.device)
    if len(grey):
        images[grey] = _luminance(images[grey]).to(torch.uint8).expand(-1, 3, -1, -1)
    return images


def shift_hue(image: torch.Tensor, shift: float | torch.Tensor) -> torch.Tensor:
    """Turn the hue of images; equals torchvision's `adjust_hue` to one grey level.

    Args:
        image: uint8 tensor [..., 3, H, W].
        shift: Part of a full turn of the colour circle, in [-0.5, 0.5]; a tensor must broadcast
            against [..., 1, H, W].

    Returns:
        uint8 tensor [..., 3, H, W].
    """
    rgb = image.float()
    red, green, blue = rgb.unbind(dim=-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = red == value, green == value
    distance = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    distance /= chroma.clamp(min=1)
    # hue in sixths of a turn: 2 x the channel of the maximum + the signed distance of the others
    hue = (torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + distance).unsqueeze(-3)
    sector = (hue + shift * 6) + _SECTORS.to(image.device)
    sector -= (sector * (1 / 6)).floor_() * 6  # the remainder, several times faster
    ramp = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    level = (value.unsqueeze(-3) - chroma.unsqueeze(-3) * ramp) * _TO_LEVEL
    return level.to(torch.uint8)


def _brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black; like the next two, torchvision's function with one factor per image."""
    return (images * factor).clamp_(0, 255).to(torch.uint8)


def _contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the mean luminance."""
    mean = _luminance(images).floor_().mean(dim=(-3, -2, -1), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the luminance."""
    grey = _luminance(images).floor_()
    return (images * factor + grey * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _luminance(images: torch.Tensor) -> torch.Tensor:
    """Weigh the channels: float32 [b, 1, H, W]."""
    red, green, blue = images.unbind(dim=-3)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]
