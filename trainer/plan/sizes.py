"""The numbers of a model by what they are for, and the bytes of the files that hold them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moa.layers.layer import MoALinear
from moa.model.injection import classifier
from trainer.config.averages import AverageConfig

_PARTS = (
    ("experts", ".experts."),
    ("experts", ".shared_expert."),
    ("routers", ".router."),
    ("rule", ".kron_rule."),
)
"""Role of an adapter's tensor -> what its name holds."""

TEXT_BYTES, TEXT_BYTES_PER_CLASS = 8192, 64
"""Allowance for a checkpoint's configuration, state, manifest and model card."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The numbers of a model as memory sees them."""

    trainable: int
    frozen: int
    """Those that do not train, buffers that follow the precision included."""
    buffer_bytes: int
    """Of whole-number buffers."""


def roles(model: nn.Module) -> dict[str, int]:
    """Trainable numbers of an injected model by what they are for; roles without any are left out.

    `added biases` are the layers' own beside Kronecker experts, `backbone` what `full`, `bias` and
    `attention` train.
    """
    head = {id(p) for p in classifier(model).parameters()}
    biases = {id(m.bias) for m in model.modules() if isinstance(m, MoALinear)}
    counts = dict.fromkeys(("experts", "routers", "rule", "added biases", "backbone", "head"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if id(parameter) in head:
                role = "head"
            elif id(parameter) in biases:
                role = "added biases"
            else:
                role = next((r for r, part in _PARTS if part in f".{name}"), "backbone")
            counts[role] += parameter.numel()
    return {role: count for role, count in counts.items() if count}


def weights_of(model: nn.Module) -> Weights:
    """The numbers of a model, whatever they are for."""
    tensors = [*model.parameters(), *model.buffers()]
    trainable = sum(t.numel() for t in tensors if t.requires_grad)
    floating = sum(t.numel() for t in tensors if t.is_floating_point())
    others = sum(t.untyped_storage().nbytes() for t in tensors if not t.is_floating_point())
    return Weights(trainable=trainable, frozen=floating - trainable, buffer_bytes=others)


def adapter_file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `moa.save_adapter` makes of fp32 masters of these tensors."""
    return _safetensors_bytes(tensors, {"__metadata__": {"format": "pt"}})


def checkpoint_bytes(
    tensors: Mapping[str, Tensor], moved: Sequence[str], classes: int, averages: AverageConfig
) -> int:
    """Most bytes of a checkpoint, its small text files by an allowance.

    The `tensors` are what the adapter file, the best adapter and each average hold; the optimizer
    moves those `moved`. Two of the text files list the classes.
    """
    moments = {f"{name}|{m}": tensors[name] for name in moved for m in ("exp_avg", "exp_avg_sq")}
    files = [moments, tensors]
    if parts := _average_parts(averages):
        files.append({f"{part}|{name}": t for part in parts for name, t in tensors.items()})
    text = TEXT_BYTES + classes * TEXT_BYTES_PER_CLASS
    return adapter_file_bytes(tensors) + sum(_safetensors_bytes(f, {}) for f in files) + text


def _average_parts(averages: AverageConfig) -> list[str]:
    """Names of the averages' parts in a checkpoint; of SWAD's as many as there can be."""
    waiting = (f"swad.waiting{number}" for number in range(averages.swad_copies - 2))
    swad = ["swad.kept", "swad.open", *waiting] if averages.swad else []
    return [*(name for name in averages.names if name != "swad"), *swad]


def _safetensors_bytes(tensors: Mapping[str, Tensor], header: dict[str, Any]) -> int:
    """Eight bytes of length, a JSON header padded to a multiple of eight, the data."""
    end, entries = 0, dict(header)
    # Wider numbers come first, then names: the offsets' digits depend on the order.
    for name in sorted(tensors, key=lambda n: (tensors[n].is_floating_point(), n)):
        tensor = tensors[name]
        kind, size = ("F32", 4) if tensor.is_floating_point() else ("I64", 8)
        start, end = end, end + tensor.numel() * size
        entries[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"))
    return 8 + math.ceil(len(text) / 8) * 8 + end
