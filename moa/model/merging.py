"""`merge`: fold adapters into the base weights, where one matrix can stand for them.

Letters: D in, O out, E experts, R sum of their ranks.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from moa.errors import MoAConfigError
from moa.layers.experts import KroneckerRule, kronecker_matrix
from moa.layers.layer import MoALinear, moa_layers
from moa.layers.router import UniformRouter
from moa.model.injection import release_statistics

Part = TypeVar("Part", bound=nn.Module)


def merge(model: nn.Module) -> None:
    """Replaces every `MoALinear` by its base layer with the adapters folded in, in place.

    The result computes what the model computes in evaluation (a dropout of the experts is gone) and
    holds nothing of this package but a cosine head, if there is one. The merged layers stay frozen,
    in their dtype, on their device and in their mode; what else was trainable, such as the
    classifier, stays so. A Kronecker layer gives its bias to a base layer that had none.

    Each layer is computed in float64 on the CPU and rounded at the end, so that neither the device
    nor a setting such as TF32 counts.

    Raises `MoAConfigError`: the model has no adapters, or ones whose weight depends on the token;
    legal are `lora`, `kadaptation` and `router = uniform`. It is left as it was.
    """
    for path, layer in fixed_layers(model, "merged").items():
        _fold(layer)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)
    if isinstance(getattr(model, "kron_rule", None), KroneckerRule):
        del model.kron_rule
    release_statistics(model)


def fixed_layers(model: nn.Module, done: str) -> dict[str, MoALinear]:
    """The adapted layers by path, if all their experts' weights are alike for all tokens.

    `done` says what shall be done with them, as in "cannot be merged".

    Raises `MoAConfigError`: there are none, or experts weighted by the token.
    """
    layers = dict(moa_layers(model))
    if not layers:
        raise MoAConfigError(
            f"{type(model).__name__} has no adapters, so there is nothing to be {done}: it was "
            "merged before, was not injected, or has a method without adapters (full, linear, "
            "bias, attention); use it as it is"
        )
    for path, layer in layers.items():
        config = layer.config
        if not path:
            raise MoAConfigError(f"the model is itself an adapted layer, which cannot be {done}")
        if config.routed:
            raise MoAConfigError(
                f"moa.method: {config.method!r} with router {config.router!r} cannot be {done}: at "
                f"{path} the weight of an expert depends on the token, so no single matrix gives "
                "the same outputs; legal are methods with one expert and mixtures with router "
                "'uniform'. Keep the adapter beside the base: moa.save_adapter writes a small file"
            )
    return layers


@torch.no_grad()
def lora_factors(layer: MoALinear) -> tuple[Tensor, Tensor]:
    """One LoRA that equals all LoRA experts of a layer that routes no tokens, float64, CPU.

    Returns:
        down [R, D] and up [O, R], with each expert's weight multiplied into its columns of `up`.
    """
    experts = [_exact(expert) for expert in layer.all_experts()]
    up = [gate * expert.up for gate, expert in zip(_gates(layer), experts, strict=True)]
    return torch.cat([expert.down for expert in experts]), torch.cat(up, dim=1)


def _gates(layer: MoALinear) -> Tensor:
    """Weight of each of `layer.all_experts()`, alike for all tokens, float64 [E], CPU."""
    number = len(layer.all_experts())
    if not isinstance(layer.router, UniformRouter):
        return torch.ones(number, dtype=torch.float64)
    mixed: Tensor = _exact(layer.router)()[0]
    return torch.cat([mixed, mixed.new_ones(number - len(mixed))])  # the shared expert counts fully


@torch.no_grad()
def _fold(layer: MoALinear) -> None:
    """Adds the experts' matrix, and the bias of a Kronecker layer, to the base."""
    base, weight = layer.base, layer.base.weight
    # Not `weight.add_`: that would round the update before the sum.
    weight.copy_(weight.cpu().double() + _delta_weight(layer))
    if layer.bias is not None:
        bias = layer.bias.detach().cpu().double()
        if getattr(base, "bias", None) is not None:
            bias += base.bias.cpu().double()
        else:
            base.bias = nn.Parameter(weight.new_empty(layer.out_features), requires_grad=False)
        base.bias.copy_(bias)


def _delta_weight(layer: MoALinear) -> Tensor:
    """Sum over experts of `gate_e delta_e` as one matrix, float64 [O, D], CPU."""
    if not layer.config.kronecker:
        down, up = lora_factors(layer)
        return up @ down
    rule = _exact(layer.rule)
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for gate, expert in zip(_gates(layer), layer.all_experts(), strict=True):
        total += gate * kronecker_matrix(_exact(expert), rule).T
    return total


def _exact(part: Part) -> Part:
    """A copy of `part` in float64 on the CPU."""
    return copy.deepcopy(part).to(device="cpu", dtype=torch.float64)
