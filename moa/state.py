"""Adapter folders: what was trained, and nothing else, saved and loaded strictly.

A folder holds `adapter_config.json`, `adapter_model.safetensors` and a model card `README.md`.
Tensor names are the timm module path plus the names inside `MoALinear`, with global expert ids, so
a file does not depend on the world size or the engine that trained it.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.errors import AdapterError
from moa.injection import classifier, inject

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
)


@dataclass(frozen=True)
class AdapterInfo:
    """Everything about an adapter that is not a tensor.

    Attributes:
        base_model: timm name `architecture.tag` of the frozen base.
        base_sha256: `base_hash` of that base before injection.
        moa: the adapter's configuration.
        classes: class names in label order.
        data_config: the base's `input_size`, `mean`, `std`, `interpolation`.
        results: figures for the model card.
    """

    base_model: str
    base_sha256: str
    moa: MoAConfig
    classes: tuple[str, ...]
    data_config: Mapping[str, Any]
    results: Mapping[str, float] = field(default_factory=dict)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of `model` that training moves, by name, in its own dtype and place.

    These are the trainable parameters and, with `balance = bias`, the routers' `balance_steps`.
    The tensors share the model's memory.
    """
    moved = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return moved | {n: b for n, b in model.named_buffers() if n.endswith(".router.balance_steps")}


def base_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all tensors of a fresh model but its classifier."""
    head = {id(t) for t in classifier(model).state_dict(keep_vars=True).values()}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in head:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which takes the place of `folder` when all went well.

    Files are synced before the rename, and the rename before this returns, so `folder` is at no
    time half written. An error leaves it as it was, and nothing beside it. A kill may leave the new
    one half written or the old one aside; `recover_folder` cleans up.
    """
    recover_folder(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finishes or undoes a `replaced_folder` that was killed."""
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for rest in (old, temporary):
        shutil.rmtree(rest, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Writes the three files of an adapter into an existing folder."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Not save_file: it makes files that only their owner may read, whatever the umask.
    (folder / WEIGHTS_FILE).write_bytes(save(contiguous, metadata={"format": "pt"}))
    config = {
        "peft_type": "MOA",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": info.base_model,
        "base_sha256": info.base_sha256,
        "moa_config": asdict(info.moa.resolved()),
        "classes": list(info.classes),
        "data_config": dict(info.data_config),
        "results": dict(info.results),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(info), encoding="utf-8")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the trainable tensors of `model` as an adapter folder, replacing an older one.

    Args:
        model: the injected model.
        folder: destination.
        info: what the tensors belong to.
        tensors: values to write instead of the model's, such as an optimizer's fp32 masters.
    """
    with replaced_folder(Path(folder)) as temporary:
        write_adapter(temporary, adapter_state_dict(model) if tensors is None else tensors, info)


def read_adapter(folder: str | Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads an adapter folder without a model.

    Raises:
        AdapterError: a file is missing or damaged, of another format version, or not finite.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder}: no {name}; give the folder of a saved adapter")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise AdapterError(f"{folder}: damaged adapter ({error}); take another copy") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder}: {CONFIG_FILE} holds no JSON object; take another copy")
    if config.get("peft_type") != "MOA" or config.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{folder}: peft_type {config.get('peft_type')!r}, format_version "
            f"{config.get('format_version')!r}; this release reads 'MOA', {FORMAT_VERSION}"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} holds NaN or infinity; take another copy")
    return _info(folder, config), tensors


def _info(folder: Path, config: dict[str, Any]) -> AdapterInfo:
    try:
        settings = config["moa_config"]
        unknown = set(settings) - {f.name for f in fields(MoAConfig)}
        if unknown:
            raise ValueError(f"unknown moa_config fields {sorted(unknown)}")
        moa = MoAConfig(**settings)
        moa.check()
        return AdapterInfo(
            base_model=config["base_model_name_or_path"],
            base_sha256=str(config["base_sha256"]),
            moa=moa,
            classes=tuple(config["classes"]),
            data_config=config["data_config"],
            results=config.get("results", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {CONFIG_FILE} is not legal: {error}") from error


def load_adapter(model: nn.Module, folder: str | Path) -> AdapterInfo:
    """Injects and loads a saved adapter into a fresh base model, which keeps its dtype and device.

    The classifier is replaced if its number of classes differs. Everything is checked first, so a
    refused adapter leaves the model as it was.

    Raises:
        AdapterError: damaged folder, another base, or names or shapes that do not fit exactly.
    """
    info, tensors = read_adapter(folder)
    actual = base_hash(model)
    if actual != info.base_sha256:
        raise AdapterError(
            f"{folder}: trained on {info.base_model} with base weights {info.base_sha256[:12]}, "
            f"the given model's are {actual[:12]}; create it with "
            f"timm.create_model({info.base_model!r}, pretrained=True)"
        )
    outline = _outline(model)
    _prepare(outline, info)
    _check_fit(str(folder), adapter_state_dict(outline), tensors)
    _prepare(model, info)
    for name, place in adapter_state_dict(model).items():
        place.copy_(tensors[name])
    return info


def _outline(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; no tensor is copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def _prepare(model: nn.Module, info: AdapterInfo) -> None:
    head = next(classifier(model).parameters())
    if head.shape[0] != len(info.classes):
        model.reset_classifier(len(info.classes))  # type: ignore[operator]
        classifier(model).to(device=head.device, dtype=head.dtype)
    inject(model, info.moa)


def _check_fit(folder: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in wanted]
    problems += [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterError(f"{folder}: does not fit the model: {'; '.join(problems[:4])}{more}")


def model_card(info: AdapterInfo) -> str:
    """Markdown card of an adapter, with the front matter that model hubs read."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in info.results.items())
    return f"""---
library_name: moa-trainer
base_model: timm/{info.base_model}
tags: [domain-generalization, mixture-of-adapters]
---
# {info.moa.method} adapter for {info.base_model}

{len(info.classes)} classes; ranks {list(info.moa.resolved().ranks or ())}. Base weights (SHA-256)
`{info.base_sha256}`.

```python
import moa, timm

model = timm.create_model("{info.base_model}", pretrained=True, num_classes={len(info.classes)})
moa.load_adapter(model, "path/to/this/folder")
```

| result | value |
|---|---|
{rows}
"""
