"""The model of a run: a timm backbone with its weights, adapters injected, a fresh head."""

import difflib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import timm
import timm.data
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone with timm)
from moa.model.heads import fit_head
from moa.model.injection import classifier
from trainer.config.run_config import ModelConfig
from trainer.prepare.image_size import of_one_size, set_image_size, size_arguments
from trainer.process.errors import ConfigError, did_you_mean, short_reason
from trainer.process.world import world_from_environment

log = logging.getLogger(__name__)

UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError
)  # fmt: skip
"""What timm, the hub client and the readers of weight files raise when there is nothing to load."""

HUB_FILES = [
    f"{start}{end}"
    for start in ("", "open_clip_")
    for end in ("model.safetensors", "pytorch_model.bin")
]
"""Names under which repositories of the hub have weights."""


@dataclass(frozen=True)
class Backbone:
    """A timm model with a fresh classifier, and what identifies it."""

    model: nn.Module
    name: str
    """`architecture.tag`."""
    data_config: dict[str, Any]
    """`input_size`, `mean`, `std`, `interpolation` of its images."""
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
    file = config.weights if config.weights not in ("pretrained", "random") else ""
    # Only some of timm's own files are in a form of their own, which is never safetensors.
    overlay: dict[str, Any] = {"file": file} if file else {}
    if file and not file.endswith(".npz"):
        overlay["custom_load"] = False
    own_head = config.head_init == "text"
    if not own_head:
        overlay["num_classes"] = -1  # a pretrained head is dropped, however many classes it has
    # The hub client reports each of its retries; the error below says it once.
    huggingface_hub.utils.logging.set_verbosity_error()
    if config.weights == "pretrained":
        _announce(name)
    torch.manual_seed(seed)
    loads: list[tuple[list[str], list[str]]] = []
    try:
        with _loads_noted(loads):
            model = timm.create_model(
                config.backbone,
                pretrained=config.weights != "random",
                pretrained_cfg_overlay=overlay,
                **size_arguments(config),
                **({} if own_head else {"num_classes": num_classes}),
            )
        set_image_size(model, config)
        if config.weights != "random":
            _check_weights(model, own_head, *(loads[-1] if loads else ([], [])))
    except TypeError as error:
        raise of_one_size(config, error) from error
    except UNREADABLE as error:
        raise ConfigError(_no_weights(config, name, short_reason(error))) from error
    projection = _fresh_head(model, config, num_classes)
    _set_checkpointing(model, config)
    return Backbone(model, name, _data_config(model), moa.base_hash(model), projection)


def hub_weights(name: str) -> tuple[str, bool]:
    """The hub's repository of a model's weights, empty if none; whether they are in the cache."""
    source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        return "", False
    files = [source.hf_hub_filename] if source.hf_hub_filename else HUB_FILES
    cached = any(huggingface_hub.try_to_load_from_cache(source.hf_hub_id, f) for f in files)
    return source.hf_hub_id, cached


def _fresh_head(model: nn.Module, config: ModelConfig, num_classes: int) -> nn.Linear | None:
    """Gives a model its classifier, random as yet; returns the projection where one is needed.

    A model for a head from text comes with its own classifier, any other with one for the classes.

    Raises `ConfigError`: there is no projection.
    """
    projection = model.get_classifier() if config.head_init == "text" else None  # type: ignore[operator]
    if config.head_init == "text":
        if not isinstance(projection, nn.Linear):
            raise ConfigError(
                f"model.head_init: {config.backbone} comes without the projection that CLIP "
                "trained; use a CLIP backbone with its own weights"
            )
        model.reset_classifier(num_classes)  # type: ignore[operator]
    if config.head == "cosine":
        space = None if projection is None else projection.out_features
        kind = {"kind": "cosine", "space": space, "frozen": config.head_frozen}
        fit_head(model, num_classes, kind)
    return projection


