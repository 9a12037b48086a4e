"""IRM (Arjovsky et al., arXiv 1907.02893): one scale of the scores shall be best for every domain.

mean_d [L_d + lambda g1_d g2_d], where g is the derivative of the cross-entropy of w * scores at
w = 1, g1 over a domain's images of even number, g2 over the others. Of one image with scores s it
is sum_c softmax(s)_c s_c - s_y: no second derivative is taken.
"""

import torch

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State


def invariance(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """The mean loss and the product of the two halves' derivatives."""
    s = seen.scores
    own = s.gather(1, seen.labels[:, None])[:, 0]
    slope = (s.softmax(1) * s).sum(1) - own
    is_odd = (seen.numbers % 2).to(s.dtype)
    halves = torch.stack([seen.losses, slope * (1 - is_odd), slope * is_odd], 1)
    losses, even, odd = seen.sums(halves).unbind(1)
    number = seen.each // 2
    penalty = (even / (seen.each - number) * odd / number).mean()
    weight = config.irm_lambda if step >= config.irm_anneal else 1.0
    return Outcome((losses / seen.each).mean() + weight * penalty, penalty)


OBJECTIVE = Objective(
    function=invariance, has_penalty=True, least_images=2,
    restarts=lambda step, config: step == config.irm_anneal,
)  # fmt: skip
