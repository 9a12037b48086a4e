"""Sharpness-aware steps (Foret et al., arXiv 2010.01412): the gradient at theta + rho g/|g|.

g is the global gradient, of all micro-batches and ranks, and its norm is over everything that
trains. ZeRO-1 and 2 hold the parameters whole on every rank that computes with them, so each moves
its own, in the model's dtype, and puts back the very numbers afterwards. The norm stays on the
device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.engine.collectives import add_up, average_gradient
from trainer.engine.engine import Engine


class Sam:
    """The first pass of a step: gradients that DeepSpeed does not see, and the way up."""

    def __init__(self, engine: Engine, radius: float) -> None:
        self.engine, self.radius = engine, radius
        self._sums = [torch.zeros_like(f.parameter, dtype=torch.float32) for f in engine.flats]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, as `Engine.backward` does for the update."""
        pieces = self.engine.ds.gradient_accumulation_steps()
        (loss if pieces == 1 else loss / pieces).backward()
        for total, flat in zip(self._sums, self.engine.flats, strict=True):
            total += flat.take_gradient()

    @contextmanager
    def up(self) -> Iterator[None]:
        """Within the block the parameters are theta + rho g/|g|; afterwards theta, to the bit.

        Where g is not finite they are not either, nor is the gradient there: the engine leaves out
        the update.
        """
        parameters: list[Tensor] = [flat.parameter for flat in self.engine.flats]
        with torch.no_grad():
            kept = [parameter.clone() for parameter in parameters]
            self._move(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    def _move(self, parameters: Sequence[Tensor]) -> None:
        squares = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for parameter, total in zip(parameters, self._sums, strict=True):
            holders = average_gradient(parameter, total)
            squares += torch.linalg.vector_norm(total, dtype=torch.float64).square() / holders
        factor = (self.radius / (add_up(squares).sqrt() + 1e-12)).float()
        for parameter, total in zip(parameters, self._sums, strict=True):
            parameter += total.mul_(factor)
            total.zero_()
