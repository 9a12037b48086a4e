"""One qkv layer, forward and backward: factored experts against formed matrices.

Letters: N tokens, D in, O out, P kron_dim.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import moa
from moa.layers.experts import KroneckerExpert, KroneckerRule, dense_delta
from moa.layers.layer import MoALinear
from moa.layers.precision import wide_product
from moa.layers.router import CosineRouter, choose
from trainer.bench.timing import Comparison, Work, interleaved

WIDTHS = {"ViT-B": 768, "ViT-L": 1024, "ViT-G": 1664}
TOKENS = 788
"""Four images of 14 x 14 patches and a class token."""


def measure(rounds: int, device: torch.device) -> dict[str, Comparison]:
    """A table per width; ratios are to the bare layer."""
    return {
        f"qkv layer at {name} width ({width}), {TOKENS} tokens": interleaved(
            _works(width, device), rounds, device
        )
        for name, width in WIDTHS.items()
    }


def _works(width: int, device: torch.device) -> dict[str, Work]:
    base = nn.Linear(width, 3 * width, device=device)
    x = torch.randn(TOKENS, width, requires_grad=True, device=device)
    lora = MoALinear(base, moa.MoAConfig(method="moa_lora"))
    kron = MoALinear(base, moa.MoAConfig(method="moa_kron"))
    dense = MoALinear(base, moa.MoAConfig(method="moa_kron", kron_impl="dense"))
    forwards: dict[str, Callable[[], Tensor]] = {
        "bare layer": lambda: base(x),
        "moa_lora, factored": lambda: lora(x),
        "moa_lora, matrices formed": lambda: formed_lora(lora, x),
        "moa_kron, factored": lambda: kron(x),
        "moa_kron, matrices formed (kron_impl: dense)": lambda: dense(x),
        "moa_kron, P Kronecker products summed": lambda: summed_kronecker(kron, x),
    }
    gradient = torch.randn(TOKENS, 3 * width, device=device)

    def both(forward: Callable[[], Tensor]) -> None:
        torch.autograd.backward(forward(), gradient)

    return {name: partial(both, forward) for name, forward in forwards.items()}


def _gates(layer: MoALinear, x: Tensor) -> Tensor:
    router = layer.router
    assert isinstance(router, CosineRouter)
    return choose(router(wide_product(x, router.weight)), None, 1).gates


def formed_lora(layer: MoALinear, x: Tensor) -> Tensor:
    """The layer's output [N, O] with every expert's [D, O] matrix formed."""
    matrices = [(e.up @ e.down).T for e in layer.experts]  # type: ignore[operator]
    y: Tensor = layer.base(x) + dense_delta(x, matrices, _gates(layer, x))
    return y


def summed_kronecker(layer: MoALinear, x: Tensor) -> Tensor:
    """The layer's output [N, O] as the formula reads: H_e = sum_p A_p kron (left_e[p] right_e[p]).

    All P products of size D x O stand in memory before they are summed.
    """
    matrices = [_kronecker_products(e, layer.kron_rule) for e in layer.experts]  # type: ignore[arg-type]
    y: Tensor = layer.base(x) + dense_delta(x, matrices, _gates(layer, x)) + layer.bias
    return y


def _kronecker_products(expert: KroneckerExpert, rule: KroneckerRule) -> Tensor:
    outer = rule.left.unsqueeze(2) * rule.right.unsqueeze(1)  # A_p as [P, P, P]
    small = expert.left @ expert.right  # [P, D/P, O/P]
    products = outer[:, :, None, :, None] * small[:, None, :, None, :]
    return products.reshape(len(products), outer.shape[1] * small.shape[1], -1).sum(0)
