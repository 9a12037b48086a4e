"""GroupDRO (Sagawa et al., arXiv 1911.08731): domains with a large loss gain weight.

q_d <- q_d exp(eta L_d), normalised to sum 1; sum_d q_d L_d.
"""

import torch

from trainer.config.objective import ObjectiveConfig
from trainer.objectives.objective import Objective, Outcome, Seen, State


def weighted(seen: Seen, step: int, state: State, config: ObjectiveConfig) -> Outcome:
    """With the weights that follow from this batch's own losses."""
    losses = seen.domain_losses()
    q = state["q"] * (config.groupdro_eta * losses.detach()).exp()
    q = q / q.sum()
    return Outcome((q * losses).sum(), state={"q": q})


OBJECTIVE = Objective(function=weighted, begin=lambda sources: {"q": torch.ones(sources)})
