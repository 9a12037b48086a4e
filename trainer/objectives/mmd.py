"""MMD (Li et al., CVPR 2018): the features' distributions shall be alike, by Gaussian kernels.

mean_d L_d + gamma * mean over pairs of domains of [mean Kxx + mean Kyy - 2 mean Kxy], where
K(x, y) is the sum of exp(-g |x - y|^2) over g = 0.001, 0.01 ... 1000. A kernel needs pairs: the
features of the whole batch travel, and every process computes all N^2 of them.
"""

import torch

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State

BANDWIDTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
LEAST = 1e-30
"""Of a squared distance."""
MOST_IMAGES = 4096
"""Kernels of more pairs (N^2 numbers each, 64 MiB here) would not fit beside a large backbone."""


def kernel_distance(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """The mean loss and the distance of the domains' distributions."""
    assert seen.features is not None
    x = seen.gathered(seen.features)
    x = x - x.detach().mean(0)  # changes no distance, and squares lose less
    squares = x.square().sum(1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    # Without what rounding leaves of an image's distance to itself, which a kernel would magnify.
    distances = distances.clamp(min=LEAST)
    distances = distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), LEAST)
    kernels = sum((-g * distances).exp() for g in BANDWIDTHS)
    assert isinstance(kernels, torch.Tensor)
    # By slot: image a of domain i against image b of domain j.
    means = kernels.view(seen.each, seen.sources, seen.each, seen.sources).mean((0, 2))
    own, pairs = means.diagonal(), seen.sources * (seen.sources - 1)
    across = means.sum() - own.sum()  # each pair twice
    penalty = 2 * (own.mean() - across / pairs)
    losses = seen.domain_losses()
    return Outcome(losses.mean() + config.mmd_gamma * penalty, penalty)


OBJECTIVE = Objective(
    function=kernel_distance, needs_features=True, has_penalty=True, most_images=MOST_IMAGES
)
