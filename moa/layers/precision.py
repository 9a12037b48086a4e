"""Arithmetic in fp32 on low precision tensors: routing stays exact when the rest runs in bf16.

Letters: N tokens, D in, K out.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.layers.own_backward import OwnBackward

_COMPILABLE = torch.__version__ >= "2.10"
"""From this release on torch.compile knows products of bf16 factors in fp32."""

# Asked here once, since not every release of torch.compile can follow the question.
_AUTOCAST = {
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: a rounded logit changes which expert wins."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block autocast does not lower the precision of products."""
    autocasts = device.type in _AUTOCAST
    with torch.autocast(device.type, enabled=False) if autocasts else nullcontext():
        yield


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Product x weight^T [N, K] in at least fp32, from x [N, D] and weight [K, D] of any dtype.

    Keeps `x` for backward as it is, not a widened copy of it.
    """
    if x.dtype == wide_dtype(x.dtype):
        return F.linear(x, weight.to(x.dtype))
    product: Tensor = _WideProduct.apply(x, weight)
    return product


class _WideProduct(OwnBackward):
    """The product of low precision factors, in fp32 forward and backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _accumulated(x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        if not _on_matrix_units(x, weight):
            of_x = (gradient @ weight.float()).to(x.dtype)
            return of_x, (gradient.T @ x.float()).to(weight.dtype)
        halves = split(gradient)
        of_weight = _accumulated(halves.T, x).view(2, *weight.shape).sum(0)
        return halves @ torch.cat([weight, weight]), of_weight.to(weight.dtype)


def split(wide: Tensor) -> Tensor:
    """An fp32 [N, K] as two bf16 [N, 2 K] whose sum it is, to 16 bits.

    A GPU multiplies bf16 numbers, and adds them up in fp32, many times as fast as fp32 ones.
    """
    width = wide.shape[1]
    halves = wide.new_empty(len(wide), 2 * width, dtype=torch.bfloat16)
    halves[:, :width] = wide
    halves[:, width:] = wide - halves[:, :width]
    return halves


def _on_matrix_units(*factors: Tensor) -> bool:
    """Whether bf16 factors can be multiplied as they are into an fp32 product, compiled or not."""
    fits = all(f.is_cuda and f.dtype == torch.bfloat16 for f in factors)
    return fits and _COMPILABLE


def _accumulated(a: Tensor, b: Tensor) -> Tensor:
    """Product a b in fp32, from low precision factors."""
    if _on_matrix_units(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
