"""The model of a run: a timm backbone with its weights, adapters injected, a fresh head."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import timm
import timm.data
import torch
from safetensors import SafetensorError
from torch import nn

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone with timm)
from trainer.config.run_config import ModelConfig
from trainer.process.errors import ConfigError, did_you_mean

UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError
)  # fmt: skip
"""What timm, the hub client and the readers of weight files raise when there is nothing to load."""


@dataclass(frozen=True)
class Backbone:
    """A timm model with a fresh classifier, and what identifies it."""

    model: nn.Module
    name: str
    """`architecture.tag`."""
    data_config: dict[str, Any]
    """The model's own `input_size`, `mean`, `std`, `interpolation`."""
    sha256: str
    """`moa.base_hash` of the model before injection; empty for an outline."""
    projection: nn.Linear | None = None
    """The checkpoint's own classifier, which the fresh one replaced; in CLIP's it maps to the space
    shared with texts. Only kept for a head from text."""


def check_backbone(config: ModelConfig) -> str:
    """The full timm name `architecture.tag`, without building anything.

    Raises `ConfigError`: unknown architecture or tag, or a weights file that does not exist.
    """
    architecture, _, tag = config.backbone.partition(".")
    if not timm.is_model(architecture):
        transformers = ["vit_embedded", *timm.list_models(["vit_*", "eva*", "deit*"])]
        close = difflib.get_close_matches(architecture, transformers, 3)
        hint = f"; close are {', '.join(close)}" if close else "; see timm.list_models('vit_*')"
        raise ConfigError(f"model.backbone: timm has no model {architecture!r}{hint}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ConfigError(
            f"model.backbone: {architecture} has no weights tagged {tag!r}; legal are "
            f"{', '.join(tags) or 'none'}{did_you_mean(tag, tags)}"
        )
    if config.weights not in ("pretrained", "random") and not Path(config.weights).is_file():
        raise ConfigError(
            f"model.weights: no file {config.weights!r}; legal are pretrained, random, or the path "
            "of a safetensors file"
        )
    full = timm.get_pretrained_cfg(config.backbone)
    default_tag = tag or (full.tag if full is not None and full.tag else "")
    return f"{architecture}.{default_tag}".removesuffix(".")


def create_backbone(config: ModelConfig, num_classes: int, seed: int) -> Backbone:
    """Builds the timm model on the CPU; the head, and random weights, follow from `seed`.

    With `head_init: text` the head is as random, until `text_head.use_text_head` fills it.

    Raises `ConfigError`: the name is unknown, or the weights cannot be had.
    """
    name = check_backbone(config)
    overlay = {} if config.weights in ("pretrained", "random") else {"file": config.weights}
    # The hub client reports each of its retries; the error below says it once.
    huggingface_hub.utils.logging.set_verbosity_error()
    torch.manual_seed(seed)
    own_head = config.head_init == "text"
    try:
        model = timm.create_model(
            config.backbone,
            pretrained=config.weights != "random",
            pretrained_cfg_overlay=overlay,
            **({} if own_head else {"num_classes": num_classes}),
        )
    except UNREADABLE as error:
        raise ConfigError(_no_weights(config, name, short_reason(error))) from error
    projection = None
    if own_head:
        found = model.get_classifier()
        projection = found if isinstance(found, nn.Linear) else None
        model.reset_classifier(num_classes)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return Backbone(model, name, _data_config(model), moa.base_hash(model), projection)


def _data_config(model: nn.Module) -> dict[str, Any]:
    found = timm.data.resolve_model_data_config(model)
    return {key: found[key] for key in ("input_size", "mean", "std", "interpolation")}


def short_reason(error: Exception) -> str:
    """One line of why something cannot be had."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def outline(
    config: ModelConfig, settings: moa.MoAConfig, num_classes: int
) -> tuple[Backbone, moa.InjectReport]:
    """The same model on the meta device, without weights or hash, adapters injected.

    Raises `ConfigError` or `MoAConfigError`: as when the run itself is built.
    """
    # Weights are not needed here, and may lie on another machine.
    name = check_backbone(replace(config, weights="random"))
    with torch.device("meta"):
        model = timm.create_model(config.backbone, pretrained=False, num_classes=num_classes)
        report = moa.inject(model, settings)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return Backbone(model, name, _data_config(model), ""), report


def _no_weights(config: ModelConfig, name: str, reason: str) -> str:
    if config.weights == "pretrained":
        return (
            f"model.weights: the pretrained weights of {name} cannot be had ({reason}). Without a "
            "network, download them elsewhere and give --model.weights FILE.safetensors, or copy "
            "the hub's cache and set HF_HOME; --model.weights random trains from scratch"
        )
    return f"model.weights: {config.weights!r} does not fit {name} ({reason})"
