"""The embedded backbone: timm's own `VisionTransformer`, small, with weights that ship with us.

Importing this module registers `vit_embedded` (tag `glyphs`) with timm, so that
`timm.create_model("vit_embedded", pretrained=True, num_classes=10)` works without a network.
"""

from pathlib import Path
from typing import Any, cast

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["GLYPH_CLASSES", "IMAGE_SIZE", "WEIGHTS_PATH", "vit_embedded"]

WEIGHTS_PATH = Path(__file__).resolve().parent / "weights" / "vit_embedded.safetensors"
"""The shipped weights, written by `python -m trainer.pretrain_embedded`."""

IMAGE_SIZE = 32
"""Height and width of the input in pixels."""

# The label space of the shipped head: capitals made of straight strokes alone, so that no digit and
# nothing as round as one is among them. Features that told digits apart already would leave
# adapters nothing to gain over a linear probe. Characters that differ only by size share a class:
# size is augmented away during pretraining.
GLYPH_CLASSES: tuple[str, ...] = (
    *("A", "E", "F", "H", "Il", "Kk", "L", "M", "N", "T", "Vv", "Ww", "Xx", "Y", "Zz"),
)
"""One string per class, listing the characters that belong to it."""

_SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}

default_cfgs = generate_default_cfgs(
    {
        "vit_embedded.glyphs": {
            "file": str(WEIGHTS_PATH), "license": "apache-2.0",
            "num_classes": len(GLYPH_CLASSES), "label_names": GLYPH_CLASSES,
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "fixed_input_size": True,
            "pool_size": None, "crop_pct": 1.0, "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj", "classifier": "head",
        }
    }
)  # fmt: skip


def _require_weights(kwargs: dict[str, Any]) -> None:
    """Says what to do when the file that timm is about to read is not there."""
    cfg = resolve_pretrained_cfg(
        "vit_embedded", kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    if cfg.state_dict or not cfg.file or Path(cfg.file).is_file():
        return
    raise FileNotFoundError(
        f"the weights of vit_embedded are missing: {cfg.file}. Make them with "
        f"`python -m trainer.pretrain_embedded --out {Path(cfg.file).parent}` "
        "or build the model with pretrained=False."
    )


@register_model  # type: ignore[untyped-decorator]  # timm is opaque to mypy
def vit_embedded(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Images [N, 3, 32, 32] to logits, or to features [N, 128] when `num_classes` is 0.

    With another `img_size` or `patch_size` the weights are resampled.

    Args:
        pretrained: load the shipped glyph weights, the head too unless `num_classes` is another.
        **kwargs: timm's, such as `num_classes` or `drop_path_rate`.

    Raises:
        FileNotFoundError: the weights are asked for and their file does not exist.
    """
    if pretrained:
        _require_weights(kwargs)
    return cast(
        VisionTransformer,
        build_model_with_cfg(
            VisionTransformer,
            "vit_embedded",
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,  # resamples for other sizes
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **({"img_size": IMAGE_SIZE} | _SIZES | kwargs),
        ),
    )
