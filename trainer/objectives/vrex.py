"""V-REx (Krueger et al., arXiv 2003.00688): the domains' losses shall be alike.

mean_d L_d + lambda * mean_d (L_d - mean L)^2
"""

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State


def variance(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """The mean loss and the variance of the domains' losses."""
    losses = seen.domain_losses()
    weight = config.vrex_lambda if step >= config.vrex_anneal else 1.0
    penalty = losses.var(correction=0)
    return Outcome(losses.mean() + weight * penalty, penalty)


OBJECTIVE = Objective(
    function=variance, has_penalty=True, restarts=lambda step, config: step == config.vrex_anneal
)
