"""Bytes of the files that a run will write."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.config.averages import AverageConfig

TEXT_BYTES, TEXT_BYTES_PER_CLASS = 8192, 64
"""Allowance for a checkpoint's configuration, state, manifest and model card."""


def adapter_file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `moa.save_adapter` makes of fp32 masters of these tensors."""
    return _safetensors_bytes(tensors, {"__metadata__": {"format": "pt"}})


def checkpoint_bytes(
    tensors: Mapping[str, Tensor], moved: Sequence[str], classes: int, averages: AverageConfig
) -> int:
    """Most bytes of a checkpoint, its small text files by an allowance.

    Args:
        tensors: what the adapter file holds, and with it the best adapter and each average.
        moved: names among them that the optimizer moves.
        classes: number of classes, whose names two of the text files list.
        averages: which averages the run keeps.
    """
    moments = {f"{name}|{m}": tensors[name] for name in moved for m in ("exp_avg", "exp_avg_sq")}
    files = [moments, tensors]
    if parts := _average_parts(averages):
        files.append({f"{part}|{name}": t for part in parts for name, t in tensors.items()})
    text = TEXT_BYTES + classes * TEXT_BYTES_PER_CLASS
    return adapter_file_bytes(tensors) + sum(_safetensors_bytes(f, {}) for f in files) + text


def _average_parts(averages: AverageConfig) -> list[str]:
    """Names of the averages' parts in a checkpoint; of SWAD's as many as there can be."""
    parts = ["ema"] if averages.ema else []
    if averages.swad:
        waiting = (f"swad.waiting{number}" for number in range(averages.swad_copies - 2))
        parts += ["swad.kept", "swad.open", *waiting]
    return parts


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
