"""What is computed of a micro-batch: scores, losses, gradients."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import moa
from moa.model.routing import AdaptedLayers
from trainer.engine.collectives import differentiable_sum
from trainer.engine.engine import Engine
from trainer.prepare.ahead import Ready
from trainer.prepare.parts import Parts
from trainer.train.graphed import graphed_as_set
from trainer.train.margin import margin_of
from trainer.train.nonfinite import poisoned


class MicroStep:
    """Forward and backward of one micro-batch and, after the last one of a step, the update."""

    columns: tuple[str, ...] = ("ce", "aux_loss")
    """Names of the numbers that a step gives."""

    def __init__(self, parts: Parts, engine: Engine) -> None:
        self.engine, self.seed = engine, parts.config.train.seed
        self.adapted = AdaptedLayers(engine.module)
        self.margin = margin_of(parts.model, parts.config.objective.margin)
        self.smoothing = parts.config.objective.label_smoothing
        self.graphed = graphed_as_set(parts, engine, self.compute)

    def __call__(self, ready: Ready, step: int) -> Tensor | None:
        """The numbers of this rank's piece by `columns`, on the device.

        None if they come with a later micro-batch of the step.
        """
        engine, batch = self.engine, ready.batch
        position = moa.RoutingPosition(self.seed, step, batch.first_slot, len(batch.labels))
        inputs = (ready.images, ready.labels, *ready.mixed_in)
        if self.graphed is None or step == 0:  # in which gradients are checked, in Python
            self.adapted.set_position(position)
            losses = self.compute(*inputs)
        else:
            losses = self.graphed(inputs, position)
        engine.add_gradient()
        engine.step()
        return losses

    def compute(self, images: Tensor, labels: Tensor, *mixed_in: Tensor) -> Tensor:
        """The losses [ce, aux]; their gradient is the engine's to add.

        `mixed_in` are labels and shares for `mixed_losses`, if images were mixed.

        A CUDA graph repeats it for other contents of the same tensors: what differs from step to
        step must be one of them, no number in Python.
        """
        engine = self.engine
        scores = engine.model(images)
        if mixed_in:
            ce = self.mixed_losses(scores, labels, *mixed_in).mean()
        else:
            ce = self.losses(scores, labels)
        aux = self.adapted.aux_loss(differentiable_sum)
        engine.differentiate(poisoned(ce + aux))  # averaged over ranks and micro-batches
        with torch.no_grad():
            return torch.stack([ce, aux.to(ce.dtype)])

    def losses(
        self, scores: Tensor, labels: Tensor, reduction: Literal["mean", "none"] = "mean"
    ) -> Tensor:
        """The cross-entropy of scores [B, C] less the margin, or of each image [B]."""
        scores = self.margin(scores, labels).float()
        return F.cross_entropy(scores, labels, reduction=reduction, label_smoothing=self.smoothing)

    def mixed_losses(
        self, scores: Tensor, labels: Tensor, other_labels: Tensor, share: Tensor
    ) -> Tensor:
        """The losses [B] of images of which a `share` [B] is of the label, the rest of another."""
        own, other = (self.losses(scores, each, "none") for each in (labels, other_labels))
        return share * own + (1 - share) * other

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state: what is carried from step to step."""
        return {}
