"""LoRA adapters in the files of Hugging Face PEFT: `export_peft` writes them, `import_peft` reads.

PEFT computes `scale * lora_B lora_A x`; here a LoRA expert is `up down x`. The library itself says
which layers a folder adapts, and with which rank and scale; writing one needs its files alone.

Letters: D in, O out, R sum of the ranks.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.errors import AdapterError, MoAConfigError, one_line
from moa.files import saving
from moa.files.reading import read_files
from moa.layers.experts import LoRAExpert
from moa.layers.layer import MoALinear
from moa.model.heads import head_path, head_settings
from moa.model.injection import IN_BLOCK, InjectReport, check_fresh, classifier, matching_layers
from moa.model.merging import fixed_layers, lora_factors

PREFIX = "base_model.model."  # of every tensor name

_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")

# What the library and the checks below raise at settings that make no sense.
_REFUSALS = (TypeError, ValueError, ArithmeticError, AttributeError, KeyError, re.error)

# Settings that PEFT is asked about, and settings without an effect on what a trained adapter
# computes. All others must be off, so that an extension of LoRA by a later PEFT is refused rather
# than ignored.
_READ = """
    r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
    layers_to_transform layers_pattern modules_to_save
""".split()
_WITHOUT_EFFECT = """
    peft_type init_lora_weights task_type auto_mapping peft_version base_model_name_or_path revision
    inference_mode lora_dropout megatron_core runtime_config eva_config qalora_group_size
    ensure_weight_tying
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
    with saving.replaced_adapter(folder) as temporary:
        (temporary / saving.WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (temporary / saving.CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


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
        AdapterError: the folder is damaged, does not fit the model, or holds what `lora` is not; or
            the library is not installed.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    try:
        _check_settings(settings)
        _check_expressions(settings)
        check_fresh(model)
        head = _saved_head(model, settings)
        adapted = _adapted(model, settings)
        _check_places(model, set(adapted), {m[1] for m in map(_FACTOR.fullmatch, tensors) if m})
        config = _config(model, {path: layer.r["default"] for path, layer in adapted.items()})
        first, _ = next(classifier(model).named_parameters())
        saved = tensors.get(f"{PREFIX}{head}.{first}")
        num_classes = None if saved is None else next(iter(saved.shape), None)
        empty = saving.outline(model)
        saving.fit_and_inject(empty, config, num_classes)
    except ImportError as error:
        raise AdapterError(
            f"{folder}: reading it needs peft ({error}); pip install 'moa-trainer[peft]'"
        ) from error
    except _REFUSALS as error:
        raise AdapterError(f"{folder}: cannot be imported: {one_line(error)}") from error
    saving.check_fit(str(folder), _places(empty, adapted, head), tensors)
    report = saving.fit_and_inject(model, config, num_classes)
    scales = {_factor_names(path)[1]: layer.scaling["default"] for path, layer in adapted.items()}
    with torch.no_grad():
        for name, place in _places(model, adapted, head).items():
            place.copy_(tensors[name].double() * scales.get(name, 1.0))
    return report


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        settings, tensors = read_files(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: no readable adapter ({one_line(error)}); give a whole folder as PEFT's "
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
    known = {*_READ, *_WITHOUT_EFFECT}
    for name in sorted(n for n, v in settings.items() if v and v != "none" and n not in known):
        why = _REMEDIES.get(name, "not part of plain LoRA, which is all that `lora` can be")
        raise ValueError(f"{name}: {settings[name]!r}; {why}")
    for rank in (settings.get("r"), *(settings.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 1 <= rank < 2**31:
            raise ValueError(f"r: {rank}; legal is a whole number >= 1")
    for alpha in (settings.get("lora_alpha"), *(settings.get("alpha_pattern") or {}).values()):
        if not (isinstance(alpha, int | float) and math.isfinite(alpha)):
            raise ValueError(f"lora_alpha: {alpha!r}; legal is a finite number")


def _check_expressions(settings: Mapping[str, Any]) -> None:
    """Refuses regular expressions that could match for hours, as a nested repetition does."""
    for name in _READ:
        value = settings.get(name)
        for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            repeated = (len(re.findall(r"[*+{]", part)) for part in text.split("|"))
            if re.search(r"\)[*+{]", text) or max(repeated) > 5:
                raise ValueError(f"{name}: {text!r} repeats too much; name whole paths in training")


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
    what = "two classifiers"
    if head_settings(model):
        what = "a cosine head (model.head)"
    elif path := head_path(model):
        return path
    raise MoAConfigError(
        f"{type(model).__name__} has {what}, for which PEFT's files have no form; keep the adapter "
        "as it is: moa.save_adapter writes a small file"
    )


def _adapted(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's own LoRA layers, without values, by the path at which it puts them."""
    import peft
    from peft.tuners.lora import LoraLayer

    given = {name: settings[name] for name in _READ if settings.get(name) is not None}
    config = peft.LoraConfig(**given, init_lora_weights=False)
    empty = peft.inject_adapter_in_model(config, saving.outline(model), low_cpu_mem_usage=True)
    return {path: layer for path, layer in empty.named_modules() if isinstance(layer, LoraLayer)}


def _config(model: nn.Module, adapted: Mapping[str, int]) -> MoAConfig:
    """The `lora` configuration of just the adapted layers, given the rank of each."""
    ranks: dict[int, list[str]] = {}
    for path, rank in adapted.items():
        ranks.setdefault(rank, []).append(path)
    if len(ranks) > 1:
        named = "; ".join(f"{rank} at {', '.join(paths)}" for rank, paths in ranks.items())
        raise ValueError(f"rank_pattern: gives several ranks ({named}); legal is one for all")
    places = [match for path in adapted if (match := IN_BLOCK.match(path))]
    targets = tuple(dict.fromkeys(place[2] for place in places))
    blocks = tuple(dict.fromkeys(int(place[1]) for place in places))
    config = MoAConfig(method="lora", ranks=tuple(ranks), targets=targets, blocks=blocks)
    if absent := [path for path in matching_layers(model, config) if path not in adapted]:
        raise ValueError(
            f"target_modules: not alike in all adapted blocks, {', '.join(absent)} would be "
            "missing; legal are the same layers in each of them"
        )
    return config


def _check_places(model: nn.Module, adapted: set[str], stored: set[str]) -> None:
    """Refuses layers that cannot be adapted here, and settings that differ from the tensors."""
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    usable = matching_layers(model, MoAConfig(method="lora", targets=("*",), blocks="all"))
    for path in sorted((stored | adapted) - set(usable)):
        what = f"a {kinds[path]}" if path in kinds else "not in the model"
        raise ValueError(
            f"target_modules: it adapts {path}, which is {what}; legal are the linear layers "
            r"inside `blocks.N`; name whole paths in training, as in 'blocks\.\d+\.attn\.qkv'"
        )
    if differ := sorted(stored ^ adapted):
        has = "are no tensors" if differ[0] in adapted else "are tensors, but no target_modules"
        raise ValueError(f"for {differ[0]} there {has}; take another copy")


def _factor_names(path: str) -> tuple[str, str]:
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _places(model: nn.Module, layers: Iterable[str], head: str | None) -> dict[str, Tensor]:
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
