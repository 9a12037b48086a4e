"""The trainables of a parameter group as one tensor, so that an update costs what one tensor does.

DeepSpeed sees the flat tensors alone: it reduces, partitions and steps them. The model's own
parameters are views of them, and their gradients are handed over in one piece.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Flat:
    """Named parameters of one dtype and device, one behind the other.

    Attributes:
        parameter: all their numbers, [N].
        gradient: what `take_gradient` has found; it stays where it is.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = named
        members = list(named.values())
        self.parameter = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in members]))
        for mark in ("allreduce", "group_name"):  # by which DeepSpeed knows experts
            if hasattr(members[0], mark):
                setattr(self.parameter, mark, getattr(members[0], mark))
        self.gradient = torch.zeros_like(self.parameter)
        self._places = list(self.cut(self.gradient).values())
        self.share()

    def share(self) -> None:
        """Makes the parameters views of the flat one, wherever its numbers lie by now."""
        for parameter, view in zip(
            self.named.values(), self.cut(self.parameter).values(), strict=True
        ):
            parameter.data = view

    def cut(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor, by the names of the parameters whose place they are."""
        parts = torch.split(flat.detach(), [p.numel() for p in self.named.values()])
        return {
            name: part.view(p.shape)
            for part, (name, p) in zip(parts, self.named.items(), strict=True)
        }

    def joined(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `cut`."""
        return torch.cat([values[name].reshape(-1) for name in self.named])

    def take_gradient(self) -> Tensor:
        """The parameters' gradients in one piece; they have none any more."""
        given = [p.grad for p in self.named.values()]
        if any(gradient is None for gradient in given):
            self.gradient.zero_()
        pairs = [(place, g) for place, g in zip(self._places, given, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([place for place, _ in pairs], [g for _, g in pairs])
        for parameter in self.named.values():
            parameter.grad = None
        return self.gradient  # autograd copies what somebody else holds


class FlatModel(nn.Module):
    """What DeepSpeed sees: the flat tensors, and the model's experts by their groups."""

    def __init__(self, flats: Sequence[Flat], experts: nn.Module | None) -> None:
        super().__init__()
        self.flats = nn.ParameterList([flat.parameter for flat in flats])
        self.experts = experts

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A number by which each flat tensor has the gradient given."""
        result: Tensor = _Given.apply(gradients, *self.flats)
        return result


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *flats: Tensor) -> Tensor:
        ctx.gradients = gradients
        return flats[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients
