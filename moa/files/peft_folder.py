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
from moa.errors import AdapterError, MoAConfigError
from moa.files.saving import CONFIG_FILE, WEIGHTS_FILE, _check_fit, _outline, replaced_adapter
from moa.layers.experts import LoRAExpert
from moa.layers.layer import MoALinear
from moa.model.injection import InjectReport, check_fresh, classifier, inject, matching_layers
from moa.model.merging import fixed_layers, lora_factors

PREFIX = "base_model.model."  # of every tensor name

_PLACE = re.compile(r"(?:.*\.)?blocks\.(\d+)\.(.+)")
_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")

# Settings that are read, and settings without an effect on what a trained adapter computes. All
# others must be off, so that an extension of LoRA by a later PEFT is refused rather than ignored.
_KNOWN = """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
    layers_to_transform layers_pattern modules_to_save init_lora_weights
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    lora_dropout megatron_core runtime_config eva_config qalora_group_size ensure_weight_tying
""".split()
_REMEDIES = {
    "bias": "biases of the base stay frozen; train it with bias='none'",
    "use_dora": "DoRA also rescales the base weights; train it with use_dora=False",
    "fan_in_fan_out": "no layer here has transposed weights; train it with fan_in_fan_out=False",
    "lora_bias": "the LoRA layers here have no bias; train it with lora_bias=False",
}
# Values of `init_lora_weights` that leave the base weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def export_peft(model: nn.Module, folder: str | Path, base_model_name: str) -> None:
    """Writes the LoRA adapter and the classifier of `model` as a PEFT folder.

    `peft.PeftModel.from_pretrained(base, folder)` then computes the same as `model` does in
    evaluation, with `base` the same timm model, made with the same number of classes. A mixture
    with fixed weights becomes one LoRA of rank R, its weights multiplied into `lora_B`.

    Args:
        model: an injected model with `lora`, or LoRA experts mixed by `router = uniform`.
        folder: destination; an older adapter there is replaced.
        base_model_name: timm name of the base, such as vit_base_patch16_clip_224.openai.

    Raises:
        MoAConfigError: the model has no adapters, or ones that PEFT's LoRA cannot express.
        FileExistsError: `folder` is neither new, nor empty, nor an older adapter.
    """
    layers = fixed_layers(model, "exported")
    for path, layer in layers.items():
        _check_exportable(path, layer, model.get_submodule(path.rpartition(".")[0]))
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        # Mixed experts as wide as the weights of a forward; a single one is written as it is.
        dtype = layer.base.weight.dtype
        dtype = torch.promote_types(dtype, torch.float32) if layer.config.mixes else dtype
        for name, factor in zip(_factor_names(path), lora_factors(layer), strict=True):
            tensors[name] = factor.to(dtype)
    rank, head = next(iter(tensors.values())).shape[0], _head_path(model)
    for name, tensor in classifier(model).state_dict().items():
        tensors[f"{PREFIX}{head}.{name}"] = tensor.cpu().contiguous()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # One expression for whole paths: the entries of a list would also match as suffixes.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "modules_to_save": [head],
    }
    with replaced_adapter(folder) as temporary:
        (temporary / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _check_exportable(path: str, layer: MoALinear, parent: nn.Module) -> None:
    keep = "keep the adapter as it is: moa.save_adapter writes a small file"
    if layer.config.kronecker:
        raise MoAConfigError(
            f"moa.method: {layer.config.method!r} has Kronecker adapters at {path}, for which "
            f"PEFT's LoRA has no form; legal are lora and multi_lora; {keep}"
        )
    if path.endswith("qkv") and getattr(parent, "q_bias", None) is not None:
        raise MoAConfigError(
            f"{path}: a fresh {type(parent).__name__} of timm reads the weight of qkv without "
            f"calling the layer, so that PEFT's LoRA there would have no effect; {keep}"
        )


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
    try:
        _check_settings(settings)
        head = _saved_head(model, settings)
        layers = _layers(model, settings, tensors)
        config, scales = _config(model, settings, layers)
        first, _ = next(classifier(model).named_parameters())
        outline, saved = _outline(model), tensors.get(f"{PREFIX}{head}.{first}")
        _prepare(outline, config, saved)
    except (TypeError, ValueError, ArithmeticError, re.error) as error:
        raise AdapterError(f"{folder}: cannot be imported: {error}") from error
    _check_fit(str(folder), _places(outline, layers, head), tensors)
    report = _prepare(model, config, saved)
    with torch.no_grad():
        for name, place in _places(model, layers, head).items():
            place.copy_(tensors[name].double() * scales.get(name, 1.0))
    return report


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        settings = dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: no readable adapter ({error}); give a whole folder as PEFT's "
            "save_pretrained writes it, with safe_serialization=True"
        ) from error
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.double()).all()):
            raise AdapterError(f"{folder}: {name} holds NaN, infinity or whole numbers")
    return settings, tensors


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses what is not a plain LoRA."""
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"peft_type: {kind!r}; legal is 'LORA' (moa.load_adapter reads 'MOA')")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights: {start!r} changes the base weights; save it from PEFT with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for name in sorted(n for n, v in settings.items() if v and v != "none" and n not in _KNOWN):
        why = _REMEDIES.get(name, "not part of plain LoRA, which is all that `lora` can be")
        raise ValueError(f"{name}: {settings[name]!r}; {why}")


def _saved_head(model: nn.Module, settings: Mapping[str, Any]) -> str | None:
    """The classifier's path if the folder holds one."""
    saved, head = settings.get("modules_to_save") or [], _head_path(model)
    if saved not in ([], [head]):
        raise ValueError(
            f"modules_to_save: {saved}; legal is the classifier alone, [{head!r}], since all else "
            "of the base stays frozen; train without them"
        )
    return head if saved else None


