"""Inter-domain Mixup (Yan et al., arXiv 2001.00677): each domain's images mixed with another's.

Domains stand in a random ring; x = l x_i + (1 - l) x_j for image k of a domain and of the next one,
l of the pair from Beta(alpha, alpha); l CE(y_i) + (1 - l) CE(y_j), the mean over all. Ring and
shares are a function of (seed, step), so that every process draws the same.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.randomness import hash64
from trainer.objectives.erm import mean_loss
from trainer.objectives.objective import Objective


class Ring(NamedTuple):
    """Of a step, by the number of the source domain."""

    partners: Tensor
    """int64 [D], the next domain of the ring"""
    shares: Tensor
    """fp32 [D], l"""


def draw_ring(seed: int, step: int, sources: int, alpha: float) -> Ring:
    """The ring of a step; numpy's `RandomState` is frozen, so that no release draws another."""
    draws = np.random.RandomState(hash64(seed, "mixup", step) % 2**32)
    order = draws.permutation(sources)
    partners = np.empty(sources, dtype=np.int64)
    partners[order] = np.roll(order, -1)
    shares = draws.beta(alpha, alpha, sources).astype(np.float32)
    return Ring(torch.from_numpy(partners), torch.from_numpy(shares))


def mixed(images: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """[n, 3, H, W] with `shares` [n] of the first, in their dtype."""
    share = shares.view(-1, 1, 1, 1)
    return (share * images + (1 - share) * others).to(images.dtype)


OBJECTIVE = Objective(function=mean_loss, is_mean=True, mixes=True)
