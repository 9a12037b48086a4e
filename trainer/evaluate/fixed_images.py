"""A few images in memory, the same every time: routing maps and loss surfaces are made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shards import Decoder, ShardIndex, eval_transform
from shards.pixels.decoding import undecodable_placeholder
from shards.stream.one_image import open_image


@dataclass(frozen=True)
class FixedImages:
    """Images of a shard set in memory.

    Attributes:
        images: float32 [N, 3, H, W], normalised.
        labels: class numbers [N].
        domains: domain numbers [N].
    """

    images: Tensor
    labels: list[int]
    domains: list[int]


def fixed_images(
    index: ShardIndex,
    places: Iterable[tuple[int, int]],
    data_config: Mapping[str, object],
    decoder: Decoder,
) -> FixedImages:
    """Reads some images as an evaluation does: a grey one stands for what cannot be decoded.

    A place is (domain number, ImageFolder rank); there is one or more.
    """
    transform = eval_transform(data_config)
    images, labels, domains = [], [], []
    for env, rank in places:
        found = open_image(index, env, rank, decoder)
        pixels = undecodable_placeholder() if found.pixels is None else found.pixels
        images.append(transform(pixels))
        labels.append(found.label)
        domains.append(env)
    return FixedImages(torch.stack(images), labels, domains)
