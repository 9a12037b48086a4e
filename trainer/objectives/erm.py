"""Empirical risk minimisation: the mean cross-entropy."""

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State


def mean_loss(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """The mean over this part, which the engine averages over all."""
    return Outcome(seen.losses.mean())


OBJECTIVE = Objective(function=mean_loss, is_mean=True, least_sources=1)
