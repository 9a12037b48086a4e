"""Texts are taken as they stand, files with a key twice are refused, `~` is a folder anywhere."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.trainer_fixtures import ROOT
from trainer.config import deepspeed_json
from trainer.config.class_texts import read_class_names
from trainer.config.command_line import CommandParser, command_parser, parse
from trainer.config.repeated_keys import repeated_key
from trainer.config.run_config import RunConfig
from trainer.evaluate.__main__ import parser as evaluate_parser
from trainer.flatness.__main__ import parser as flatness_parser
from trainer.process.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim: {lr: 0.1}\ntrain: {steps: 3}\noptim: {clip: 0.5}\n", "`optim`.*lines 1, 3"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "`optim.lr`.*lines 2, 3"),
        ("optim.lr: 0.1\noptim: {lr: 0.2}\n", "`optim.lr`.*lines 1, 2"),
        ("data:\n  mode: window\n  order: window\n", "`data.order`.*lines 2, 3"),  # its old name
        ("deepspeed_config: a\nds_config: b\n", "`ds_config`.*lines 1, 2"),
    ],
)
def test_a_recipe_with_a_key_twice_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=rf"^--recipe: .*r.yaml: {problem}\); keep one of them"):
        parse([f"--recipe={recipe}"])


def test_other_files_with_a_key_twice_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{\n\t"zero_optimization": {"stage": 2,\n\t"stage": 3}\n}')
    with pytest.raises(ConfigError, match=r"ds_config: `zero_optimization.stage`.*lines 2, 3"):
        deepspeed_json.read(RunConfig(ds_config=str(file)))
    file.write_text("dog: a dog\ncat: a cat\ndog: a hound\n")
    with pytest.raises(ConfigError, match=r"class_names: .*`dog` stands twice \(lines 1, 3\)"):
        read_class_names(str(file))
    assert repeated_key("a: &x {b: 1}\nc: *x\nd: [{b: 1}, {b: 2}]\n") == ""
    assert repeated_key("") == ""


def test_no_file_of_ours_has_a_key_twice() -> None:
    files = [path for folder in ("trainer", "shards") for path in (ROOT / folder).rglob("*.yaml")]
    files += [*(ROOT / "ds_configs").glob("*.json")]
    assert len(files) > 10
    for path in files:
        assert repeated_key(path.read_text(encoding="utf-8")) == "", path


@pytest.mark.parametrize("text", ["null", '"null"', "# x", "Null", "no", "007", "[a]", "1:30"])
def test_a_text_is_taken_as_it_stands(text: str, tmp_path: Path) -> None:
    assert parse([f"--data.held_out={text}"]).data.held_out == text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{held_out: {json.dumps(text)}}}")
    assert parse([f"--recipe={recipe}"]).data.held_out == text
    if text not in ("null", "Null", '"null"', "# x", "[a]"):  # without quotes
        recipe.write_text(f"data:\n  held_out: {text}  # as written\n")
        assert parse([f"--recipe={recipe}"]).data.held_out == text


def test_on_and_off_in_a_recipe_are_words(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {graph: on}\nmodel: {compile: off, grad_checkpointing: on}\n")
    config = parse([f"--recipe={recipe}"])
    assert (config.train.graph, config.model.compile) == ("on", "off")
    assert config.model.grad_checkpointing is True
    recipe.write_text("train: {graph: yes}")
    with pytest.raises(ConfigError, match=r"graph = 'yes' .*legal is one of auto, on, off"):
        parse([f"--recipe={recipe}"])


def test_null_in_a_recipe_is_what_a_run_folder_says_of_an_open_setting(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {held_out: null}\ntrain: {time_limit: }\noutput_dir: ~\noptim:\n")
    config = parse([f"--recipe={recipe}"])
    assert (config.data.held_out, config.train.time_limit, config.output_dir) == (None,) * 3


def test_the_users_folder_is_meant_wherever_a_path_may_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text((ROOT / "ds_configs" / "zero1.json").read_text())
    paths = {
        "output_dir": "~/run", "ds_config": "~/ds.json", "model.weights": "~/w.safetensors",
        "data.root": "~/set", "data.cache_dir": "~/cache", "data.exclude_list": "~/list",
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(paths))
    for argv in (
        [f"--{key}={value}" for key, value in paths.items()],
        [word for key, value in paths.items() for word in (f"--{key}", value)],
        ["--recipe=~/r.yaml"],
    ):
        config = parse(argv)
        found = (
            config.output_dir, config.ds_config, config.model.weights, config.data.root,
            config.data.cache_dir, config.data.exclude_list,
        )  # fmt: skip
        assert found == tuple(v.replace("~", str(tmp_path)) for v in paths.values())
    for parser in (evaluate_parser(), flatness_parser()):
        args = parser.parse_args(["--adapter", "~/a", "--data.root=~/set", "--model.weights=~/w"])
        assert (args.adapter, args.root) == ([f"{tmp_path}/a"], f"{tmp_path}/set")
        assert args.weights == f"{tmp_path}/w"


def test_flags_are_listed_as_they_are_spelt_now_and_taken_as_they_were() -> None:
    parser: CommandParser = command_parser("trainer.sweep", None)
    parser.add_argument("--trial_seed", type=int)
    parser.add_argument("rest", nargs="*")
    for flags in (["--trial-seed", "3"], ["--trial-seed=3"], ["--trial_seed=3"]):
        args = parser.parse_args([*flags, "--", "--trial-seed=4"])
        assert (args.trial_seed, args.rest) == (3, ["--trial-seed=4"])
    assert "--trial-seed" not in parser.format_help()
