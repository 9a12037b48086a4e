"""Image bytes to normalised tensors: decoding, training augmentation and evaluation resize.

All random numbers come from torch's default generator, in an order that depends on nothing but the
image's own draws, so that seeding it per stream position fixes the pixels.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from shards.config import ResolvedAugment
from shards.errors import DataConfigError

ImageTransform: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_JPEG_MAGIC = b"\xff\xd8\xff"
_CROP_SCALE = (0.7, 1.0)  # DomainBed's training augmentation, like the jitter and grey rates below
_JITTER = 0.3
_GREY = 0.1
_TO_LEVEL = 255.999 / 255  # then cut off: torchvision's way from [0, 1] to grey levels
_SECTORS = torch.tensor([5.0, 3.0, 1.0])[:, None, None]  # where R, G, B fall off in the hue circle
_INTERPOLATIONS = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def decode_image(data: bytes) -> torch.Tensor:
    """Decode an image file of any common format.

    JPEG goes through torchvision's decoder, everything else, and any JPEG it refuses, through
    Pillow. EXIF rotation is ignored, as in DomainBed.

    Args:
        data: The file's bytes.

    Returns:
        uint8 tensor [3, H, W], RGB.

    Raises:
        ValueError: If no decoder can read it.
    """
    if data.startswith(_JPEG_MAGIC):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            decoded: torch.Tensor = decode_jpeg(buffer, mode=ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # Pillow reads some files that torchvision refuses, and explains the others
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and palette oddities that change no pixel
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def undecodable_placeholder() -> torch.Tensor:
    """Make the image that stands for one that cannot be decoded but must be counted.

    Returns:
        uint8 tensor [3, 32, 32], mid-grey.
    """
    return torch.full((3, 32, 32), 127, dtype=torch.uint8)


def train_transform(data_config: Mapping[str, Any], augment: ResolvedAugment) -> ImageTransform:
    """Build the training transform: DomainBed's augmentation at the backbone's size.

    Args:
        data_config: What `timm.data.resolve_model_data_config` gives: `input_size` (3, H, W),
            `interpolation`, `mean`, `std`.
        augment: `domainbed` (random crop of 70 to 100 %, mirroring, colour jitter, sometimes grey),
            `no_flip` (the same without mirroring) or `none` (the evaluation transform).

    Returns:
        A function from uint8 [3, h, w] to float32 [3, H, W].

    Raises:
        DataConfigError: If the augmentation or the interpolation is unknown.
    """
    if augment == "none":
        return eval_transform(data_config)
    if augment not in ("domainbed", "no_flip"):
        raise DataConfigError(
            f"augment = {augment!r}: must be domainbed, no_flip or none "
            "(`DataConfig.resolved_augment()` gives what `auto` stands for)"
        )
    crop = v2.RandomResizedCrop(
        _size(data_config), scale=_CROP_SCALE, interpolation=_interpolation(data_config)
    )
    flip = [v2.RandomHorizontalFlip()] if augment == "domainbed" else []
    colour = [_ColourJitter(), v2.RandomGrayscale(_GREY)]
    return _compose([crop, *flip, *colour, *_normalise(data_config)])


def eval_transform(data_config: Mapping[str, Any]) -> ImageTransform:
    """Build the evaluation transform: the whole image at the backbone's size, without a crop.

    Args:
        data_config: As for `train_transform`.

    Returns:
        A function from uint8 [3, h, w] to float32 [3, H, W].

    Raises:
        DataConfigError: If the interpolation is unknown.
    """
    resize = v2.Resize(_size(data_config), interpolation=_interpolation(data_config))
    return _compose([resize, *_normalise(data_config)])


def shift_hue(image: torch.Tensor, shift: float) -> torch.Tensor:
    """Turn the hue of an image; equals torchvision's `adjust_hue` to one grey level.

    Args:
        image: uint8 tensor [3, H, W].
        shift: Part of a full turn of the colour circle, in [-0.5, 0.5].

    Returns:
        uint8 tensor [3, H, W].
    """
    rgb = image.float()
    value, chroma_channel = rgb.max(dim=0)
    chroma = value - rgb.amin(dim=0)
    # hue in sixths of a turn: 2 x the channel of the maximum + the signed distance of the others
    following = rgb.roll(-1, dims=0) - rgb.roll(-2, dims=0)  # (G - B, B - R, R - G)
    distance = following.gather(0, chroma_channel[None])[0] / chroma.clamp(min=1)
    hue = chroma_channel * 2 + distance + shift * 6
    sector = (hue[None] + _SECTORS).remainder(6)
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    shifted: torch.Tensor = ((value - chroma * ramp) * _TO_LEVEL).to(torch.uint8)
    return shifted


class _ColourJitter:
    """Brightness, contrast, saturation and hue in random order, as torchvision's `ColorJitter`.

    Written out because hue dominates the cost of the whole chain, and `shift_hue` halves it.
    """

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        low, high = 1 - _JITTER, 1 + _JITTER
        order = torch.randperm(4).tolist()
        *factors, shift = torch.rand(4).tolist()
        scales = [low + factor * (high - low) for factor in factors]
        for step in order:
            if step == 0:
                image = functional.adjust_brightness(image, scales[0])
            elif step == 1:
                image = functional.adjust_contrast(image, scales[1])
            elif step == 2:
                image = functional.adjust_saturation(image, scales[2])
            else:
                image = shift_hue(image, (2 * shift - 1) * _JITTER)
        return image


def _compose(steps: list[Any]) -> ImageTransform:
    """Chain transforms."""
    chain: ImageTransform = v2.Compose(steps)
    return chain


def _normalise(data_config: Mapping[str, Any]) -> list[Any]:
    """Build the last steps: uint8 to float32 in [0, 1], then mean and standard deviation."""
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(data_config["mean"]), list(data_config["std"])),
    ]


def _size(data_config: Mapping[str, Any]) -> tuple[int, int]:
    """Give the height and width the backbone expects."""
    _, height, width = data_config["input_size"]
    return int(height), int(width)


def _interpolation(data_config: Mapping[str, Any]) -> InterpolationMode:
    """Give the interpolation of the backbone's data config."""
    name = data_config.get("interpolation", "bicubic")
    if name not in _INTERPOLATIONS:
        raise DataConfigError(
            f"interpolation = {name!r} in the backbone's data config: must be one of "
            f"{', '.join(_INTERPOLATIONS)}"
        )
    return _INTERPOLATIONS[name]
