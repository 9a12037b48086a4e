"""`merge`: fold adapters into the base weights, where one matrix can stand for them.

Letters: D in, O out, E experts.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from moa.errors import MoAConfigError
from moa.experts import KroneckerExpert, KroneckerRule, kronecker_matrix
from moa.layer import MoALinear, moa_layers
from moa.router import UniformRouter

Part = TypeVar("Part", bound=nn.Module)


def merge(model: nn.Module) -> None:
    """Replaces every `MoALinear` by its base layer with the adapters folded in, in place.

    The result computes what the model computes in evaluation (a dropout of the experts is gone) and
    holds nothing of this package. The merged layers stay frozen, in their dtype, on their device
    and in their mode; what else was trainable, such as the classifier, stays so. A Kronecker layer
    gives its bias to a base layer that had none.

    Each layer is computed in float64 on the CPU and rounded at the end, so that neither the device
    nor a setting such as TF32 counts.

    Args:
        model: an injected model with `lora`, `kadaptation`, or a mixture with `router = uniform`.

    Raises:
        MoAConfigError: the model has no adapters, or ones whose weight depends on the token; it is
            left as it was.
    """
    layers = list(moa_layers(model))
    _check_mergeable(model, layers)
    for path, layer in layers:
        _fold(layer)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)
    if isinstance(getattr(model, "kron_rule", None), KroneckerRule):
        del model.kron_rule


def layer_gates(layer: MoALinear) -> Tensor:
    """Weight of each of `layer.all_experts()` in a layer that routes no tokens, float64 [E], CPU.

    Raises:
        MoAConfigError: the weights depend on the token.
    """
    if layer.config.routed:
        raise MoAConfigError(f"{layer.config.method} has other weights for every token")
    experts = layer.all_experts()
    if not isinstance(layer.router, UniformRouter):
        return torch.ones(len(experts), dtype=torch.float64)
    with torch.no_grad():
        mixed: Tensor = _exact(layer.router)()[0]
    return torch.cat([mixed, mixed.new_ones(len(experts) - len(mixed))])  # the shared one: 1


def _check_mergeable(model: nn.Module, layers: list[tuple[str, MoALinear]]) -> None:
    if not layers:
        raise MoAConfigError(
            f"{type(model).__name__} has no adapters, so there is nothing to merge: it was merged "
            "before, was not injected, or has a method without adapters (full, linear, bias, "
            "attention); use it as it is"
        )
    for path, layer in layers:
        config = layer.config
        if not path:
            raise MoAConfigError("the model is itself an adapted layer; merge the model around it")
        if config.routed:
            raise MoAConfigError(
                f"moa.method: {config.method!r} with router {config.router!r} cannot be merged: at "
                f"{path} the weight of an expert depends on the token, so no single matrix gives "
                "the same outputs; legal are lora, kadaptation, and mixtures with router "
                "'uniform'. Keep the adapter beside the base: moa.save_adapter writes a small file"
            )


@torch.no_grad()
def _fold(layer: MoALinear) -> None:
    """Adds the experts' matrix, and the bias of a Kronecker layer, to the base."""
    base, weight = layer.base, layer.base.weight
    # Not `weight.add_`: that would round the update before the sum.
    weight.copy_(weight.cpu().double() + _delta_weight(layer))
    if layer.bias is not None:
        bias = layer.bias.detach().cpu().double()
        if base.bias is None:
            base.bias = nn.Parameter(weight.new_empty(layer.out_features), requires_grad=False)
        else:
            bias += base.bias.cpu().double()
        base.bias.copy_(bias)
    base.train(layer.training)


def _delta_weight(layer: MoALinear) -> Tensor:
    """Sum over experts of `gate_e delta_e` as one matrix, float64 [O, D], CPU."""
    rule = _exact(layer._shared_rule[0]) if layer.config.kronecker else None
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for gate, trained in zip(layer_gates(layer), layer.all_experts(), strict=True):
        expert = _exact(trained)
        if isinstance(expert, KroneckerExpert):
            assert rule is not None
            total += gate * kronecker_matrix(expert, rule).T
        else:
            total += gate * (expert.up @ expert.down)
    return total


def _exact(part: Part) -> Part:
    """A copy of `part` in float64 on the CPU."""
    return copy.deepcopy(part).to(device="cpu", dtype=torch.float64)
