"""Settings of the optimizer and of its learning rate over the steps; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.limits import ABOVE_0, FROM_0, out_of_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; its engine settings stay in the DeepSpeed JSON."""

    name: Literal["adam", "adamw"] = "adam"
    """torch's Adam, or AdamW with decoupled weight decay"""
    lr: float = 5e-5
    """constant learning rate"""
    weight_decay: float = 0.0
    """weight decay"""
    eps: float = 1e-8
    """Adam's denominator offset"""
    clip: float = 0.0
    """largest global gradient norm; 0 turns clipping off"""

    def problems(self) -> list[str]:
        """Every range problem, one line each."""
        return out_of_range(
            "optim", self, lr=ABOVE_0, eps=ABOVE_0, weight_decay=FROM_0, clip=FROM_0
        )
