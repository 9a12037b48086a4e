"""A classifier from the text encoder of the CLIP model that the backbone was trained in.

Letters: C classes, D width of the backbone, P width of the shared embedding space.

CLIP scores an image by s * (W f + b) . t_c / |W f + b|, with f [D] the backbone's pooled feature,
W [P, D] and b its projection (timm keeps it as the classifier of CLIP checkpoints), t_c [P] the
unit embedding of the class's text and s the learnt scale. A linear head cannot divide by a length
that differs from image to image, so it divides by m, the mean of |W f + b| over a few images of the
source domains:

    head weight = s / m * T W      head bias = s / m * T b + CLIP's own bias, if it has one

An image's scores are CLIP's times |W f + b| / m: the same ranking of classes, so the same zero-shot
accuracy, and a confidence that is off by how much the image's length differs from the mean. Being
an ordinary linear layer, the head is trained, saved and loaded like any other.

A cosine head (`moa.layers.head`) divides by the length itself and takes W, b, T and s as they are,
so that its scores are CLIP's. A bias that CLIP adds to the scores of all classes alike is left out,
since probabilities do not depend on it.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from moa.layers.head import CosineHead
from moa.model.injection import classifier
from shards import ShardIndex, eval_transform, evaluation_loader
from trainer.config.class_texts import read_class_names, read_templates, spoken_names
from trainer.config.run_config import RunConfig
from trainer.prepare.backbone import UNREADABLE, Backbone
from trainer.process.errors import ConfigError, did_you_mean, short_reason

SCHEMES = ("hf-hub:", "local-dir:")
IMAGES_PER_DOMAIN = 4
"""Images of each source domain over which |W f + b| is averaged; it differs little by image."""


@dataclass(frozen=True)
class TextModel:
    """An open_clip model, of which only the text side is used, and its tokenizer."""

    model: nn.Module
    tokenizer: Callable[..., Tensor]

    def scale(self) -> float:
        """s, by which CLIP multiplies cosines."""
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]

    def bias(self) -> float:
        """What is added to every score; 0 for all but SigLIP's kind."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    def embed(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit embeddings T [C, P]: per class the mean over templates, fp32."""
        from open_clip import build_zero_shot_classifier

        weights = build_zero_shot_classifier(self.model, self.tokenizer, names, templates)
        return weights.T.float().contiguous()  # type: ignore[no-any-return]


def text_model_of(backbone: str) -> str | None:
    """`NAME:TAG` of the open_clip model whose visual tower a timm name stands for, if known."""
    table = yaml.safe_load(Path(__file__).with_name("clip_models.yaml").read_text(encoding="utf-8"))
    return table.get(backbone.replace("_quickgelu", ""))  # type: ignore[no-any-return]


