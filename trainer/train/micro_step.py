"""What is computed of a micro-batch: scores, losses, gradients."""

import torch
from torch import Tensor
from torch.nn import functional as F

import moa
from trainer.engine.collectives import differentiable_sum
from trainer.engine.engine import Engine
from trainer.prepare.parts import Parts
from trainer.train.ahead import Ready
from trainer.train.margin import margin_of
from trainer.train.nonfinite import poisoned


class MicroStep:
    """Forward and backward of one micro-batch and, after the last one of a step, the update."""

    def __init__(self, parts: Parts, engine: Engine) -> None:
        self.engine, self.seed = engine, parts.config.train.seed
        self.margin = margin_of(parts.model, parts.config.objective.margin)

    def __call__(self, ready: Ready, step: int) -> Tensor:
        """The losses [ce, aux] of this rank's piece, on the device."""
        engine, batch = self.engine, ready.batch
        position = moa.RoutingPosition(self.seed, step, batch.first_slot, len(batch.labels))
        moa.set_routing_position(engine.module, position)
        scores = self.margin(engine.model(ready.images), ready.labels)  # [B, C]
        ce = F.cross_entropy(scores.float(), ready.labels)
        aux = moa.aux_loss(engine.module, differentiable_sum)
        engine.backward(poisoned(ce + aux))  # averaged over ranks and micro-batches
        engine.step()
        with torch.no_grad():
            return torch.stack([ce, aux.to(ce.dtype)])
