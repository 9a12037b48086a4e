"""Settings of what training minimises; imports no torch."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from trainer.config.limits import ABOVE_0, FROM_0, SEED, SHARE, out_of_range

Name = Literal["erm", "groupdro", "vrex", "irm", "coral", "mmd", "mixup"]
"""Each is a file of `trainer/objectives/`."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training minimises on the source domains, beside the balance of the experts.

    Settings that begin with the name of an objective belong to it.
    """

    name: Name = "erm"
    """erm: the mean cross-entropy of the global batch; the others are DomainBed's, on the source
    domains of a global batch: groupdro, vrex, irm, coral, mmd, mixup (inter-domain)"""
    groupdro_eta: float = 1e-2
    """step size of the domains' weights"""
    vrex_lambda: float = 10.0
    """weight of the variance of the domains' losses, once vrex_anneal steps are done"""
    vrex_anneal: int = 500
    """steps with a weight of 1, after which Adam restarts"""
    irm_lambda: float = 100.0
    """weight of the invariance penalty, once irm_anneal steps are done"""
    irm_anneal: int = 500
    """steps with a weight of 1, after which Adam restarts"""
    coral_gamma: float = 1.0
    """weight of the distance between the domains' means and covariances"""
    mmd_gamma: float = 1.0
    """weight of the distance between the domains by Gaussian kernels"""
    mixup_alpha: float = 0.2
    """both parameters of the Beta distribution of the shares in which two domains are mixed"""
    margin: float = 0.0
    """margin in training by which the right class must win, the larger the less alike the other
    (CLIPood's lambda, there 0.3); needs --model.head cosine --model.head_init text"""
    label_smoothing: float = 0.0
    """share of the target that training gives to all classes alike, with any objective"""
    sam: float = 0.0
    """radius of sharpness-aware steps, with any objective: the gradient g' that trains is taken at
    the weights + sam g/|g|, in a second pass; 0 turns it off"""

    def problems(self) -> list[str]:
        """Every range problem, and what has no effect, one line each."""
        found = [
            f"objective.{entry.name}: has no effect without --objective.name {owner}; add that, or "
            f"leave {entry.name} out"
            for owner in get_args(Name)
            for entry in fields(self)
            if entry.name.startswith(f"{owner}_") and owner != self.name
            if getattr(self, entry.name) != entry.default
        ]
        return found + out_of_range(
            "objective", self, groupdro_eta=ABOVE_0, vrex_lambda=FROM_0, vrex_anneal=SEED,
            irm_lambda=FROM_0, irm_anneal=SEED, coral_gamma=FROM_0, mmd_gamma=FROM_0,
            mixup_alpha=ABOVE_0, margin=FROM_0, label_smoothing=SHARE, sam=FROM_0,
        )  # fmt: skip
