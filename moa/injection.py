"""`inject`: put adapters into a timm vision transformer and freeze everything else."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from moa.config import MoAConfig, select_blocks
from moa.errors import MoAConfigError, NoMatchingModuleError
from moa.experts import KroneckerRule
from moa.layer import MoALinear, check_kron_dim

_IN_BLOCK = re.compile(r"(?:^|.*\.)blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did.

    Attributes:
        layers: module paths of the wrapped layers, in the model's order.
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

    All checks come first: a model is either changed completely or not at all.

    Args:
        model: a timm vision transformer (has `blocks` and `get_classifier`).
        config: the method and its settings.

    Raises:
        MoAConfigError: an illegal setting, or one that does not fit the widths or depth.
        NoMatchingModuleError: `targets` in `blocks` match no linear layer.
    """
    config.check()
    config = config.resolved()
    head = classifier(model)
    for path, module in model.named_modules():
        if isinstance(module, MoALinear):
            raise MoAConfigError(f"{path} already carries adapters: inject into a fresh model")
    paths = matching_layers(model, config) if config.adapts else []
    bases = {path: model.get_submodule(path) for path in paths}
    if config.kronecker:
        for path, base in bases.items():
            assert isinstance(base, nn.Linear)
            check_kron_dim(base, config.kron_dim, path)
    model.requires_grad_(config.method == "full")
    rule = None
    if config.kronecker:
        rule = KroneckerRule(config.kron_dim, next(iter(bases.values())).weight)  # type: ignore[arg-type]
        model.kron_rule = rule
    for number, (path, base) in enumerate(bases.items()):
        assert isinstance(base, nn.Linear)
        layer = MoALinear(base, config, rule)
        layer.layer_number = number
        layer.train(base.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    head.requires_grad_(True)
    return _report(model, paths)


def matching_layers(model: nn.Module, config: MoAConfig) -> list[str]:
    """Paths of the linear layers that `targets` and `blocks` select, in the model's order."""
    linears: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        match = _IN_BLOCK.fullmatch(path)
        if match and isinstance(module, nn.Linear):
            linears.setdefault(int(match[1]), []).append((match[2], path))
    if not linears:
        raise NoMatchingModuleError(
            f"{type(model).__name__} has no linear layers under `blocks.N`; use a timm vision "
            "transformer such as vit_base_patch16_clip_224"
        )
    blocks = "all" if config.blocks is None else config.blocks
    wanted = select_blocks(blocks, max(linears) + 1)
    targets = config.targets or ()
    names = {name for block in wanted for name, _ in linears.get(block, [])}
    for target in targets:
        if not any(fnmatchcase(name, target) for name in names):
            raise NoMatchingModuleError(
                f"moa.targets: {target!r} matches no linear layer in the selected blocks; these "
                f"would match: {', '.join(sorted(names)) or 'none'}"
            )
    return [
        path
        for block in wanted
        for name, path in linears.get(block, [])
        if any(fnmatchcase(name, target) for target in targets)
    ]


def classifier(model: nn.Module) -> nn.Module:
    """The model's classification head.

    Raises:
        MoAConfigError: the model has none to train.
    """
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise MoAConfigError(
            f"{type(model).__name__} has no classifier; create it with num_classes > 0"
        )
    return head


def _report(model: nn.Module, layers: list[str]) -> InjectReport:
    return InjectReport(
        layers=tuple(layers),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head=sum(p.numel() for p in classifier(model).parameters()),
        total=sum(p.numel() for p in model.parameters()),
    )
