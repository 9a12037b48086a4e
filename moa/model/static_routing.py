"""What a training step takes and leaves beside images and losses, in tensors that stay.

A CUDA graph repeats kernels without Python: they find their noise keys where those were when the
graph was captured, and leave there what the layers tell.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moa.layers.noise import KEY_WORDS, RoutingPosition, noise_keys
from moa.layers.router import Routing, TokenRouter
from moa.model.routing import AdaptedLayers


class StaticRouting:
    """Noise keys, counts and records of an injected model for forwards that are run again.

    `place`, then a forward and backward between `begin` and `end`, or a replay of the graph that
    was captured of all three, then `leave`. The model is where it will compute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.adapted = AdaptedLayers(model)
        self.layers = self.adapted.layers
        device = next(model.parameters()).device
        shape = (self.adapted.drawing, KEY_WORDS)
        self._keys = torch.zeros(shape, dtype=torch.int64, device=device)
        self._left: list[Routing | None] = []
        self._balanced = [
            layer for layer in self.layers
            if isinstance(layer.router, TokenRouter) and layer.router.balance_steps is not None
        ]  # fmt: skip
        self._chosen = [torch.zeros(len(layer.ranks), device=device) for layer in self._balanced]

    def place(self, position: RoutingPosition) -> None:
        """Writes the keys; what the step's earlier micro-batches have counted stays."""
        if len(self._keys):
            self._keys.copy_(noise_keys(position, len(self._keys)), non_blocking=True)
        counted = [layer.take_chosen() for layer in self._balanced]
        if counted and counted[0] is None:  # the balance has taken it: a new step
            torch._foreach_zero_(self._chosen)

    def begin(self, images: int) -> None:
        """Has a forward of so many images read the keys where they are."""
        self.adapted.set_keys(self._keys, images)

    def end(self) -> None:
        """Adds up what that forward has counted, and keeps what else it left."""
        counted = [
            chosen for layer in self._balanced if (chosen := layer.take_chosen()) is not None
        ]
        if counted:
            torch._foreach_add_(self._chosen, counted)
        self._left = [layer._routed for layer in self.layers]

    def leave(self) -> None:
        """Gives the layers what that forward, or its replay, has left."""
        for layer, routed in zip(self.layers, self._left, strict=True):
            layer._routed = routed
        for layer, chosen in zip(self._balanced, self._chosen, strict=True):
            layer._chosen = chosen

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """Within the block forwards are run that belong to no step."""
        before = [chosen.clone() for chosen in self._chosen]
        try:
            yield
        finally:
            for layer, chosen, own in zip(self._balanced, self._chosen, before, strict=True):
                layer.take_chosen()
                chosen.copy_(own)
