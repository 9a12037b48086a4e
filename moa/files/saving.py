"""Adapter folders: what was trained, and nothing else, saved and loaded strictly.

A folder holds `adapter_config.json`, `adapter_model.safetensors` and a model card `README.md`; the
first has a SHA-256 of itself and of the second.
Tensor names are the timm module path plus the names inside `MoALinear`, with global expert ids, so
a file does not depend on the world size or the engine that trained it.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.errors import AdapterError, MoAConfigError, one_line
from moa.files.atomic_folder import replaced_folder
from moa.files.card import creation, model_card, registration
from moa.files.hub import (
    CARD_FILE as CARD_FILE,
    CONFIG_FILE as CONFIG_FILE,
    WEIGHTS_FILE as WEIGHTS_FILE,
)
from moa.files.reading import FORMAT_VERSION, AdapterInfo, config_hash, read_adapter
from moa.model.heads import fit_head, head_buffers, head_settings
from moa.model.injection import InjectReport, check_fresh, classifier, inject


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of `model` that its base lacks, by name, in its own dtype and place.

    These are the trainable parameters, with `balance = bias` the routers' `balance_steps`, and what
    a cosine head keeps as it is. The tensors share the model's memory.
    """
    moved = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    moved |= {n: b for n, b in model.named_buffers() if n.endswith(".router.balance_steps")}
    return moved | head_buffers(model)


def base_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all tensors of a fresh model but its classifier."""
    head = {id(t) for t in classifier(model).state_dict(keep_vars=True).values()}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in head:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Writes the three files of an adapter into an existing folder."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Not save_file: it makes files that only their owner may read, whatever the umask.
    weights = save(contiguous, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).write_bytes(weights)
    config: dict[str, Any] = {
        "peft_type": "MOA",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": info.base_model,
        "base_sha256": info.base_sha256,
        "moa_config": asdict(info.moa.resolved()),
        "classes": list(info.classes),
        "data_config": dict(info.data_config),
        "results": dict(info.results),
        "origin": None if info.origin is None else info.origin.plain(),
        "head": dict(info.head),
        "model_args": dict(info.model_args),
    }
    config["sha256"] = {
        WEIGHTS_FILE: hashlib.sha256(weights).hexdigest(),
        CONFIG_FILE: config_hash(json.loads(json.dumps(config))),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(info), encoding="utf-8")


def check_replaceable(folder: str | Path) -> None:
    """Raises `FileExistsError` if `folder` is there, and is neither empty nor an adapter's."""
    folder = Path(folder)
    if not folder.exists() or (folder / CONFIG_FILE).exists():
        return
    held = next(folder.iterdir(), None) if folder.is_dir() else folder
    if held is not None:
        raise FileExistsError(
            f"{folder} is no adapter and would be replaced with all that it holds ({held.name}); "
            "give a new or empty folder, or that of an older adapter"
        )


@contextmanager
def replaced_adapter(folder: str | Path) -> Iterator[Path]:
    """Like `replaced_folder`, after `check_replaceable`."""
    check_replaceable(folder)
    with replaced_folder(Path(folder)) as temporary:
        yield temporary


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the trainable tensors of `model` as an adapter folder, replacing an older one.

    `tensors` are values to write instead of the model's, such as an optimizer's fp32 masters.

    Raises `FileExistsError`: `folder` is neither new, nor empty, nor an older adapter.
    """
    info = replace(info, head={**info.head, **head_settings(model)})
    with replaced_adapter(folder) as temporary:
        write_adapter(temporary, adapter_state_dict(model) if tensors is None else tensors, info)


def load_adapter(model: nn.Module, folder: str | Path) -> AdapterInfo:
    """Injects and loads a saved adapter into a fresh base model, which keeps its dtype and device.

    The classifier is replaced if its number of classes or its kind differs. Everything is checked
    first, so a refused adapter leaves the model as it was. The base is known by the bits of its
    weights, so one converted to bf16 is another base: load in fp32, as the trainer does, and
    convert afterwards.

    Args:
        model: the timm model that the adapter was trained on, as `timm.create_model` gives it.
        folder: an adapter folder, or `hf-hub:organisation/name[@revision]`.

    Raises:
        MissingAdapterError: there is nothing at that place.
        AdapterError: damaged folder, another base, or names or shapes that do not fit exactly.
    """
    info, tensors = read_adapter(folder)
    try:
        check_fresh(model)  # else its weights would seem to be those of another base
    except MoAConfigError as error:
        raise AdapterError(f"{folder}: {error}") from error
    dtype = next(model.parameters()).dtype
    check_base(str(folder), info, base_hash(model), dtype)
    attach(model, info, tensors, str(folder))
    return info


def check_base(name: str, info: AdapterInfo, actual: str, dtype: torch.dtype) -> None:
    """Raises `AdapterError` unless the base weights' hash is what the adapter `name` expects."""
    if actual == info.base_sha256:
        return
    remedy = f"create it with: {'; '.join([*registration(info.base_model), *creation(info)])}"
    if dtype != torch.float32:  # whatever was rounded has another hash
        remedy = f"they are in {dtype}: load the adapter in fp32, then convert; {remedy}"
    raise AdapterError(
        f"{name}: trained on {info.base_model} with base weights {info.base_sha256[:12]}, "
        f"the given model's are {actual[:12]}; {remedy}"
    )


def attach(
    model: nn.Module, info: AdapterInfo, tensors: Mapping[str, Tensor], name: str = "adapter"
) -> None:
    """Injects what `info` says into a fresh model and gives its trainables the values `tensors`.

    Raises `AdapterError`: names or shapes do not fit exactly; the model is as it was.
    """
    empty = outline(model)
    try:
        fit_and_inject(empty, info.moa, len(info.classes), info.head)
    except MoAConfigError as error:
        why = one_line(error)
        raise AdapterError(f"{name}: its moa_config does not fit the model: {why}") from error
    check_fit(name, adapter_state_dict(empty), tensors)
    fit_and_inject(model, info.moa, len(info.classes), info.head)
    for key, place in adapter_state_dict(model).items():
        place.copy_(tensors[key])


def outline(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; no tensor is copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def fit_and_inject(
    model: nn.Module,
    config: MoAConfig,
    num_classes: int | None,
    head: Mapping[str, Any] = MappingProxyType({}),
) -> InjectReport:
    """Injects; before that gives the model the classifier as `fit_head` does."""
    fit_head(model, num_classes, head)
    return inject(model, config)


def check_fit(folder: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises `AdapterError` unless names, shapes and kinds of tensors are alike."""
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in wanted]
    for name in (name for name in wanted if name in given):
        theirs, ours = given[name], wanted[name]
        if theirs.shape != ours.shape:
            problems.append(f"{name} is {tuple(theirs.shape)}, the model has {tuple(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            problems.append(f"{name} is {theirs.dtype}, the model has {ours.dtype}")
        elif not torch.isfinite(theirs.to(ours.dtype)).all():
            problems.append(f"{name} does not fit into {ours.dtype}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterError(
            f"{folder}: does not fit the model: {'; '.join(problems[:4])}{more}; give the model "
            f"and the {WEIGHTS_FILE} that belong to its {CONFIG_FILE}, or another copy of it"
        )