def load_text_model(source: str) -> TextModel:
    """Loads an open_clip model on the CPU; `source` is as `model.text_model`.

    Raises `ConfigError`: open_clip is missing, there is no such model, or it cannot be had.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "model.head_init: text needs open_clip; pip install 'moa-trainer[text]'"
        ) from error
    kind, colon, place = source.partition(":")
    source = f"{kind}{colon}{os.path.expanduser(place)}"
    name, weights = source, ""
    if not source.startswith(SCHEMES):
        name, _, weights = source.partition(":")
        if name not in open_clip.list_models():
            hint = did_you_mean(name, open_clip.list_models())
            raise ConfigError(f"model.text_model: open_clip has no model {name!r}{hint}")
        if not weights:
            raise ConfigError(
                f"model.text_model: {source!r} names no weights; give {name}:TAG with a tag of "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or '(none)'}, or "
                f"{name}:FILE"
            )
    try:
        model = open_clip.create_model(name, pretrained=weights or None, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except UNREADABLE as error:
        raise ConfigError(
            f"model.text_model: {source} cannot be had ({short_reason(error)}). Without a network, "
            "download it elsewhere and give --model.text_model NAME:FILE or local-dir:FOLDER, or "
            "copy the hub's cache and set HF_HOME"
        ) from error
    return TextModel(model.eval(), tokenizer)


@torch.no_grad()
def mean_length(model: nn.Module, images: Tensor, projection: nn.Linear) -> float:
    """m: mean of |W f + b| over `images` [N, 3, H, W] as the model wants them."""
    was_training = model.training
    model.eval()
    features = model.forward_features(images)  # type: ignore[operator]
    pooled = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    model.train(was_training)
    return float(projection(pooled).norm(dim=1).mean())


@torch.no_grad()
def fill_head(
    head: nn.Module, text: Tensor, projection: nn.Linear, scale: float, bias: float = 0.0
) -> None:
    """Writes text embeddings T [C, P] into a linear classifier [C, D], as the module says.

    The `projection` is W and b, the `scale` s / m, and `bias` what CLIP itself adds to every score.

    Raises `ConfigError`: the text embeddings are not of the space that W maps to.
    """
    _check_space(text, projection)
    assert isinstance(head, nn.Linear)
    head.weight.copy_(scale * text @ projection.weight.float())
    if head.bias is not None:
        own = torch.zeros(()) if projection.bias is None else text @ projection.bias.float()
        head.bias.copy_(scale * own + bias)


@torch.no_grad()
def fill_cosine_head(head: CosineHead, text: Tensor, projection: nn.Linear, scale: float) -> None:
    """Writes W and b, T [C, P] and s into a cosine head whose space is that of W.

    Raises `ConfigError`: the text embeddings are not of that space.
    """
    _check_space(text, projection)
    assert head.weight is not None
    assert head.bias is not None
    head.weight.copy_(projection.weight)
    if projection.bias is not None:
        head.bias.copy_(projection.bias)
    head.classes.copy_(text)
    head.scale.fill_(scale)


def _check_space(text: Tensor, projection: nn.Linear) -> None:
    if text.shape[1] != projection.out_features:
        raise ConfigError(
            f"model.text_model: its embeddings have {text.shape[1]} numbers, the backbone's own "
            f"head gives {projection.out_features}; the backbone must be the visual tower of that "
            "very CLIP model, not one fine-tuned to classify"
        )


def source_images(
    config: RunConfig, index: ShardIndex, withheld: Collection[int], backbone: Backbone
) -> Tensor:
    """A few training images of each source domain [N, 3, H, W], as evaluation shows them."""
    loaders = [
        evaluation_loader(
            index, domain, "in", trial_seed=config.train.trial_seed,
            holdout_fraction=config.data.holdout_fraction,
            transform=eval_transform(backbone.data_config), batch_size=IMAGES_PER_DOMAIN,
        )
        for domain in range(len(index.domains))
        if domain not in withheld
    ]  # fmt: skip
    return torch.cat([next(iter(loader)).images for loader in loaders])


def use_text_head(
    config: RunConfig, index: ShardIndex, withheld: Collection[int], backbone: Backbone
) -> dict[str, Any]:
    """Fills the backbone's fresh classifier from text, before adapters are injected.

    Returns:
        What an adapter's configuration keeps of it.

    Raises:
        ConfigError: a setting that cannot work; see `load_text_model`.
    """
    settings, projection = config.model, backbone.projection
    source = settings.text_model or text_model_of(backbone.name)
    if source is None:
        raise ConfigError(
            f"model.text_model: not known for {backbone.name}; give the open_clip model whose "
            "visual tower it is, as NAME:TAG, NAME:FILE, hf-hub:OWNER/REPOSITORY or "
            "local-dir:FOLDER"
        )
    assert projection is not None, "the backbone is made for a head from text"
    templates = read_templates(settings.prompts)
    replaced = read_class_names(settings.class_names)
    names = spoken_names(index.classes, config.data.dataset, replaced)
    with torch.random.fork_rng(devices=[]):  # other ranks, which draw adapters, do not do this
        text_model = load_text_model(source)
        embeddings = text_model.embed(names, templates)
    head, scale = classifier(backbone.model), text_model.scale()
    facts = {
        "init": "text", "text_model": source, "templates": list(templates), "class_texts": names,
        "scale": scale,
    }  # fmt: skip
    if isinstance(head, CosineHead):
        fill_cosine_head(head, embeddings, projection, scale)
        return facts
    images = source_images(config, index, withheld, backbone)
    length = mean_length(backbone.model, images, projection)
    fill_head(head, embeddings, projection, scale / length, text_model.bias())
    return facts | {"mean_length": length}