def _head_path(model: nn.Module) -> str:
    head = classifier(model)
    return str(next(path for path, module in model.named_modules() if module is head))


def _layers(
    model: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Paths of the adapted layers, in the model's order: by the settings and the tensors alike."""
    check_fresh(model)
    kinds = {path: type(module).__name__ for path, module in model.named_modules() if path}
    stored = {match[1] for match in map(_FACTOR.fullmatch, tensors) if match}
    targeted = {path for path in kinds if _targeted(settings, path)}
    usable = matching_layers(model, MoAConfig(method="lora", targets=("*",), blocks="all"))
    for path in sorted((stored | targeted) - set(usable)):
        what = f"a {kinds[path]}" if path in kinds else "not in the model"
        raise ValueError(
            f"target_modules: it adapts {path}, which is {what}; legal are the linear layers "
            r"inside `blocks.N`; name whole paths in training, as in 'blocks\.\d+\.attn\.qkv'"
        )
    if differ := sorted(stored ^ targeted):
        has = "are no tensors" if differ[0] in targeted else "are tensors, but no target_modules"
        raise ValueError(f"for {differ[0]} there {has}; take another copy")
    if not stored:
        raise ValueError(f"target_modules: {settings.get('target_modules')!r} matches no layer")
    return [path for path in usable if path in stored]


def _targeted(settings: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT adapts the module at `path` by these settings."""
    targets, blocks = settings.get("target_modules") or [], settings.get("layers_to_transform")
    saved, excluded = settings.get("modules_to_save") or [], settings.get("exclude_modules") or []
    if _named(excluded, path) or any(re.match(rf"(.*\.)?{m}(\.|$)", path) for m in saved):
        return False
    if isinstance(targets, str) or blocks in (None, []) or path in targets:
        return _named(targets, path)
    named = settings.get("layers_pattern") or []
    named = [rf"(?:.*?\.)?{n}" for n in ([named] if isinstance(named, str) else named)]
    found = [m for n in named or [r".*?\.[^.]*"] if (m := re.match(rf"{n}\.(\d+)\.", path))]
    numbers = blocks if isinstance(blocks, list) else [blocks]
    return bool(found) and int(found[0][1]) in numbers and _named(targets, path)


def _named(names: str | list[str], path: str) -> bool:
    """Whether an expression matches the whole path, or an entry of a list is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _config(
    model: nn.Module, settings: Mapping[str, Any], layers: list[str]
) -> tuple[MoAConfig, dict[str, float]]:
    """The `lora` configuration of just these layers, and the factor of each `lora_B` by name."""
    ranks: dict[int, list[str]] = {}
    scales = {}
    for path in layers:
        rank = _number(settings, "r", "rank_pattern", path)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r: {rank} at {path}; legal is a whole number >= 1")
        alpha = _number(settings, "lora_alpha", "alpha_pattern", path)
        ranks.setdefault(rank, []).append(path)
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        scales[_factor_names(path)[1]] = alpha / divisor
    if len(ranks) > 1:
        named = "; ".join(f"{rank} at {', '.join(paths)}" for rank, paths in ranks.items())
        raise ValueError(f"rank_pattern: gives several ranks ({named}); legal is one for all")
    places = [match for path in layers if (match := _PLACE.fullmatch(path))]
    targets = tuple(dict.fromkeys(place[2] for place in places))
    blocks = tuple(dict.fromkeys(int(place[1]) for place in places))
    config = MoAConfig(method="lora", ranks=tuple(ranks), targets=targets, blocks=blocks)
    if absent := [path for path in matching_layers(model, config) if path not in layers]:
        raise ValueError(
            f"target_modules: not alike in all adapted blocks, {', '.join(absent)} would be "
            "missing; legal are the same layers in each of them"
        )
    return config, scales


def _number(settings: Mapping[str, Any], name: str, patterns: str, path: str) -> int | float:
    """A layer's own value of a setting: by the first pattern that matches the end of its path."""
    own = dict(settings.get(patterns) or {})
    value = next((own[p] for p in own if re.match(rf"(.*\.)?({p})$", path)), settings.get(name))
    if not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"{name}: {value!r} at {path}; legal is a finite number")
    return value


def _prepare(model: nn.Module, config: MoAConfig, saved: Tensor | None) -> InjectReport:
    """Injects; before that fits the classifier to a saved tensor of it, if there is one."""
    own = next(classifier(model).parameters())
    if saved is not None and saved.dim() == own.dim() and own.shape[0] != saved.shape[0] > 0:
        model.reset_classifier(saved.shape[0])  # type: ignore[operator]
        classifier(model).to(device=own.device, dtype=own.dtype)
    return inject(model, config)


def _factor_names(path: str) -> tuple[str, str]:
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _places(model: nn.Module, layers: list[str], head: str | None) -> dict[str, Tensor]:
    """Where each tensor of a folder belongs in the injected model, by the name it has there."""
    places: dict[str, Tensor] = {}
    for path in layers:
        expert = model.get_submodule(f"{path}.experts.0")
        assert isinstance(expert, LoRAExpert)
        places |= zip(_factor_names(path), (expert.down, expert.up), strict=True)
    if head is not None:
        own = classifier(model).state_dict()
        places |= {f"{PREFIX}{head}.{name}": tensor for name, tensor in own.items()}
    return places
