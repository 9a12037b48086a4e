"""Weights of a backbone: all of them or none, finite, and never the pretrained head."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moa
from moa.model.injection import classifier
from trainer.config.model import ModelConfig
from trainer.prepare import backbone
from trainer.prepare.backbone import create_backbone
from trainer.prepare.vit_embedded import WEIGHTS_PATH
from trainer.process.errors import ConfigError

Tensors = dict[str, Tensor]


def written(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The shipped weights with a change, as a file."""
    save_file(change(load_file(WEIGHTS_PATH)), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def embedded(weights: Path | str, classes: int = 10, seed: int = 0) -> Any:
    config = ModelConfig(backbone="vit_embedded", weights=str(weights))
    return create_backbone(config, classes, seed)


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(start)}


def spoiled(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name] * float("nan")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("model."), r"78 of 78 tensors are missing, the first is cls_token; without the "
         r"prefix 'model\.' the names would fit"),
        (prefixed("visual."), r"78 of 78 .*prefix 'visual\.'"),
        (without("blocks.3."), r"12 of 78 tensors are missing, the first is blocks\.3\.norm1\."),
        (without("pos_embed"), r"1 of 78 tensors are missing, the first is pos_embed\)"),
        (spoiled("blocks.2.attn.qkv.weight"), r"blocks\.2\.attn\.qkv\.weight holds NaN"),
    ],
    ids=["lightning", "open_clip", "block", "one", "nan"],
)  # fmt: skip
@pytest.mark.parametrize("classes", [10, 15])
def test_weights_that_leave_a_part_random_are_refused(
    change: Callable[[Tensors], Tensors], message: str, classes: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        embedded(written(tmp_path, change), classes)
    assert str(caught.value).startswith(f"model.weights: '{tmp_path}/weights.safetensors' does not")


def test_the_remedies_work(tmp_path: Path) -> None:
    wanted = embedded("pretrained")
    file = written(tmp_path, prefixed("model."))
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file)
    assert embedded(file).sha256 == wanted.sha256
    assert embedded(written(tmp_path, without("head."))).sha256 == wanted.sha256, "a fresh one"
    assert torch.nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"


@pytest.mark.parametrize("classes", [10, 15])  # 15 is the pretrained head's own number
def test_the_head_is_fresh_and_follows_from_the_seed(classes: int) -> None:
    heads = [classifier(embedded("pretrained", classes, seed).model) for seed in (0, 0, 1)]
    (first, same, other) = (head.weight.detach() for head in heads)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(0.02, rel=0.1), "as timm draws it"
    own = timm.create_model("vit_embedded", pretrained=True).head.weight
    assert own.std() > 0.04, "what the pretrained one would have"


def test_safetensors_of_a_model_that_timm_ships_otherwise(tmp_path: Path) -> None:
    """Some of timm's own files are `.npz`, which must not decide how the user's file is read."""
    name = "vit_tiny_r_s16_p8_224.augreg_in21k"
    assert timm.get_pretrained_cfg(name).custom_load
    fresh = timm.create_model(name, num_classes=0)
    save_file(fresh.state_dict(), tmp_path / "own.safetensors")
    made = create_backbone(ModelConfig(backbone=name, weights=f"{tmp_path}/own.safetensors"), 2, 0)
    assert torch.equal(made.model.pos_embed, fresh.pos_embed)


def test_what_is_fetched_is_said_once_and_only_if_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(backbone="vit_tiny_patch16_224")

    def nothing(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", nothing)
    cached: list[str | None] = [None]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: cached[0])
    with caplog.at_level(logging.WARNING):
        for place, rank in ((None, "0"), (None, "1"), ("model.safetensors", "0")):
            cached[0] = place
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            with pytest.raises(ConfigError, match="no network"):
                create_backbone(config, 2, 0)
    (line,) = caplog.messages
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert line == f"fetching the weights of {name} from timm/{name} into {tmp_path}"


def test_backbones_that_cannot_work_are_refused_before_weights_are_had() -> None:
    for name, word in (("resnet18", "has no linear layers under `blocks.N`"),
                       ("deepseek_vit_412m_enc", "is no timm model")):  # fmt: skip
        with pytest.raises(moa.MoAConfigError, match=word):
            backbone.outline(ModelConfig(backbone=name), moa.MoAConfig(method="lora"), 2)
    config = ModelConfig(backbone="convit_tiny", grad_checkpointing=True)
    with pytest.raises(ConfigError, match="grad_checkpointing: convit_tiny cannot; leave it at"):
        backbone.outline(config, moa.MoAConfig(method="linear"), 2)
