"""A tiny vision transformer, one small configuration per method, and slow dense formulas."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moa import MoAConfig, RoutingPosition
from moa.files.hub import CONFIG_FILE, WEIGHTS_FILE
from moa.files.reading import config_hash
from moa.layers.experts import KroneckerExpert, KroneckerRule, LoRAExpert

METHODS = (
    "full",
    "linear",
    "bias",
    "attention",
    "lora",
    "kadaptation",
    "multi_lora",
    "moa_lora",
    "moa_kron",
)
ADAPTERS = METHODS[4:]
MIXTURES = METHODS[7:]
SEVERAL = METHODS[6:]
DIM, SIDE = 16, 16


def tiny_vit(num_classes: int = 3, depth: int = 4, seed: int = 0) -> VisionTransformer:
    """Four blocks of width 16 on 16 x 16 images: 5 tokens an image."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=DIM, depth=depth, num_heads=2, num_classes=0
    )
    with torch.no_grad():  # timm starts biases at zero, which would hide a lost one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if num_classes:  # last, so that the rest does not depend on it
        model.reset_classifier(num_classes)
    return model


def small_config(method: str, **changes: object) -> MoAConfig:
    """The method's defaults, with sizes that fit the tiny model."""
    ranks = {"ranks": (1, 2, 3)} if method in SEVERAL else {}
    settings = {"method": method, "router_dim": 8, "kron_dim": 8, **ranks, **changes}
    return MoAConfig(**settings)  # type: ignore[arg-type]


def stir(model: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Replaces every trainable number, so that no factor is zero or tiny any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                fresh = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale * fresh)


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Writes a configuration into an adapter's folder as a forger would, with fitting hashes."""
    weights = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    own = {WEIGHTS_FILE: weights, CONFIG_FILE: config_hash(config)}
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "sha256": own}))


def images(number: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, SIDE, SIDE, generator=generator, dtype=dtype)


def position(first: int = 0, step: int = 0, seed: int = 0) -> RoutingPosition:
    return RoutingPosition(seed=seed, step=step, first=first)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that an injection or a load could change, in comparable form."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "values": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for part in ("modules", "parameters", "training"):
        assert after[part] == before[part], part
    assert_equal_tensors(after["values"], before["values"])  # type: ignore[arg-type]


def assert_equal_tensors(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Same names in any order; same shapes, dtypes and bits."""
    assert sorted(given) == sorted(wanted)
    for name, tensor in wanted.items():
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name], tensor), name


def dense_update(expert: LoRAExpert | KroneckerExpert, rule: KroneckerRule | None = None) -> Tensor:
    """The [D, O] matrix of an expert, spelled out: delta(x) = x @ matrix."""
    if isinstance(expert, LoRAExpert):
        return (expert.up @ expert.down).T
    assert rule is not None
    terms = [
        torch.kron(torch.outer(u, v), left @ right)
        for u, v, left, right in zip(rule.left, rule.right, expert.left, expert.right, strict=True)
    ]
    return torch.stack(terms).sum(0)


def dense_delta(x: Tensor, matrices: Iterable[Tensor], gates: Tensor | None) -> Tensor:
    """Token by token and expert by expert."""
    rows = []
    for n, token in enumerate(x):
        terms = [
            (token @ matrix) * (1.0 if gates is None else gates[n, e])
            for e, matrix in enumerate(matrices)
        ]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows)
