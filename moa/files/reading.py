"""Reads adapter folders: all of it is checked before any of it is used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moa.config import MoAConfig
from moa.errors import AdapterError
from moa.files.hub import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from moa.files.origin import Origin, origin_from

FORMAT_VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
"""What an adapter's tensors may be; whole numbers are counters of routers."""
_KINDS = {str: "a text", list: "a list", dict: "a JSON object"}


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
        origin: the run it comes from; None if unknown.
        head: how the classifier began, if not at random.
    """

    base_model: str
    base_sha256: str
    moa: MoAConfig
    classes: tuple[str, ...]
    data_config: Mapping[str, Any]
    results: Mapping[str, float] = field(default_factory=dict)
    origin: Origin | None = None
    head: Mapping[str, Any] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads an adapter without a model, from a folder or from `hf-hub:organisation/name`.

    Raises:
        MissingAdapterError: there is nothing at that place.
        AdapterError: a file is missing or damaged, of another format version, or not finite.
    """
    folder = adapter_folder(folder)
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
    _check_format(folder, config)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise AdapterError(f"{folder}: {name} is {tensor.dtype}; legal are {legal}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} holds NaN or infinity; take another copy")
    return _info(folder, config), tensors


def _check_format(folder: Path, config: dict[str, Any]) -> None:
    kind, version = config.get("peft_type"), config.get("format_version")
    if kind == "MOA" and version == FORMAT_VERSION:
        return
    remedy = "give a folder that moa.save_adapter or a run of this release wrote"
    if kind == "LORA":
        remedy = "read it with moa.import_peft"
    elif kind == "MOA" and isinstance(version, int) and version > FORMAT_VERSION:
        remedy = "install the newer release that wrote it"
    raise AdapterError(
        f"{folder}: peft_type {kind!r}, format_version {version!r}; this release reads 'MOA', "
        f"{FORMAT_VERSION}; {remedy}"
    )


def _info(folder: Path, config: dict[str, Any]) -> AdapterInfo:
    try:
        settings = config["moa_config"]
        unknown = set(settings) - {f.name for f in fields(MoAConfig)}
        if unknown:
            raise ValueError(f"unknown moa_config fields {sorted(unknown)}")
        moa = MoAConfig(**settings)
        moa.check()
        _check_kinds(config)
        return AdapterInfo(
            base_model=config["base_model_name_or_path"],
            base_sha256=str(config["base_sha256"]),
            moa=moa,
            classes=tuple(config["classes"]),
            data_config=config["data_config"],
            results=config.get("results", {}),
            origin=None if config.get("origin") is None else origin_from(config["origin"]),
            head=config.get("head", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {CONFIG_FILE} is not legal: {error}") from error


def _check_kinds(config: dict[str, Any]) -> None:
    """Raises `ValueError` for a field that is of another kind than `write_adapter` gives it."""
    kinds: dict[str, Any] = {"base_model_name_or_path": str, "base_sha256": str, "classes": list}
    for name, kind in (kinds | dict.fromkeys(("data_config", "results", "head"), dict)).items():
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{name}: {config[name]!r}; must be {_KINDS[kind]}")
    names = config["classes"]
    if {type(name) for name in names} != {str}:
        raise ValueError(f"classes: {names!r}; must be one or more names")
