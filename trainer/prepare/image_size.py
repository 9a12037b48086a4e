"""Images and patches of another size than the backbone was trained with."""

from typing import Any

import timm
from torch import nn

from trainer.config.model import ModelConfig
from trainer.process.errors import ConfigError, short_reason


def size_arguments(config: ModelConfig) -> dict[str, Any]:
    """What timm is told of sizes; empty for the backbone's own, with any other its weights differ.

    A model of dynamic size keeps the position embeddings of its own size.
    """
    own = timm.get_pretrained_cfg(config.backbone)
    told: dict[str, Any] = {}
    if config.image_size and not config.dynamic_size:
        if own is None or own.input_size[-1] != config.image_size:
            told["img_size"] = config.image_size
    if config.patch_size:
        told["patch_size"] = config.patch_size
    if config.dynamic_size:
        told["dynamic_img_size"] = True
    return told


def set_image_size(model: nn.Module, config: ModelConfig) -> None:
    """Makes it the size of the images that timm and we give the model.

    Raises `ConfigError`: patches do not fill such an image.
    """
    if not (config.image_size or config.patch_size):
        return
    known: Any = model.pretrained_cfg
    size = config.image_size or known["input_size"][-1]
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", (1,))[0]
    if size % patch:
        below = size - size % patch
        near = " or ".join(str(n) for n in (below, below + patch) if n)
        setting = "patch_size" if config.patch_size and not config.image_size else "image_size"
        raise ConfigError(
            f"model.{setting}: {size} pixels are no multiple of the patch of {patch} of "
            f"{config.backbone}; give --model.image_size {near}"
        )
    if config.image_size:
        known["input_size"] = (3, size, size)


def of_one_size(config: ModelConfig, error: TypeError) -> Exception:
    """The error for a model that knows nothing of sizes; the error itself if that is not it."""
    names = ("image_size", "patch_size", "dynamic_size")
    given = [f"model.{name}" for name in names if getattr(config, name)]
    if not given or "unexpected keyword argument" not in str(error):
        return error
    return ConfigError(
        f"{', '.join(given)}: {config.backbone} comes in one form only ({short_reason(error)}); "
        "leave it out, or take another backbone, such as vit_base_patch16_clip_224.laion2b"
    )
