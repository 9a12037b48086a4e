"""Settings of what training minimises; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.limits import FROM_0, out_of_range


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training minimises on the source domains, beside the balance of the experts."""

    name: Literal["erm"] = "erm"
    """erm: the mean cross-entropy of the global batch"""
    margin: float = 0.0
    """margin in training by which the right class must win, the larger the less alike the other
    (CLIPood's lambda, there 0.3); needs --model.head cosine --model.head_init text"""

    def problems(self) -> list[str]:
        """Every range problem, one line each."""
        return out_of_range("objective", self, margin=FROM_0)
