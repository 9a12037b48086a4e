"""Several adapters on one frozen backbone, and what they predict together.

An ensemble of k adapters costs k forward passes an image, and the memory of one backbone and k
adapters: the models are trees of small modules around the same frozen tensors.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moa.files.reading import AdapterInfo
from moa.files.saving import attach
from trainer.evaluate.predictions import Predictions

Average = Literal["probabilities", "logits"]


def twin(model: nn.Module, own: Collection[str]) -> nn.Module:
    """A copy of a model that shares all its tensors but those named in `own`."""
    memo: dict[int, Any] = {
        id(tensor): tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if name not in own
    }
    return copy.deepcopy(model, memo)


def models_on(
    backbone: nn.Module, adapters: Sequence[tuple[str, AdapterInfo, Mapping[str, Tensor]]]
) -> nn.ModuleList:
    """One model for each adapter, all around the frozen tensors of one backbone.

    What an adapter brings values for, such as a head or an unfrozen bias, is its model's own.

    Args:
        backbone: a fresh base on the CPU; it keeps its own values.
        adapters: name, description and values of each.

    Raises:
        AdapterError: names or shapes of an adapter do not fit the backbone.
    """
    models = nn.ModuleList()
    for name, info, tensors in adapters:
        model = twin(backbone, tensors.keys())
        attach(model, info, tensors, name)
        models.append(model)
    return models


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all different tensors of a model."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def average(members: Sequence[Predictions], kind: Average) -> Predictions:
    """The ensemble's predictions.

    Args:
        members: what each model says to the same samples.
        kind: `probabilities` takes the mean of the softmax, `logits` of the scores before it. The
            former lets no model outvote the others by the mere scale of its scores.

    Returns:
        float64 logits; of mean probabilities, their logarithm.
    """
    total = torch.zeros_like(members[0].logits, dtype=torch.float64)
    for member in members:
        scores = member.logits.double()
        total += scores.softmax(1) if kind == "probabilities" else scores
    mean = total / len(members)
    if kind == "probabilities":
        mean = mean.clamp_min(torch.finfo(torch.float64).tiny).log()
    return Predictions(mean, members[0].labels, members[0].unusable)
