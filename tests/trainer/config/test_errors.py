"""Mistakes of the user: one clear line with the remedy, the right exit code, no traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shards import DataConfig, open_shards
from shards.stream.evaluation import Split, split_places
from tests.support.trainer_fixtures import arguments, environment, launch, launch_anew
from trainer.config.command_line import parse
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError
from trainer.process.world import ALONE
from trainer.train.session import main

BAD_SETTINGS = [
    ("data.root", "/no/such/folder", 2, ["/no/such/folder", "shards.writer"]),
    ("data.held_out", "rotatd", 2, ["'rotatd'", "plain, inverted", "'rotated'"]),
    ("data.held_out", "", 2, ["''", "names no domain"]),
    ("output_dir", "", 2, ["''", "names no folder"]),
    ("model.backbone", "vit_embeded", 2, ["'vit_embeded'", "vit_embedded"]),
    ("model.backbone", "vit_base_patch16_clip_224.laion2c", 2, ["laion2c", "laion2b"]),
    ("model.weights", "nowhere.safetensors", 2, ["nowhere.safetensors", "pretrained, random"]),
    ("moa.targets", "[attn.q]", 2, ["'attn.q'", "attn.qkv"]),
    ("moa.kron_dim", "48", 2, ["48", "128", "blocks.0.attn.qkv", "64"]),
    ("moa.blocks", "[7]", 2, ["[7]", "0 to 5"]),
    ("train.batch_per_domain", "0", 2, ["train.batch_per_domain", "0", "from 1"]),
    ("train.accumulation", "3", 2, ["3", "20", "legal"]),
    ("train.step", "3", 2, ["train.step", "'train.steps'"]),
    ("optim.lr", "fast", 2, ["optim.lr", "'fast'", "number"]),
    ("resume", "must", 2, ["must", "--output_dir"]),
    ("recipe", "embeded", 2, ["'embeded'", "'embedded'"]),
]


@pytest.mark.parametrize(("key", "value", "code", "words"), BAD_SETTINGS, ids=lambda v: str(v)[:30])
def test_bad_setting(
    key: str, value: str, code: int, words: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*arguments(tmp_path / "run"), f"--{key}={value}"]) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("domain", "split", "word"), [("plain", "out", "validated"), ("rotated", "in", "tested")]
)
def test_a_list_leaves_images_to_validate_and_to_test_on(
    domain: str, split: Split, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = open_shards(DataConfig())
    env = index.domain_number(domain, "domain")
    ranks = split_places(index, env, split, trial_seed=0, holdout_fraction=0.2)
    file = tmp_path / "list.txt"
    settings = [*arguments(tmp_path / "run"), f"--data.exclude_list={file}"]
    file.write_text("\n".join(index.key(env, int(rank)) for rank in ranks[1:]))
    build(parse(settings), ALONE)
    file.write_text("\n".join(index.key(env, int(rank)) for rank in ranks))
    assert main(settings) == 2
    error = capsys.readouterr().err
    assert f"data.exclude_list: leaves no image of the {split!r} split of {domain!r}" in error
    assert f"would be {word}" in error


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--moa.methd=lora", "--optim.lr=x", "stray", "--train.steps"]) == 2
    error = capsys.readouterr().err
    for word in ("'moa.method'", "optim.lr", "stray", "--train.steps: no value"):
        assert word in error
    assert main(["--moa.top_k=9", "--train.steps=0", "--data.workers=-1", "--optim.eps=0"]) == 2
    error = capsys.readouterr().err
    for word in ("moa.top_k", "train.steps", "data.workers", "optim.eps"):
        assert word in error


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("--objective.name=mixup", "mixup, which mixes domains itself; use --data.mix none, or"),
        ("--objective.name=irm", "objective.name irm, which needs images of one label"),
        ("--train.batch_per_domain=1", "and train.batch_per_domain is 1; raise it, or"),
        ("--objective.label_smoothing=1", "objective.label_smoothing: 1.0; must be a number >= 0"),
    ],
)
def test_what_cannot_be_trained_on_mixed_images(wrong: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--data.mix=cutmix", wrong]).check()
    (line,) = str(caught.value).splitlines()
    assert why in line
    parse(["--data.mix=cutmix"]).check()
    parse([wrong.replace("smoothing=1", "smoothing=0.1")]).check()


def test_problems_of_backbone_data_engine_and_world_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_sise": 5}
    content = {"train_batch_size": 7, "gradient_clipping": "auto", "zero_optimization": zero}
    file.write_text(json.dumps(content | {"optimizer": {}}))
    wrong = [f"--ds_config={file}", "--model.backbone=vit_embeded", "--moa.ep_size=2"]
    assert main([*arguments(tmp_path / "run"), *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    words = ("vit_embeded", "moa.ep_size: 2 does not divide", "reduce_bucket_size",
             "train_batch_size is 7", "section 'optimizer'")  # fmt: skip
    for word in words:
        assert sum(word in line for line in lines) == 1, (word, lines)
    assert len(lines) == len(words)
    wrong = [f"--ds_config={file}", "--model.backbone=vit_embeded", "--data.held_out=rotatd"]
    assert main([*arguments(tmp_path / "run"), *wrong]) == 2
    error = capsys.readouterr().err
    assert "vit_embeded" in error
    assert "'rotatd'" in error


def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "run")) == 73
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--output_dir" in error


def test_ds_config_that_contradicts_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}}))
    assert main([*arguments(tmp_path / "run"), f"--ds_config={path}"]) == 2
    error = capsys.readouterr().err
    assert "train_batch_size is 7" in error
    assert "20" in error
    path.write_text("{")
    assert main([*arguments(tmp_path / "run"), f"--ds_config={path}"]) == 2
    assert "not JSON" in capsys.readouterr().err


def test_weights_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub client is offline, as HF_HUB_OFFLINE makes it on many compute nodes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    changes = {"model__backbone": "vit_tiny_patch16_224", "moa__method": "linear"}
    assert main(arguments(tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    for word in ("vit_tiny_patch16_224", "--model.weights", "HF_HOME"):
        assert word in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("start", "change", "code", "word"),
    [
        (launch, {"data__held_out": "sketch"}, 2, "'sketch'"),
        (launch_anew, {}, 73, "--output_dir"),  # by the deepspeed launcher
    ],
    ids=["domain", "output"],
)
def test_one_rank_tells_and_the_exit_code_is_passed_on(
    start: Callable[..., "subprocess.CompletedProcess[str]"],
    change: dict[str, str],
    code: int,
    word: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / ("run" if change else "file/run")
    result = start(*arguments(output, **change), processes=2)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert word in lines[0]
    assert "Traceback" not in result.stderr


def test_class_lists_that_differ_between_domains(tmp_path: Path) -> None:
    from PIL import Image

    for domain, names in (("photo", ("cat", "dog")), ("sketch", ("cat", "dogg"))):
        for name in names:
            folder = tmp_path / "images" / domain / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "1.png")
    result = subprocess.run(
        [sys.executable, "-m", "shards.writer", "--dataset", "folder",
         "--root", str(tmp_path / "images"), "--out", str(tmp_path / "shards")],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert result.returncode in (2, 65)
    for word in ("dog", "sketch"):
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "shards" / "index.json").exists()


def test_changed_setting_on_resume_is_refused(
    few: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    result = launch(*arguments(output, **few, train__steps="2", moa__method="linear"))
    assert result.returncode == 0, result.stderr
    changed = arguments(output, **few, train__steps="3", moa__method="linear", optim__lr="0.5")
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert "optim.lr" in error
    assert "0.002" in error
    assert "0.5" in error
    same = arguments(output, **few, train__steps="2", moa__method="linear")
    assert main([*same, "--resume=never"]) == 73
    assert "already holds a run" in capsys.readouterr().err
