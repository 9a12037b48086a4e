"""Reads adapter folders: all of it is checked before any of it is used."""

import hashlib
import json
import logging
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moa.config import MoAConfig
from moa.errors import AdapterError, one_line
from moa.files.hub import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from moa.files.origin import Origin, origin_from
from moa.layers.head import check_settings

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MOST_CONFIG = 2**26
"""Bytes that a configuration may have; that of 100,000 classes has a tenth of it."""
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
        data_config: `input_size`, `mean`, `std`, `interpolation` of its images.
        results: figures for the model card.
        origin: the run it comes from; None if unknown.
        head: how the classifier began, if not at random, and its kind, if not linear.
        model_args: what timm was told of the base beside its name: `img_size`, `patch_size`,
            `dynamic_img_size`.
    """

    base_model: str
    base_sha256: str
    moa: MoAConfig
    classes: tuple[str, ...]
    data_config: Mapping[str, Any]
    results: Mapping[str, float] = field(default_factory=dict)
    origin: Origin | None = None
    head: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads an adapter without a model, from a folder or from `hf-hub:organisation/name`.

    Raises:
        MissingAdapterError: there is nothing at that place.
        AdapterError: a file is missing or damaged, of another format version, or not finite.
    """
    folder = adapter_folder(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():  # to open a FIFO would be to wait for ever
            raise AdapterError(f"{folder}: no {name}; give the folder of a saved adapter")
    try:
        config, tensors = read_files(folder)
        _check_format(folder, config)
        _check_hashes(folder, config)
    except (ValueError, SafetensorError) as error:
        why = one_line(error)
        raise AdapterError(f"{folder}: damaged adapter ({why}); take another copy") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise AdapterError(f"{folder}: {name} is {tensor.dtype}; legal are {legal}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{folder}: {name} holds NaN or infinity; take another copy")
    info = _info(folder, config)
    if len(info.moa.ranks or ()) > len(tensors):  # before as many experts are made of it
        raise AdapterError(f"{folder}: more moa_config ranks than tensors; take another copy")
    return info, tensors


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder, ours or PEFT's, as they stand there.

    Raises `ValueError` or `SafetensorError`: damaged, or no regular files of a sensible size.
    """
    path = folder / CONFIG_FILE
    for each in (path, folder / WEIGHTS_FILE):
        if each.exists() and not each.is_file():
            raise ValueError(f"{each.name} is no regular file")
    if path.stat().st_size > MOST_CONFIG:
        raise ValueError(f"{CONFIG_FILE} has more than {MOST_CONFIG:,} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, ensure_ascii=False).encode()  # half a character could not be written
    except RecursionError:
        raise ValueError(f"{CONFIG_FILE} is nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds no JSON object")
    return config, load_file(folder / WEIGHTS_FILE)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a configuration says, however it is laid out, without its own `sha256`."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_hashes(folder: Path, config: dict[str, Any]) -> None:
    """Raises `ValueError` if a file is not as it was written; older releases noted no hashes."""
    if (noted := config.get("sha256")) is None:
        log.warning("%s: of an older release, without SHA-256 to check it by", folder)
        return
    with (folder / WEIGHTS_FILE).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    for name, actual in ((WEIGHTS_FILE, weights), (CONFIG_FILE, config_hash(config))):
        if not (isinstance(noted, dict) and noted.get(name) == actual):
            raise ValueError(f"{name} is not as it was written: its SHA-256 is another")


def _check_format(folder: Path, config: dict[str, Any]) -> None:
    kind, version = config.get("peft_type"), config.get("format_version")
    if kind == "MOA" and version == FORMAT_VERSION:
        return
    given = f"peft_type {reprlib.repr(kind)}, format_version {reprlib.repr(version)}"
    remedy = "give a folder that moa.save_adapter or a run of this release wrote"
    if kind == "LORA":
        remedy = "read it with moa.import_peft"
    elif kind == "MOA" and isinstance(version, int) and version > FORMAT_VERSION:
        remedy = "install the newer release that wrote it"
    raise AdapterError(f"{folder}: {given}; this release reads 'MOA', {FORMAT_VERSION}; {remedy}")


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
            model_args=config.get("model_args", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {CONFIG_FILE} is not legal: {one_line(error)}") from error


def _check_kinds(config: dict[str, Any]) -> None:
    """Raises `ValueError` for a field that is of another kind than `write_adapter` gives it."""
    kinds: dict[str, Any] = {"base_model_name_or_path": str, "base_sha256": str, "classes": list}
    for name, kind in (kinds | dict.fromkeys(_OBJECTS, dict)).items():
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{name}: {reprlib.repr(config[name])}; must be {_KINDS[kind]}")
    check_settings(config.get("head", {}))
    for name, value in config.get("model_args", {}).items():
        if not _MODEL_ARGS.get(name, lambda _: False)(value):
            raise ValueError(f"model_args: {reprlib.repr(name)} {reprlib.repr(value)} is not legal")
    names = config["classes"]
    if {type(name) for name in names} != {str}:
        raise ValueError(f"classes: {reprlib.repr(names)}; must be one or more names")
    for name, value in config.get("results", {}).items():
        if not (isinstance(value, float) or _is_finite(value)):
            raise ValueError(f"results: {name} {reprlib.repr(value)}; must be a number")
    for name, value in config["data_config"].items():
        if name in _OF_IMAGES and not _OF_IMAGES[name](value):
            raise ValueError(f"data_config: {name} {reprlib.repr(value)} fits no image")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_three(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(fits, value))


_OBJECTS = ("data_config", "results", "head", "model_args")
_MODEL_ARGS: dict[str, Callable[[Any], bool]] = {
    "img_size": lambda n: type(n) is int and 0 < n <= 2**14,
    "patch_size": lambda n: type(n) is int and 0 < n <= 2**14,
    "dynamic_img_size": lambda told: told is True,
}
_OF_IMAGES: dict[str, Callable[[Any], bool]] = {
    "input_size": partial(_is_three, fits=lambda n: type(n) is int and 0 < n <= 2**14),
    "mean": partial(_is_three, fits=_is_finite),
    "std": partial(_is_three, fits=lambda x: _is_finite(x) and x > 0),
    "interpolation": lambda name: isinstance(name, str),
}
