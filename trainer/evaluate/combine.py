"""Several adapters on one frozen backbone, and what they predict together.

An ensemble of k adapters costs k forward passes an image, and the memory of one backbone and k
adapters: the models are trees of small modules around the same frozen tensors.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moa.files.origin import Origin
from moa.files.saving import attach
from trainer.evaluate.members import SOUP, Member
from trainer.evaluate.predictions import Predictions
from trainer.process.errors import ConfigError

Average = Literal["probabilities", "logits"]


def models_on(backbone: nn.Module, adapters: Sequence[Member]) -> nn.ModuleList:
    """One model for each adapter, all around the frozen tensors of one fresh backbone on the CPU.

    What an adapter brings values for, such as a head or an unfrozen bias, is its model's own. One
    whose names or shapes do not fit the backbone is an `AdapterError`.
    """
    models = nn.ModuleList()
    for adapter in adapters:
        tensors = chain(backbone.named_parameters(), backbone.named_buffers())
        shared: dict[int, Any] = {id(t): t for name, t in tensors if name not in adapter.tensors}
        model = copy.deepcopy(backbone, shared)  # makes no copy of these
        attach(model, adapter.info, adapter.tensors, adapter.label)
        models.append(model)
    return models


def ready(models: nn.ModuleList, dtype: torch.dtype, device: torch.device) -> nn.ModuleList:
    """The models on a device, to compute in `dtype`; buffers stay exact, as in the engine."""
    for parameter in models.parameters():
        parameter.data = parameter.data.to(dtype)
    return models.to(device)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all different tensors of a model."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def average(members: Sequence[Predictions], kind: Average) -> Predictions:
    """The ensemble's predictions, from what each model says to the same samples.

    The mean is taken of the softmax or of the scores before it. The former lets no model outvote
    the others by the mere scale of its scores. The result has float64 logits; of mean
    probabilities, their logarithm.
    """
    scores = (member.logits.double() for member in members)
    if kind == "logits":
        return replace(members[0], logits=_mean(scores, len(members)))
    shares = _mean((each.softmax(1) for each in scores), len(members))
    return replace(members[0], logits=shares.clamp_min(torch.finfo(torch.float64).tiny).log())


def _mean(values: Iterable[Tensor], number: int) -> Tensor:
    """The mean of float64 tensors, of which only one is in memory at a time."""
    return sum(values, torch.zeros((), dtype=torch.float64)) / number


# Settings that count in training only, or for speed.
OF_TRAINING = {
    "ep_size", "transport", "kron_impl", "gate_noise", "aux_weight", "expert_dropout",
}  # fmt: skip


def soup(members: Sequence[Member], command: str) -> Member:
    """The mean of some adapters, tensor by tensor, in fp32.

    Sums are taken in float64 and rounded once, so the order of the adapters does not count. Whole
    numbers (the balance of `balance = bias`) are rounded to the nearest. The card names `command`
    as what made it. What cannot be averaged is a `ConfigError`, with every reason in a line.
    """
    if len(members) < 2:
        raise ConfigError("--combine soup: needs two adapters or more; give --adapter A B")
    if problems := _incompatibilities(members):
        raise ConfigError("\n".join(problems))
    mean = {}
    for name, tensor in members[0].tensors.items():
        value = _mean((member.tensors[name].double() for member in members), len(members))
        whole = not tensor.is_floating_point()
        mean[name] = value.round().to(tensor.dtype) if whole else value.float()
    info = replace(members[0].info, results={}, origin=_origin(members, command))
    return Member(SOUP, SOUP, info, mean)


def _incompatibilities(members: Sequence[Member]) -> list[str]:
    """Why adapters cannot be averaged, one line each; their base and classes are equal already."""
    found, first = [], members[0]
    for member in members[1:]:
        mine, other = _settings(member), _settings(first)
        differ = [f"moa.{k}: {mine[k]!r} and {other[k]!r}" for k in mine if mine[k] != other[k]]
        heads = [m.info.head for m in (member, first)]
        if any("kind" in head for head in heads) and heads[0] != heads[1]:
            keys = sorted({key for head in heads for key in head})
            named = next(key for key in keys if heads[0].get(key) != heads[1].get(key))
            differ.append(f"the head's {named}")
        if not differ:
            names = sorted(name for name, _ in _shapes(member) ^ _shapes(first))
            differ = [f"the tensor {name}" for name in names[:1]]
        if differ:
            pair = f"{member.source} and {first.source}"
            found.append(f"--combine soup: {pair} differ in {'; '.join(differ)}")
    if found:
        found.append(
            "only adapters of the same shape have a mean; --combine ensemble averages what any "
            "adapters of one base predict"
        )
    return found


def _settings(member: Member) -> dict[str, Any]:
    return {k: v for k, v in asdict(member.info.moa.resolved()).items() if k not in OF_TRAINING}


def _shapes(member: Member) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in member.tensors.items()}


def _origin(members: Sequence[Member], command: str) -> Origin | None:
    """What the adapters have in common; None if not all saw the same data in the same split."""
    origins = [member.info.origin for member in members]
    first = origins[0]
    if first is None:
        return None
    made = {  # one base may lie in several files
        "seed": first.seed, "command": command, "processes": 1, "weights": first.weights,
        "averaged": tuple(member.label for member in members),
    }  # fmt: skip
    common = {origin and replace(origin, **made) for origin in origins}  # type: ignore[arg-type]
    return common.pop() if len(common) == 1 else None


def start_warning(members: Sequence[Member]) -> list[str]:
    """A line for the user if the adapters did not start from the same values."""
    seeds = {m.info.origin.seed for m in members if m.info.origin}
    if len(seeds) < 2:
        return []
    return [
        f"soup: the adapters started from different seeds ({', '.join(map(str, sorted(seeds)))}); "
        "the mean of factors that never lay close together is rarely a good adapter, an ensemble "
        "is safe"
    ]
