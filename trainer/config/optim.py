"""Settings of the optimizer and of its learning rate over the steps; imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.config.limits import ABOVE_0, FROM_0, SHARE, out_of_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; its engine settings stay in the DeepSpeed JSON."""

    name: Literal["adam", "adamw"] = "adam"
    """torch's Adam, or AdamW with decoupled weight decay"""
    lr: float = 5e-5
    """learning rate; with a warm-up or a schedule, the highest"""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """the rate after the warm-up: constant, or down to final_lr in the last step, along half a
    cosine or a line"""
    warmup: float = 0.0
    """steps in which the rate grows linearly to lr; below 1, their share of train.steps"""
    final_lr: float = 0.0
    """learning rate of the last step under cosine and linear"""
    head_lr: float = 1.0
    """factor on the learning rate of the head"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decays of the gradient's mean and of its square's"""
    weight_decay: float = 0.0
    """weight decay of matrices; biases, norms, temperatures, embeddings of positions and Kronecker
    rules have none"""
    eps: float = 1e-8
    """Adam's denominator offset"""
    clip: float = 0.0
    """largest global gradient norm; 0 turns clipping off"""

    def problems(self) -> list[str]:
        """Every range problem, and what has no effect, one line each."""
        found = out_of_range(
            "optim", self, lr=ABOVE_0, eps=ABOVE_0, weight_decay=FROM_0, clip=FROM_0,
            warmup=FROM_0, final_lr=FROM_0, head_lr=FROM_0,
        )  # fmt: skip
        if self.warmup >= 1 and self.warmup % 1:
            found.append(
                f"optim.warmup: {self.warmup}; must be a whole number of steps, or a share below 1"
            )
        if not all(SHARE[1](beta) for beta in self.betas):
            found.append(f"optim.betas: {list(self.betas)}; must be two numbers >= 0 and < 1")
        if self.final_lr > self.lr:
            found.append(f"optim.final_lr: {self.final_lr}; must be at most optim.lr ({self.lr})")
        if self.final_lr and self.schedule == "constant":
            found.append(
                "optim.final_lr: has no effect without --optim.schedule cosine or linear; add one, "
                "or leave final_lr out"
            )
        return found

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1 ... `steps` - 1."""
        warm = self.warmup_steps(steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return self.lr
        done = (step - warm) / max(1, steps - 1 - warm)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_lr + (self.lr - self.final_lr) * left

    def warmup_steps(self, steps: int) -> int:
        """How many of `steps` steps the rate grows in."""
        return round(self.warmup * steps if self.warmup < 1 else self.warmup)
