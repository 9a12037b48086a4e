"""CORAL (Sun & Saenko, arXiv 1607.01719): means and covariances of the features shall be alike.

mean_d L_d + gamma * mean over pairs of domains of [mean (mu_i - mu_j)^2 + mean (C_i - C_j)^2], C
unbiased. The mean of (x_i - x_j)^2 over pairs is twice the unbiased variance of x, so that no pair
is formed. What travels is the sum of the features, and then of their products about the means.
"""

import torch

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State


def alignment(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """The mean loss and the distance of the domains' first two moments."""
    assert seen.features is not None
    both = torch.cat([seen.losses[:, None], seen.features], 1)
    means = seen.means(both)
    losses, mu = means[:, 0], means[:, 1:]
    rest = seen.features - mu[seen.domains]
    products = torch.einsum("dn,nf,ng->dfg", seen.members(rest.dtype), rest, rest)
    covariance = seen.total(products) / (seen.each - 1)
    penalty = 2 * (mu.var(0).mean() + covariance.var(0).mean())
    return Outcome(losses.mean() + config.coral_gamma * penalty, penalty)


OBJECTIVE = Objective(function=alignment, needs_features=True, has_penalty=True, least_images=2)
