"""Pixels to normalised tensors: training augmentations and the evaluation resize.

All random numbers come from torch's default generator, in an order that depends on nothing but the
image's own draws, so that seeding it per stream position fixes the pixels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from torchvision.transforms import InterpolationMode, v2

from shards.config import ResolvedAugment
from shards.errors import DataConfigError
from shards.pixels.colour import apply_colour, apply_colour_batch, draw_colour
from shards.pixels.decoding import Pixels, to_tensor


class HalfDone(NamedTuple):
    """An image whose colours are still to be changed, on the model's device.

    Attributes:
        image: uint8 [3, H, W].
        draw: float32 [DRAWS] of `shards.pixels.colour`; [0] if only normalising is left.
    """

    image: torch.Tensor
    draw: torch.Tensor


ImageTransform: TypeAlias = Callable[[Pixels], torch.Tensor]
LoaderTransform: TypeAlias = Callable[[Pixels], torch.Tensor | HalfDone]

_CROP_SCALE = (0.7, 1.0)  # DomainBed's and CLIPood's
_COLOURED = ("domainbed", "no_flip")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def train_transform(data_config: Mapping[str, Any], augment: ResolvedAugment) -> ImageTransform:
    """Build the training transform, from pixels to float32 [3, H, W].

    Args:
        data_config: what `timm.data.resolve_model_data_config` gives: `input_size` (3, H, W),
            `interpolation`, `mean`, `std`.
        augment: `domainbed` (random crop of 70 to 100 %, mirroring, colour jitter, sometimes grey),
            `no_flip` (the same without mirroring), `crop_flip` (without colours), `randaugment`
            (torchvision's after crop and mirroring) or `none` (the evaluation transform).

    Raises:
        DataConfigError: the augmentation or the interpolation is unknown.
    """
    colour = [_colour] if augment in _COLOURED else []
    steps = [*_shape(data_config, augment), *colour, _normalise(data_config)]
    return v2.Compose(steps)  # type: ignore[no-any-return]


def loader_transform(
    data_config: Mapping[str, Any], augment: ResolvedAugment, *, colours: bool = False
) -> LoaderTransform:
    """Build the loader's part of the training transform, to uint8; `finish_batch` is the rest.

    It draws the same random numbers as `train_transform`, and takes and raises the same. With
    `colours` it changes these as well: then the two together give bit for bit what that does.
    """
    steps = _shape(data_config, augment)
    coloured = augment in _COLOURED
    if colours and coloured:
        steps.append(_colour)
    shape = v2.Compose(steps)
    return functools.partial(_half_done, shape=shape, colour=coloured and not colours)


def finish_batch(
    images: torch.Tensor, draws: torch.Tensor, data_config: Mapping[str, Any]
) -> torch.Tensor:
    """Do the rest of the training transform for a batch: float32 [b, 3, H, W].

    The images are uint8 [b, 3, H, W] on whatever device, the draws float32 [b, DRAWS] or [b, 0] on
    the CPU.
    """
    levels = apply_colour_batch(images, draws) if draws.shape[1] else images
    return _normalise(data_config)(levels)


def eval_transform(data_config: Mapping[str, Any]) -> ImageTransform:
    """Build the evaluation transform: the whole image at the backbone's size, without a crop.

    Raises `DataConfigError`: the interpolation is unknown.
    """
    return train_transform(data_config, "none")


def _half_done(pixels: Pixels, shape: ImageTransform, colour: bool) -> HalfDone:
    """Shape an image and draw what will happen to its colours."""
    image = to_tensor(shape(pixels)).to(torch.uint8)  # after a change of colours floats, but whole
    return HalfDone(image, draw_colour() if colour else torch.empty(0))


def _shape(data_config: Mapping[str, Any], augment: ResolvedAugment) -> list[Any]:
    """Build the steps on levels of one image: crop, mirror, RandAugment, or the plain resize."""
    size = [int(side) for side in data_config["input_size"][1:]]
    name = data_config.get("interpolation", "bicubic")
    if name not in _INTERPOLATIONS:
        raise DataConfigError(
            f"interpolation = {name!r} in the backbone's data config: must be one of "
            f"{', '.join(_INTERPOLATIONS)}"
        )
    interpolation = InterpolationMode(name)
    if augment == "none":
        return [v2.Resize(size, interpolation=interpolation)]
    if augment not in (legal := get_args(ResolvedAugment)):
        raise DataConfigError(
            f"augment = {augment!r}: must be one of {', '.join(legal)} "
            "(`DataConfig.resolved_augment()` gives what `auto` stands for)"
        )
    mirror = [] if augment == "no_flip" else [v2.RandomHorizontalFlip()]
    further = [v2.RandAugment()] if augment == "randaugment" else []
    crop = v2.RandomResizedCrop(size, scale=_CROP_SCALE, interpolation=interpolation)
    return [crop, *mirror, *further]


def _colour(image: Pixels) -> Pixels:
    return apply_colour(image, draw_colour())


def _normalise(data_config: Mapping[str, Any]) -> ImageTransform:
    """Build the last step: levels to float32 in [0, 1], then mean and standard deviation."""
    mean, std = (tuple(data_config[name]) for name in ("mean", "std"))
    return functools.partial(_normalised, mean=mean, std=std)


def _normalised(image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise uint8 or float32 levels [..., 3, H, W]; `image` stays as it was."""
    levels = to_tensor(image)
    unit = levels * (1 / 255)
    return unit.sub_(_channels(mean, levels.device)).div_(_channels(std, levels.device))


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A number for each channel [3, 1, 1], brought to a device only once."""
    with torch.inference_mode(False):  # training uses what an evaluation made
        return torch.tensor(values, device=device)[:, None, None]
