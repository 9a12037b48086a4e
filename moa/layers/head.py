"""A classifier by angles: its scores are scaled cosines of an image's features and class vectors.

Letters: N images, D width of the backbone, P width of the class vectors' space, C classes.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.layers.precision import full_precision, wide_dtype

FIRST_SCALE = 1 / 0.07
"""s of class vectors that start at random: the one that CLIP's training starts from."""
MOST_SPACE = 2**16


class CosineHead(nn.Module):
    """Scores s cos(W f + b, t_c) [N, C] of features f [N, D], in at least fp32.

    With a `space` of P numbers it is CLIP's own classifier: W [P, D] and b [P] train unless
    `frozen`, the class vectors t [C, P] stay what they are. Without one there are no W and b, and
    the class vectors t [C, D] start at random and train. s never trains.

    What stays is a buffer: exact, whatever precision an engine gives to parameters, and saved with
    the adapter, which would be of no use without it.

    Attributes:
        weight, bias: W and b, or None.
        classes: t; only their directions count.
        scale: s, of no dimensions.
    """

    weight: Tensor | None
    bias: Tensor | None
    classes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        classes: int,
        space: int | None = None,
        frozen: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.space, self.frozen = in_features, space, frozen
        width = space or in_features
        # About as long as one, as W is: a step of the optimizer then turns both by as much.
        vectors = torch.randn(classes, width, device=device, dtype=torch.float32) * width**-0.5
        self._hold("weight", space and torch.zeros(width, in_features, device=device), dtype)
        self._hold("bias", space and torch.zeros(width, device=device), dtype)
        self._hold("classes", vectors, dtype, trains=space is None)
        self._hold("scale", torch.full((), FIRST_SCALE, device=device), dtype, trains=False)

    def _hold(self, name: str, value: Any, dtype: torch.dtype, trains: bool = True) -> None:
        if value is None:
            setattr(self, name, None)
        elif trains and not self.frozen:
            setattr(self, name, nn.Parameter(value.to(dtype)))
        else:
            self.register_buffer(name, value.to(wide_dtype(dtype)))

    def settings(self) -> dict[str, Any]:
        """What `check_settings` wants, from which the same head is made again."""
        return {"kind": "cosine", "space": self.space, "frozen": self.frozen}

    def forward(self, features: Tensor) -> Tensor:
        """Scores [N, C] of features [N, D]."""
        wide = wide_dtype(features.dtype)
        with full_precision(features.device):
            x = features.to(wide)
            if self.weight is not None and self.bias is not None:
                x = F.linear(x, self.weight.to(wide), self.bias.to(wide))
            return self._times_classes(F.normalize(x, dim=-1))

    def similarity(self, labels: Tensor) -> Tensor:
        """How alike each label's class [N] and all classes are: s cos(t_y, t_c) [N, C]."""
        with full_precision(labels.device):
            wide = wide_dtype(self.classes.dtype)
            return self._times_classes(F.normalize(self.classes[labels].to(wide), dim=-1))

    def _times_classes(self, unit: Tensor) -> Tensor:
        """Scaled cosines of unit vectors [N, P] and the class vectors."""
        return self.scale * unit @ F.normalize(self.classes.to(unit.dtype), dim=-1).T


def check_settings(head: Mapping[str, Any]) -> None:
    """Raises `ValueError` if what an adapter says of its head is not legal.

    Of a linear head nothing is needed. `{"kind": "cosine", "space": P or null, "frozen": bool}` are
    the arguments of `CosineHead`.
    """
    kind, space, frozen = (head.get(name) for name in ("kind", "space", "frozen"))
    if kind is None:
        return
    if kind != "cosine":
        legal = "legal is 'cosine', or none for a linear head"
        raise ValueError(f"head: kind {reprlib.repr(kind)}; {legal}")
    if not (space is None or (type(space) is int and 1 <= space <= MOST_SPACE)):
        raise ValueError(f"head: space {reprlib.repr(space)}; must be null or 1 to {MOST_SPACE}")
    if type(frozen) is not bool or (frozen and space is None):
        raise ValueError(
            f"head: frozen {reprlib.repr(frozen)}; legal is true with a space, or false"
        )
