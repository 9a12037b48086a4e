"""Mixup and CutMix within a domain: what is mixed into each image of a batch, and how much.

Letters as in `mixing`. Images 2j and 2j + 1 of a domain's m are mixed with each other, with an odd
m the last three in a ring: the order of a domain is random, and so are neighbours in it. They stand
close, so that whoever loads some slots needs at most 3 D images more. Shares and boxes are a
function of (seed, step, slot), each image's own (timm's `mode="elem"`, whose boxes these are).

Sources: Mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899.
"""

import numpy as np
import torch
from torch import Tensor

from shards.config import Mix
from shards.randomness import Int64Array, hash64

COLUMNS = ("where", "label", "share", "inside", "top", "bottom", "left", "right")
"""Of an image: the place and the label of what is mixed in, the own share of the label, and that of
the pixels inside a box from row to row and column to column; outside they stay."""


def partners(slots: Int64Array, sources: int, each: int) -> Int64Array:
    """The slots of what is mixed into some slots of a global batch of `each` >= 2 a domain."""
    numbers = np.arange(each) ^ 1
    if each % 2:
        numbers[-3:] = each - 2, each - 1, each - 3
    return numbers[slots // sources] * sources + slots % sources


def draw_mix(
    kind: Mix, alpha: float, key: tuple[int, int], slots: range, size: int, labels: Tensor,
    where: Int64Array, sides: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`COLUMNS` of some slots, fp32 [b, 8].

    `key` is (seed, step); `size` counts the slots of the global batch; `where` [b] says which of
    the images whose labels are given is mixed into each; `sides` are rows and columns of an image.
    """
    draws = np.random.RandomState(hash64(key[0], "mix", key[1]) % 2**32)  # frozen in all releases
    own = slice(slots.start, slots.stop)
    share = draws.beta(alpha, alpha, size)[own]
    height, width = sides
    edges = np.tile(np.array([0, height, 0, width]), (len(slots), 1))
    inside = share
    if kind == "cutmix":
        centres = (draws.random_sample((size, 2))[own] * sides).astype(np.int64)
        halves = (np.sqrt(1 - share)[:, None] * sides).astype(np.int64) // 2
        low, high = (np.clip(centres + sign * halves, 0, sides) for sign in (-1, 1))
        edges = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
        share, inside = 1 - (high - low).prod(1) / (height * width), np.zeros(len(slots))
    told = np.column_stack([where, labels.numpy()[where], share, inside, edges])
    return torch.from_numpy(told).float()


def labels_and_shares(mix: Tensor) -> tuple[Tensor, Tensor]:
    """Of `COLUMNS` [b, 8]: labels int64 [b] of what is mixed in, shares fp32 [b] of the own."""
    return mix[:, 1].long(), mix[:, 2].contiguous()


def mixed(images: Tensor, mix: Tensor) -> Tensor:
    """The first b images of at least as many [.., 3, H, W], mixed as `COLUMNS` [b, 8] say."""
    where, _, _, inside, *edges = mix.to(images.device, non_blocking=True).unbind(1)
    top, bottom, left, right = (edge[:, None] for edge in edges)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    in_box = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    own = torch.where(in_box, inside[:, None, None, None], 1.0)
    return own * images[: len(mix)] + (1 - own) * images[where.long()]
