"""Settings of the frozen backbone and of its head; imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.class_texts import read_class_names, read_templates
from trainer.config.limits import SHARE, out_of_range
from trainer.process.errors import noted

MOST_PIXELS = 2**14
"""Of a side of an image."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbone."""

    backbone: str = "vit_embedded.glyphs"
    """timm name, architecture.tag; vit_embedded is the small one shipped with the trainer"""
    weights: str = "pretrained"
    """pretrained (timm's own for the tag), random, or the path of a safetensors file"""
    image_size: int | None = None
    """side of the images in pixels, a multiple of the patch; position embeddings are interpolated
    (default: the backbone's own size)"""
    patch_size: int | None = None
    """side of the patches in pixels; their embedding is resampled (default: the backbone's own)"""
    dynamic_size: bool = False
    """leave the base's position embeddings as they are, and interpolate them at every forward"""
    grad_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    compile: Literal["off", "blocks"] = "off"
    """blocks: torch.compile of the transformer's blocks in training, at the first step; the result
    is the same up to rounding"""
    head: Literal["linear", "cosine"] = "linear"
    """linear, or cosine: scores are scaled cosines with a vector for each class; from text these
    stay and CLIP's projection trains, at random they train themselves"""
    head_init: Literal["random", "text"] = "random"
    """random, or text: the classifier starts as CLIP's zero-shot classifier of the class names,
    exactly if it is a cosine, else up to the confidence"""
    head_frozen: bool = False
    """keep a cosine head from text as it starts, CLIP's projection too"""
    dropout: float = 0.0
    """chance of each number of the features to be left out before the head, in training"""
    text_model: str | None = None
    """open_clip model of the texts: NAME:TAG, NAME:FILE, hf-hub:OWNER/REPOSITORY or
    local-dir:FOLDER; default: the model whose visual tower the backbone is"""
    prompts: str = "photo"
    """texts of head_init text: photo (one sentence), styles (the mean over twelve), a file with one
    template a line, or a template such as 'a photo of a {}.'"""
    class_names: str | None = None
    """YAML file of `class: words` for classes that the texts shall call otherwise"""

    def problems(self) -> list[str]:
        """Every setting that cannot work, one line each."""
        found = [
            f"model.{name}: {size}; must be a whole number from 1 to {MOST_PIXELS}"
            for name, size in (("image_size", self.image_size), ("patch_size", self.patch_size))
            if size is not None and not 1 <= size <= MOST_PIXELS
        ]
        found += out_of_range("model", self, dropout=SHARE)
        if self.head_frozen and (self.head, self.head_init) != ("cosine", "text"):
            found.append(
                "model.head_frozen: true keeps a head as it starts, which only one from text is "
                "good for; add --model.head cosine --model.head_init text, or leave it out"
            )
        if self.head_init == "text":
            if self.weights == "random":
                needed = "a pretrained CLIP backbone, not model.weights random"
                return [*found, f"model.head_init: text fits {needed}"]
            with noted(found):
                read_templates(self.prompts)
            with noted(found):
                read_class_names(self.class_names)
            return found
        return found + [
            f"model.{name}: {getattr(self, name)!r} has no effect without --model.head_init text"
            for name in ("text_model", "prompts", "class_names")
            if getattr(self, name) != getattr(ModelConfig, name)
        ]
