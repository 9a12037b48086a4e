"""LoRA adapters in the files of Hugging Face PEFT: `export_peft` writes them, `import_peft` reads.

PEFT computes `scale * lora_B lora_A x` with scale alpha / r, or alpha / sqrt(r) with rsLoRA; here a
LoRA expert is `up down x`. Only its files are used, not the library.

Letters: D in, O out, R sum of the ranks.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.errors import AdapterError, MoAConfigError, NoMatchingModuleError
from moa.injection import InjectReport, classifier, inject, matching_layers
from moa.layer import MoALinear, moa_layers
from moa.merging import layer_gates
from moa.state import CONFIG_FILE, WEIGHTS_FILE, _check_fit, _outline, replaced_folder

PREFIX = "base_model.model."
"""Put by PEFT before the module path in every tensor name."""

_PLACE = re.compile(r"(?:.*\.)?blocks\.(\d+)\.(.+)")
_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")

# Settings that are read, and settings without an effect on what a trained adapter computes. All
# others must be off, so that an extension of LoRA by a later PEFT is refused rather than ignored.
_READ = "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules bias".split()
_READ += "exclude_modules layers_to_transform layers_pattern modules_to_save".split()
_IDLE = "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode".split()
_IDLE += "lora_dropout megatron_core runtime_config eva_config qalora_group_size".split()
_IDLE += "ensure_weight_tying init_lora_weights".split()

_REMEDIES = {
    "use_dora": "DoRA also rescales the base weights; train it with use_dora=False",
    "fan_in_fan_out": "it is for transposed weights, which no layer here has; train without it",
    "lora_bias": "the LoRA layers here have no bias; train with lora_bias=False",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are."""


def export_peft(model: nn.Module, folder: str | Path, base_model_name: str) -> None:
    """Writes the LoRA adapter and the classifier of `model` as a PEFT folder.

    `peft.PeftModel.from_pretrained(base, folder)` then computes the same as `model` does in
    evaluation, with `base` the same timm model, made with the same number of classes. A mixture
    with fixed weights becomes one LoRA of rank R, its weights multiplied into `lora_B`.

    Args:
        model: an injected model with `lora`, or LoRA experts mixed by `router = uniform`.
        folder: destination; an older one is replaced.
        base_model_name: timm name of the base, such as vit_base_patch16_clip_224.openai.

    Raises:
        MoAConfigError: the model has no adapters, or ones that PEFT's LoRA cannot express.
    """
    layers = dict(moa_layers(model))
    _check_exportable(model, layers)
    head = _head_path(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        factors = _export_factors(layer)
        tensors |= {name: t for name, t in zip(_factor_names(path), factors, strict=True)}
    for name, tensor in classifier(model).state_dict().items():
        tensors[f"{PREFIX}{head}.{name}"] = tensor
    rank = tensors[_factor_names(next(iter(layers)))[0]].shape[0]
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # One expression for whole paths: the entries of a list would also match as suffixes.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "modules_to_save": [head],
    }
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replaced_folder(Path(folder)) as temporary:
        (temporary / WEIGHTS_FILE).write_bytes(save(stored, metadata={"format": "pt"}))
        text = json.dumps(settings, indent=2) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")


def _check_exportable(model: nn.Module, layers: Mapping[str, MoALinear]) -> None:
    keep = "keep it as it is: moa.save_adapter writes a small file"
    if not layers:
        raise MoAConfigError(
            f"{type(model).__name__} has no adapters to export; inject lora and train it first"
        )
    for path, layer in layers.items():
        config, parent = layer.config, model.get_submodule(path.rpartition(".")[0])
        if config.kronecker or config.routed:
            why = "Kronecker adapters" if config.kronecker else "weights that depend on the token"
            raise MoAConfigError(
                f"moa.method: {config.method!r} with router {config.router!r} has {why}, for which "
                f"PEFT's LoRA has no form; legal are lora and multi_lora; {keep}"
            )
        if path.endswith("qkv") and getattr(parent, "q_bias", None) is not None:
            raise MoAConfigError(
                f"{path}: a fresh {type(parent).__name__} of timm reads the weight of qkv without "
                f"calling the layer, so that PEFT's LoRA there would have no effect; {keep}"
            )


def _export_factors(layer: MoALinear) -> tuple[Tensor, Tensor]:
    """lora_A [R, D] and lora_B [O, R] of scale one; those of a single expert are its own, exact."""
    experts = layer.all_experts()
    down = torch.cat([e.down for e in experts])  # type: ignore[arg-type]
    up = torch.cat([e.up for e in experts], dim=1)  # type: ignore[arg-type]
    if not layer.config.mixes:
        return down, up
    columns = torch.cat(
        [gate.expand(e.up.shape[1]) for gate, e in zip(layer_gates(layer), experts, strict=True)]  # type: ignore[arg-type]
    )
    wide = torch.promote_types(up.dtype, torch.float32)  # as wide as the gates of a forward
    return down.to(wide), (up.detach().cpu().double() * columns).to(wide)


def import_peft(model: nn.Module, folder: str | Path) -> InjectReport:
    """Injects `lora` into a fresh model and loads a LoRA folder that PEFT saved.

    The scale is multiplied into `up`, so the outputs are PEFT's; in further training a step of `up`
    then counts 1 / scale as much as one of `lora_B` did. A classifier in the folder is loaded, and
    the model's is resized for it; without one the model keeps its own. The files do not tell which
    base weights they were trained on: give the same. Everything is checked first, so a refused
    folder leaves the model as it was.

    Args:
        model: a timm vision transformer without adapters, which keeps its dtype and device.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: the folder is damaged, does not fit the model, or holds what `lora` is not.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    for path, _ in moa_layers(model):
        raise AdapterError(f"{path} already carries adapters: import into a fresh model")
    try:
        _check_settings(settings)
        head = _saved_head(model, settings)
        layers = _layers(model, settings, tensors)
        config, scales = _config(model, settings, layers), _scales(settings, layers)
    except (KeyError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise AdapterError(f"{folder}: {CONFIG_FILE} cannot be used: {error}") from error
    classes = _classes(model, head, tensors)
    outline = _outline(model)
    _prepare(outline, config, classes)
    _check_fit(str(folder), _places(outline, layers, head), tensors)
    report = _prepare(model, config, classes)
    with torch.no_grad():
        for name, place in _places(model, layers, head).items():
            factor = _FACTOR.fullmatch(name)
            scaled = factor is not None and name.endswith(".lora_B.weight")
            scale = scales[factor[1]] if factor is not None and scaled else 1.0
            place.copy_(tensors[name].double() * scale if scale != 1 else tensors[name])
    return report
