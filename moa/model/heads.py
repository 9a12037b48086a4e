"""The classifier of a model: made anew for other classes or of another kind, and described."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from moa.errors import MoAConfigError
from moa.layers.head import CosineHead
from moa.model.injection import classifier


def fit_head(model: nn.Module, num_classes: int | None, settings: Mapping[str, Any]) -> None:
    """Gives a fresh model the classifier for so many classes (None: as many as it has).

    `settings` are as `moa.layers.head.check_settings` says. A linear classifier that fits stays,
    with its values; a new one keeps device and precision.

    Raises `MoAConfigError`: the model has no classifier, or two where one is to be a cosine.
    """
    old = classifier(model)
    like = next(chain(old.parameters(), old.buffers()))
    has = (old.classes if isinstance(old, CosineHead) else like).shape[0]
    classes = num_classes or has
    if isinstance(old, CosineHead) or classes != has:
        model.reset_classifier(classes)  # type: ignore[operator]
        classifier(model).to(device=like.device, dtype=like.dtype)
    if settings.get("kind") != "cosine":
        return
    linear = classifier(model)
    if not isinstance(linear, nn.Linear):
        raise MoAConfigError(
            f"model.head: {type(model).__name__} has two classifiers, or one that is no linear "
            "layer, in whose place no cosine head can stand; use linear"
        )
    parent, _, name = head_path(model).rpartition(".")
    head = CosineHead(
        linear.in_features, classes, settings["space"], settings["frozen"], like.device, like.dtype
    )
    setattr(model.get_submodule(parent), name, head)


def head_path(model: nn.Module) -> str:
    """The path of the classifier; empty where there are two."""
    head = classifier(model)
    return next((path for path, module in model.named_modules() if module is head), "")


def head_settings(model: nn.Module) -> dict[str, Any]:
    """What an adapter of this model says of its head; nothing of a linear one."""
    return next((m.settings() for m in model.modules() if isinstance(m, CosineHead)), {})


def head_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a cosine head keeps as it is, by name; without it the head could not be made again."""
    kept = {id(b) for m in model.modules() if isinstance(m, CosineHead) for b in m.buffers()}
    return {name: b for name, b in model.named_buffers() if id(b) in kept}
