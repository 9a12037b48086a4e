"""What is computed of a micro-batch: scores, losses, gradients."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import moa
from trainer.engine.collectives import differentiable_sum
from trainer.engine.engine import Engine
from trainer.prepare.parts import Parts
from trainer.train.ahead import Ready
from trainer.train.nonfinite import poisoned


class MicroStep:
    """Forward and backward of one micro-batch and, after the last one of a step, the update."""

    columns: tuple[str, ...] = ("ce", "aux_loss")
    """Names of the numbers that a step gives."""

    def __init__(self, parts: Parts, engine: Engine) -> None:
        self.engine, self.seed = engine, parts.config.train.seed

    def __call__(self, ready: Ready, step: int) -> Tensor | None:
        """The numbers of this rank's piece by `columns`, on the device.

        None if they come with a later micro-batch of the step.
        """
        engine = self.engine
        scores = self.scores(ready.images, ready.batch.first_slot, step)
        ce = self.losses(scores, ready.labels)
        aux = moa.aux_loss(engine.module, differentiable_sum)
        engine.backward(poisoned(ce + aux))  # averaged over ranks and micro-batches
        engine.step()
        with torch.no_grad():
            return torch.stack([ce, aux.to(ce.dtype)])

    def scores(self, images: Tensor, first_slot: int, step: int) -> Tensor:
        """Scores [B, C] of images that stand in the slots from `first_slot` on."""
        position = moa.RoutingPosition(self.seed, step, first_slot, len(images))
        moa.set_routing_position(self.engine.module, position)
        scores: Tensor = self.engine.model(images)
        return scores

    def losses(
        self, scores: Tensor, labels: Tensor, reduction: Literal["mean", "none"] = "mean"
    ) -> Tensor:
        """The cross-entropy of a micro-batch, or of each of its images [B]."""
        return F.cross_entropy(scores.float(), labels, reduction=reduction)

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state: what is carried from step to step."""
        return {}
