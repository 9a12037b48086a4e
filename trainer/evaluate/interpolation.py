"""Models between the start of an adapter's training and its end (WiSE-FT, arXiv 2109.01903).

At alpha the adapter adds alpha times what it adds to its base, and what the base has itself (the
head, unfrozen biases, all of `full`) is (1 - alpha) theta_0 + alpha theta_1. So 1 is the adapter
and 0 the base with the head that training started from: CLIP's zero-shot head, or that of the
seed. Routers, rules and counters stay the adapter's. Each is an ordinary adapter of the same shape.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from moa.errors import AdapterError
from moa.files.saving import attached_outline
from moa.layers.head import CosineHead
from moa.model.heads import head_path
from moa.model.injection import classifier
from moa.model.merging import linear_parts
from trainer.config.class_texts import is_template
from trainer.evaluate.members import Member, base_of
from trainer.prepare.backbone import Backbone
from trainer.prepare.text_head import fill_cosine_head, known_text_models, refill_linear_head
from trainer.process.errors import ConfigError


def read_alphas(text: str) -> tuple[float, ...]:
    """The numbers of `--alpha`, in their order.

    Raises `ConfigError`: one is no number from 0 to 1, or is given twice.
    """
    found: list[float] = []
    for word in text.split(","):
        try:
            alpha = float(word) + 0.0  # -0 is 0
        except ValueError:
            alpha = math.nan
        if not 0 <= alpha <= 1:
            raise ConfigError(
                f"--alpha {text}: {word.strip()!r} is no number from 0 (the start of the training) "
                "to 1 (the adapter); give some such as 0,0.25,0.5,0.75,1"
            )
        if alpha in found:
            raise ConfigError(f"--alpha {text}: {alpha:g} is given twice; give each once")
        found.append(alpha)
    return tuple(found)


def start_of(member: Member, weights: str | None, text_model: str | None) -> Backbone:
    """The base with the head that an adapter's training started from, on the CPU.

    A linear head from text is made again with the open_clip model `text_model`; None stands for
    the one on record, if open_clip itself has it. Any other head needs no text model.

    Raises:
        ConfigError: the start is not known, or cannot be had; see `base_of`.
        AdapterError: the adapter does not fit its base, or says nothing sensible of its head.
    """
    facts, tensors = member.info.head, member.tensors
    from_text = facts.get("init") == "text"
    if not from_text:
        _check_seed(member)
    backbone = base_of(member, weights, own_head=True)
    attached_outline(backbone.model, member.info, tensors, member.source)
    head, path = classifier(backbone.model), head_path(backbone.model)
    if from_text and isinstance(head, CosineHead):  # only what the base brings along moves
        assert backbone.projection is not None
        classes, scale = tensors[f"{path}.classes"], float(tensors[f"{path}.scale"])
        fill_cosine_head(head, classes, backbone.projection, scale)
    elif from_text:
        _check_texts(member)
        refill_linear_head(backbone, facts, text_model or _known_text_model(member))
    return backbone


def _check_seed(member: Member) -> None:
    """Raises `ConfigError` unless it is known how a random head began."""
    origin = member.info.origin
    if origin is None or origin.averaged:
        what = "no origin on record" if origin is None else "the mean of several"
        raise ConfigError(
            f"--alpha: {member.source} is {what}, so the seed by which its head started is not "
            "known; give an adapter as a run saved it"
        )


def _check_texts(member: Member) -> None:
    """Raises `AdapterError` unless a linear head can be made of what is on record of it."""
    head = member.info.head
    texts, templates = head.get("class_texts"), head.get("templates")
    numbers = (head.get("scale"), head.get("mean_length"))
    if not (
        isinstance(head.get("text_model"), str)
        and _are_texts(texts)
        and len(texts) == len(member.info.classes)
        and _are_texts(templates)
        and all(map(is_template, templates))
        and all(type(n) is float and 0 < n < math.inf for n in numbers)
    ):
        raise AdapterError(
            f"{member.source}: its head does not say from which texts it was made, which --alpha "
            "needs; take another copy"
        )


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _known_text_model(member: Member) -> str:
    """The text model on record; `ConfigError` if it is not one of open_clip's own.

    Whatever else a file from elsewhere names might bring code along.
    """
    recorded: str = member.info.head["text_model"]
    if recorded not in known_text_models():
        raise ConfigError(
            f"--alpha: the head of {member.source} was made with {recorded!r}, none of open_clip's "
            f"own models; if you trust it, give --model.text_model {shlex.quote(recorded)}"
        )
    return recorded


@torch.no_grad()
def interpolated(member: Member, start: nn.Module, alpha: float) -> Member:
    """The adapter at `alpha` in [0, 1], from `start`, the model of `start_of`.

    Computed in float64 and rounded once; at 1 its tensors are the adapter's own.

    Raises `AdapterError`: the adapter does not fit the base.
    """
    info, tensors = member.info, member.tensors
    model = attached_outline(start, info, tensors, member.source)
    if alpha < 1:
        scaled, begun = linear_parts(model), dict(start.named_parameters())
        tensors = {
            name: (alpha * end.double()).to(end.dtype)
            if name in scaled
            else _between(member, name, begun, alpha)
            for name, end in tensors.items()
        }
    origin = info.origin and replace(info.origin, alpha=info.origin.alpha * alpha)
    results = info.results if alpha == 1 else {}
    return replace(member, info=replace(info, origin=origin, results=results), tensors=tensors)


def _between(member: Member, name: str, begun: Mapping[str, Tensor], alpha: float) -> Tensor:
    """A tensor between where it began and where it ended; one that the base lacks stays."""
    end = member.tensors[name]
    if name not in begun:
        return end
    if begun[name].shape != end.shape:
        raise AdapterError(
            f"{member.source}: {name} is {tuple(end.shape)}, at the start of its training it was "
            f"{tuple(begun[name].shape)}; take another copy"
        )
    return ((1 - alpha) * begun[name].double() + alpha * end.double()).to(end.dtype)
