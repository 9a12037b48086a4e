from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moa.layers import precision


def factors(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, D], weight [K, D] and a gradient [N, K]."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 24).to(dtype), torch.randn(6, 24).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(40, 6)


def test_two_halves_are_the_whole_to_16_bits() -> None:
    wide = torch.cat([torch.randn(50, 8), 1e-30 * torch.randn(50, 8), 1e30 * torch.randn(50, 8)])
    high, low = precision.split(wide).float().chunk(2, dim=1)
    assert ((high + low - wide).abs() <= 2.0**-16 * wide.abs()).all()
    assert not torch.equal(high, wide)


def test_the_way_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with a GPU's branch switched on; tests/gpu_checks.py runs the real one."""
    x, weight, gradient = factors()
    expected = precision.wide_product(x, weight)
    wanted = torch.autograd.grad(expected, (x, weight), gradient)
    monkeypatch.setattr(precision, "_on_matrix_units", lambda *_: True)
    monkeypatch.setattr(precision, "_accumulated", lambda a, b: a.float() @ b.float())
    product = precision.wide_product(x, weight)
    found = torch.autograd.grad(product, (x, weight), gradient)
    assert torch.equal(product, expected)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-4)  # one step of bf16
        assert (a == b).float().mean() > 0.95


def test_a_gpu_multiplies_bf16_as_it_is() -> None:
    """The operators and shapes of the real branch, on tensors without memory."""
    with FakeTensorMode():
        x = torch.empty(40, 24, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(6, 24, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        assert precision._on_matrix_units(x, weight)
        assert not precision._on_matrix_units(x.float(), weight)
        product = precision.wide_product(x, weight)
        assert (product.dtype, tuple(product.shape)) == (torch.float32, (40, 6))
        # Autograd itself would ask the GPU for a thread.
        saved = SimpleNamespace(saved_tensors=(x, weight))
        found = precision._WideProduct.backward(saved, torch.ones_like(product))
    for gradient, of in zip(found, (x, weight), strict=True):
        assert (gradient.dtype, gradient.shape) == (of.dtype, of.shape)
