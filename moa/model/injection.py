"""`inject`: put adapters into a timm vision transformer and freeze everything else."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from moa.blocks import select_blocks
from moa.config import MoAConfig
from moa.errors import MoAConfigError, NoMatchingModuleError
from moa.layers.experts import KroneckerRule
from moa.layers.head import CosineHead
from moa.layers.layer import MoALinear, check_kron_dim, moa_layers

IN_BLOCK = re.compile(r"(?:^|.*\.)blocks\.(\d+)\.(.+)")
"""A module path within a block: the block's number, and the path there."""


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did.

    Attributes:
        layers: module paths of the wrapped layers, in the model's order; for `bias` and
            `attention` the names of the backbone's own parameters that train.
        trainable: numbers that train.
        head: numbers among them that belong to the classifier.
        total: all numbers of the model.
    """

    layers: tuple[str, ...]
    trainable: int
    head: int
    total: int


def inject(model: nn.Module, config: MoAConfig) -> InjectReport:
    """Wraps the selected linear layers of `model` and leaves only adapters and head trainable.

    `model` is a timm vision transformer: it has `blocks` and `get_classifier`. All checks come
    first, so it is either changed completely or not at all. Running statistics (of a BatchNorm)
    stay what they are and are used in training, too: they belong to the base and are not saved.

    Raises:
        MoAConfigError: an illegal setting, or one that does not fit the widths or depth.
        NoMatchingModuleError: `targets` in `blocks` match no linear layer.
    """
    config.check()
    config = config.resolved()
    head = classifier(model)
    check_fresh(model)
    paths = matching_layers(model, config) if config.adapts else []
    unfrozen = matching_parameters(model, config) if config.unfreezes else []
    rule, layers = _adapters(model, config, paths)
    model.requires_grad_(config.method == "full")
    for name in unfrozen:
        model.get_parameter(name).requires_grad_(True)
    if rule is not None:
        model.kron_rule = rule
    for path, layer in layers.items():
        layer.train(layer.base.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        _call_projection(model.get_submodule(parent))
    head.requires_grad_(True)
    for module in model.modules():
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_keep_statistics)
    return InjectReport(
        layers=tuple(paths or unfrozen),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head=sum(p.numel() for p in head.parameters()),
        total=sum(p.numel() for p in model.parameters()),
    )


def _keep_statistics(module: nn.Module, _: Any) -> None:
    """Before every forward, whatever `model.train()` said."""
    module.training = False


def release_statistics(model: nn.Module) -> None:
    """Lets running statistics follow the images again."""
    for module in model.modules():
        for key, hook in [*module._forward_pre_hooks.items()]:
            if hook is _keep_statistics:
                del module._forward_pre_hooks[key]


def check_fresh(model: nn.Module) -> None:
    """Raises `MoAConfigError` if a layer of `model` is wrapped."""
    for path, _ in moa_layers(model):
        raise MoAConfigError(
            f"{path} of the model already carries adapters; give a fresh model, as "
            "timm.create_model gives it"
        )


def _adapters(
    model: nn.Module, config: MoAConfig, paths: list[str]
) -> tuple[KroneckerRule | None, dict[str, MoALinear]]:
    """The model's rule, and a layer for each of `paths`; the model is as it was."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rule, layers = None, {}
    try:
        for path in paths:
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            if config.kronecker:
                check_kron_dim(base, config.kron_dim, path)
                rule = rule or KroneckerRule(config.kron_dim, base.weight)
            layers[path] = MoALinear(base, config, rule)
    finally:  # also if there is no memory for all of them
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return rule, layers


def _call_projection(attention: nn.Module) -> None:
    """Has timm's EVA and BEiT attention call its qkv layer instead of reading its weight.

    They keep the bias of qkv apart and would compute `linear(x, qkv.weight, bias)` themselves,
    past any adapter; their flag for adding the bias afterwards is the same sum.
    """
    if hasattr(attention, "qkv_bias_separate"):
        attention.qkv_bias_separate = True  # type: ignore[assignment]


def matching_layers(model: nn.Module, config: MoAConfig) -> list[str]:
    """Paths of the linear layers that `targets` and `blocks` select, in the model's order.

    Raises `NoMatchingModuleError`: nothing would match; names what does.
    """
    modules = [(path, module) for path, module in model.named_modules() if IN_BLOCK.match(path)]
    linears = [path for path, module in modules if isinstance(module, nn.Linear)]
    others = {path: type(m).__name__ for path, m in modules if not isinstance(m, nn.Linear)}
    return _select(model, config, linears, "linear layer", others)


def matching_parameters(model: nn.Module, config: MoAConfig) -> list[str]:
    """Names of the backbone's parameters that `bias` or `attention` trains, in the model's order.

    `targets` are compared with the path of the module that owns a parameter, or, where a block
    holds a parameter itself (the q and v biases of EVA), with its name.

    Raises `NoMatchingModuleError`: nothing would match; names what does.
    """
    names = [name for name, _ in model.named_parameters() if IN_BLOCK.match(name)]
    if config.method == "bias":
        names = [name for name in names if name.endswith("bias")]
    owners: dict[str, list[str]] = {}
    for name in names:
        owner = name.removesuffix(".weight").removesuffix(".bias")
        owners.setdefault(owner, []).append(name)
    chosen = _select(model, config, list(owners), f"part that {config.method} can train", {})
    return [name for owner in chosen for name in owners[owner]]


def _select(
    model: nn.Module, config: MoAConfig, paths: list[str], what: str, others: dict[str, str]
) -> list[str]:
    """Those of `paths` whose block is selected and whose name in it matches a target."""
    places = {path: match for path in paths if (match := IN_BLOCK.fullmatch(path))}
    if not places:
        raise NoMatchingModuleError(
            f"{type(model).__name__} has no linear layers under `blocks.N`; use a timm vision "
            "transformer such as vit_base_patch16_clip_224"
        )
    blocks, targets = "all" if config.blocks is None else config.blocks, config.targets or ()
    depth = max(int(match[1]) for match in places.values()) + 1
    wanted = set(select_blocks(blocks, depth))
    names = {path: match[2] for path, match in places.items() if int(match[1]) in wanted}
    for target in targets:
        if not any(fnmatchcase(name, target) for name in names.values()):
            met = [p for p in others if (m := IN_BLOCK.match(p)) and fnmatchcase(m[2], target)]
            but = f" (it matches {met[0]}, which is {others[met[0]]})" if met else ""
            would = ", ".join(sorted(set(names.values()))) or "none"
            raise NoMatchingModuleError(
                f"moa.targets: {target!r} matches no {what} in the selected blocks{but}; these "
                f"would match: {would}"
            )
    return [p for p, name in names.items() if any(fnmatchcase(name, t) for t in targets)]


def classifier(model: nn.Module) -> nn.Module:
    """The model's classification head; of a distilled model both, as a list.

    Raises `MoAConfigError`: the model has none to train.
    """
    if not hasattr(model, "get_classifier"):
        raise MoAConfigError(
            f"{type(model).__name__} is no timm model; give one of timm.create_model, such as "
            "vit_base_patch16_clip_224"
        )
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, tuple):
        head = nn.ModuleList(head)
    if isinstance(head, CosineHead):  # which may be frozen, and then has no parameters
        return head
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise MoAConfigError(
            f"{type(model).__name__} has no classifier; create it with num_classes > 0"
        )
    return head
