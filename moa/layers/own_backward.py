"""Operations whose backward is written out."""

import inspect
from typing import Any

import torch
from torch import Tensor


class OwnBackward(torch.autograd.Function):
    """An operation with a backward of its own, which may be one under `torch.func` as well."""

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        # Torch asks for it at every call, and else works it out each time (20 us).
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the inputs of forward for backward."""
        ctx.save_for_backward(*inputs)
