"""Images and patches of another size than the backbone's, from training to prediction."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import moa
from tests.support.trainer_fixtures import arguments
from trainer.config.run_config import ModelConfig
from trainer.evaluate import __main__ as evaluate
from trainer.evaluate.members import base_of, read_members
from trainer.plan.__main__ import read_command_line
from trainer.plan.planning import make_plan
from trainer.predict import __main__ as predict
from trainer.prepare.backbone import create_backbone, outline
from trainer.prepare.vit_embedded import WEIGHTS_PATH
from trainer.process.errors import ConfigError
from trainer.train import session

SHIPPED = load_file(WEIGHTS_PATH)


def test_weights_are_resampled_as_timm_does_it() -> None:
    made = create_backbone(ModelConfig(image_size=40, patch_size=4), 10, 0).model
    positions = resample_abs_pos_embed(SHIPPED["pos_embed"], [10, 10])
    assert torch.equal(made.pos_embed, positions)  # type: ignore[arg-type]
    patches = resample_patch_embed(SHIPPED["patch_embed.proj.weight"], [4, 4])
    assert torch.equal(made.patch_embed.proj.weight, patches)  # type: ignore[union-attr, arg-type]
    own = create_backbone(ModelConfig(), 10, 0)
    same = create_backbone(ModelConfig(image_size=32), 10, 0)
    assert (same.sha256, same.data_config) == (own.sha256, own.data_config)


def test_a_dynamic_size_leaves_the_base_as_it_is() -> None:
    own = create_backbone(ModelConfig(), 10, 0)
    made = create_backbone(ModelConfig(image_size=48, dynamic_size=True), 10, 0)
    assert made.sha256 == own.sha256
    assert made.data_config["input_size"] == (3, 48, 48)
    images = torch.randn(2, 3, 48, 48)
    fixed: Any = create_backbone(ModelConfig(image_size=48), 10, 0).model.eval()
    dynamic: Any = made.model.eval()
    with torch.no_grad():
        seen, expected = dynamic.forward_features(images), fixed.forward_features(images)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_a_run_of_another_size_is_evaluated_and_predicted_so(
    few: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"train__steps": "1", "model__image_size": "40", "moa__method": "moa_lora"}
    output = tmp_path / "run"
    assert session.main(arguments(output, **few, **settings)) == 0
    adapter = output / "adapter"
    info = json.loads((adapter / "adapter_config.json").read_text())
    assert info["model_args"] == {"img_size": 40}
    assert info["data_config"]["input_size"] == [3, 40, 40]
    assert "img_size=40" in (adapter / "README.md").read_text()
    capsys.readouterr()
    trained = json.loads((output / "results.jsonl").read_text().splitlines()[-1])
    root = ["--data.root", few["data__root"]]
    found = {}
    for flags in ((), ("--model.image_size", "32")):
        assert evaluate.main(["--adapter", str(adapter), "--json", *root, *flags]) == 0
        found[flags] = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in found[()].items() if k.startswith("env")} == {
        k: v for k, v in trained.items() if k.startswith("env")
    }
    assert found[()] != found["--model.image_size", "32"]
    shares = []
    for flags in ((), ("--model.image_size", "32")):
        out = tmp_path / f"{len(flags)}.csv"
        command = ["--adapter", str(adapter), "--images", few["data__root"], "--out", str(out)]
        assert predict.main([*command, *flags]) == 0
        shares.append(next(csv.DictReader(out.open())))
    assert shares[0]["image"] == shares[1]["image"]
    assert shares[0] != shares[1]
    with pytest.raises(moa.AdapterError, match="img_size=40"):
        moa.load_adapter(timm.create_model("vit_embedded.glyphs", True, num_classes=10), adapter)
    (member,) = read_members([str(adapter)])
    own = timm.create_model("vit_embedded.glyphs", True, num_classes=10, img_size=40)
    assert moa.load_adapter(own, adapter).base_sha256 == base_of(member, None).sha256
    assert evaluate.main(["--adapter", str(adapter), *root, "--model.image_size", "33"]) == 2
    assert (
        "model.image_size: 33 pixels are no multiple of the patch of 8" in capsys.readouterr().err
    )


def test_the_plan_follows_the_size() -> None:
    plans = [
        make_plan(*read_command_line(["--train.batch_per_domain=8", *flags]))
        for flags in ((), ("--model.image_size=64",), ("--model.patch_size=4",))
    ]
    flops = [plan.load.flops for plan in plans]
    assert 3 < flops[1] / flops[0] < 6
    assert flops[2] == pytest.approx(flops[1], rel=0.05), "as many patches"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_size": 36},
            "model.image_size: 36 pixels are no multiple of the patch of 8 .* 32 or 40",
        ),
        ({"patch_size": 5}, "model.patch_size: 32 pixels are no multiple of the patch of 5"),
        (
            {"backbone": "resnet18", "image_size": 96},
            "model.image_size: resnet18 comes in one form",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    config = ModelConfig(weights="random", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        outline(config, moa.MoAConfig(), 10)
    with pytest.raises(ConfigError, match=message):
        create_backbone(config, 10, 0)


def test_sizes_out_of_range() -> None:
    problems = ModelConfig(image_size=0, patch_size=-1).problems()
    assert problems == [
        "model.image_size: 0; must be a whole number from 1 to 16384",
        "model.patch_size: -1; must be a whole number from 1 to 16384",
    ]