def _announce(name: str) -> None:
    """Says on the main rank what the hub is asked for, which takes its time, if only to fail."""
    source, cached = hub_weights(name)
    if source and not cached and world_from_environment().is_main:
        where = huggingface_hub.constants.HF_HUB_CACHE
        log.warning("fetching the weights of %s from %s into %s", name, source, where)


@contextmanager
def _loads_noted(loads: list[tuple[list[str], list[str]]]) -> Iterator[None]:
    """Within the block models are loaded with what there is.

    Each load leaves the names that were missing, and those that nothing wants. timm itself would
    pass over either, unless it keeps the classifier.
    """
    load = nn.Module.load_state_dict

    def noting(model: nn.Module, state: Any, strict: bool = True, assign: bool = False) -> Any:
        result = load(model, state, strict=False, assign=assign)
        loads.append((result.missing_keys, result.unexpected_keys))
        return result

    patched: Any = nn.Module
    patched.load_state_dict = noting
    try:
        yield
    finally:
        patched.load_state_dict = load


def _check_weights(
    model: nn.Module, with_head: bool, missing: list[str], unknown: list[str]
) -> None:
    """Raises `ValueError` if weights of the frozen backbone were not given, or are not finite."""
    needed: dict[str, Tensor] = dict(model.named_parameters())
    needed |= {name: b for name, b in model.named_buffers() if "running_" in name}
    if not with_head:
        head = {id(parameter) for parameter in classifier(model).parameters()}
        needed = {name: tensor for name, tensor in needed.items() if id(tensor) not in head}
    missing = [name for name in missing if name in needed]
    if missing:
        ends = ((name, wanted) for wanted in missing for name in unknown if name.endswith(wanted))
        prefixes = Counter(name.removesuffix(wanted) for name, wanted in ends)
        hint = ""
        if prefixes and (prefix := prefixes.most_common(1)[0][0]):
            hint = f"; without the prefix {prefix!r} the names would fit: save them so"
        raise ValueError(
            f"{len(missing)} of {len(needed)} tensors are missing, the first is {missing[0]}{hint}"
        )
    if wrong := [name for name, tensor in needed.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{wrong[0]} holds NaN or infinity, as do {len(wrong) - 1} other tensors")


def _set_checkpointing(model: nn.Module, config: ModelConfig) -> None:
    try:
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.grad_checkpointing: {config.backbone} cannot; leave it at false"
        ) from error


def _data_config(model: nn.Module) -> dict[str, Any]:
    found = timm.data.resolve_model_data_config(model)
    return {key: found[key] for key in ("input_size", "mean", "std", "interpolation")}


def outline(
    config: ModelConfig, settings: moa.MoAConfig, num_classes: int
) -> tuple[Backbone, moa.InjectReport]:
    """The same model on the meta device, without weights or hash, adapters injected.

    Raises `ConfigError` or `MoAConfigError`: as when the run itself is built.
    """
    # Weights are not needed here, and may lie on another machine.
    name = check_backbone(replace(config, weights="random"))
    classes = {} if config.head_init == "text" else {"num_classes": num_classes}
    with torch.device("meta"):
        try:
            model = timm.create_model(
                config.backbone, pretrained=False, **size_arguments(config), **classes
            )
        except TypeError as error:
            raise of_one_size(config, error) from error
        set_image_size(model, config)
        _fresh_head(model, config, num_classes)
        report = moa.inject(model, settings)
    _set_checkpointing(model, config)
    return Backbone(model, name, _data_config(model), ""), report


def _no_weights(config: ModelConfig, name: str, reason: str) -> str:
    if config.weights == "pretrained":
        return (
            f"model.weights: the pretrained weights of {name} cannot be had ({reason}). Without a "
            "network, download them elsewhere and give --model.weights FILE.safetensors, or copy "
            "the hub's cache and set HF_HOME; --model.weights random trains from scratch"
        )
    return f"model.weights: {config.weights!r} does not fit {name} ({reason})"
