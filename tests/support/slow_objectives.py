"""The objectives as DomainBed's papers have them: by loops over the domains of a whole batch."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.config.objective import ObjectiveConfig


def irm_penalty(scores: Tensor, labels: Tensor) -> Tensor:
    scale = torch.ones((), dtype=scores.dtype, requires_grad=True)
    halves = [F.cross_entropy(scores[start::2] * scale, labels[start::2]) for start in (0, 1)]
    slopes = [torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves]
    return slopes[0] * slopes[1]


def coral_penalty(x: Tensor, y: Tensor) -> Tensor:
    means = (x.mean(0) - y.mean(0)).square().mean()
    return means + (torch.cov(x.T) - torch.cov(y.T)).square().mean()


def mmd_penalty(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distances = (a[:, None] - b[None]).square().sum(-1).clamp(min=1e-30)
        widths = [10.0**power for power in range(-3, 4)]
        return torch.stack([(-g * distances).exp() for g in widths]).sum(0).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def over_pairs(penalty: Any, features: Sequence[Tensor]) -> Tensor:
    return torch.stack([penalty(x, y) for x, y in combinations(features, 2)]).mean()


def slow_objective(
    config: ObjectiveConfig, scores: Tensor, features: Tensor, labels: Tensor, domains: Tensor,
    step: int, q: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Loss, penalty and GroupDRO's weights after the step; images in the order of the batch."""
    where = [domains == domain for domain in domains.unique()]
    losses = torch.stack([F.cross_entropy(scores[here], labels[here]) for here in where])
    mean = losses.mean()
    if config.name == "groupdro":
        q = q * (config.groupdro_eta * losses.detach()).exp()
        q = q / q.sum()
        return q @ losses, None, q
    if config.name == "vrex":
        weight = config.vrex_lambda if step >= config.vrex_anneal else 1
        penalty = ((losses - mean) ** 2).mean()
    elif config.name == "irm":
        weight = config.irm_lambda if step >= config.irm_anneal else 1
        penalty = torch.stack([irm_penalty(scores[here], labels[here]) for here in where]).mean()
    elif config.name in ("coral", "mmd"):
        pair = {"coral": coral_penalty, "mmd": mmd_penalty}[config.name]
        weight = getattr(config, f"{config.name}_gamma")
        penalty = over_pairs(pair, [features[here] for here in where])
    else:
        return mean, None, q
    return mean + weight * penalty, penalty, q
