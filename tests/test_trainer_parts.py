"""The pure parts of the trainer: command line, DeepSpeed JSON, world, selection, tables."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moa.config import MoAConfig
from moa.state import AdapterInfo
from trainer import checkpoint, ds_json
from trainer.commandline import RECIPES, parse
from trainer.config import ROOT, RunConfig, TrainConfig, as_plain
from trainer.errors import CheckpointError, ConfigError
from trainer.report import Cell, main, mean_and_error, summary
from trainer.resume import check_agreement, flat
from trainer.run_folder import RunFolder, read_rows
from trainer.selection import training_domain_validation, validation_accuracy
from trainer.world import World, export_world, world_from_environment

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
    "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_is_legal_and_survives_its_own_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse([f"--recipe={recipe}"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(as_plain(config)))
    assert parse([f"--recipe={copy}"]) == config


def test_flags_override_the_recipe_and_launcher_flags_are_ignored() -> None:
    config = parse(
        ["--local_rank=1", "--optim.lr", "3e-4", "--moa.ranks=[2, 4]", "--moa.blocks", "[0,5]",
         "--model.grad_checkpointing=true", "--deepspeed_config", "ds_configs/zero1.json"]
    )  # fmt: skip
    assert config.optim.lr == 3e-4
    assert config.moa.ranks == (2, 4)
    assert config.moa.blocks == (0, 5)
    assert config.model.grad_checkpointing is True
    assert config.ds_config == "ds_configs/zero1.json"
    assert config.train.batch_per_domain == 8, "from the default recipe"


def test_problems_of_a_recipe_name_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("train: {stepz: 3}\noptim: {lr: fast}\n")
    with pytest.raises(ConfigError) as caught:
        parse([f"--recipe={path}"])
    assert "train.stepz" in str(caught.value)
    assert "'train.steps'" in str(caught.value)
    assert str(caught.value).count("bad.yaml") == 2


def config_with(content: dict[str, Any], tmp_path: Path, **train: Any) -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return RunConfig(ds_config=str(path), train=TrainConfig(**train))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_shipped_json_resolves_completely(name: str) -> None:
    config = replace(RunConfig(), ds_config=f"ds_configs/{name}.json")
    resolved = ds_json.resolve(config, world_size=4, global_batch=160, bf16=True, trainable=999_999)
    assert resolved["train_batch_size"] == 160
    assert resolved["train_micro_batch_size_per_gpu"] == 40
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["gradient_clipping"] == 0.0, "DeepSpeed's own default would clip at 1"
    assert resolved["bf16"]["enabled"] is True
    assert resolved["zero_optimization"]["stage"] == int(name[4])
    assert resolved["zero_optimization"]["reduce_bucket_size"] > 1_000_000
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage 4"),
        ({"zero_optimization": {"stage": True}}, "stage True"),
        ({"zero_optimization": None}, "must be an object"),
        ([], "must be a JSON object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "must be a number"),
        ({"zero_optimization": {}}, "stage None"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "--optim.name"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "gradient_clipping is 1.0"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "overlap_comm"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"on": True}}, "bf16.on is not known"),
        ({"zero_optimisation": {"stage": 2}}, "has no zero_optimization section"),
        ({"zero_optimization": {"stage": 2}, "activation_checkpointing": {}}, "grad_checkpointing"),
    ],
)
def test_json_that_cannot_work(content: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ds_config") as caught:
        ds_json.resolve(config_with(content, tmp_path), 1, 160, False)
    assert word in str(caught.value)


def test_gradient_bucket_must_hold_all_trainables() -> None:
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    ds_json.check_buckets(content, 999)
    with pytest.raises(ConfigError, match="reduce_bucket_size"):
        ds_json.check_buckets(content, 1000)


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, World(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, World(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, World(1, 2, 0, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            World(5, 8, 1, 1),
        ),
        # A shell inside an allocation is not a task of it.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World(0, 1, 0, 1)),
    ],
)
def test_world_from_the_launchers_variables(
    variables: dict[str, str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == world
    export_world(world)
    assert world_from_environment() == replace(world, local_size=world.local_size)


def row(step: int, *accuracies: tuple[float, float]) -> dict[str, Any]:
    result: dict[str, Any] = {"step": step}
    for env, (inside, outside) in enumerate(accuracies):
        result |= {f"env{env}_in_acc": inside, f"env{env}_out_acc": outside}
    return result


def test_training_domain_validation_is_domainbeds() -> None:
    rows = [
        row(0, (0.1, 0.5), (0.9, 0.5), (0.70, 1.0)),
        row(5, (0.1, 0.8), (0.9, 0.6), (0.80, 0.0)),
        row(9, (0.1, 0.6), (0.9, 0.8), (0.90, 0.9)),
    ]
    assert validation_accuracy(rows[0], held_out=2) == 0.5, "the held-out domain does not count"
    assert training_domain_validation(rows, held_out=2)["step"] == 5, "the first of equals"
    assert training_domain_validation(rows, held_out=0)["step"] == 9
    with pytest.raises(ValueError, match="no evaluation"):
        training_domain_validation([], 0)


def test_mean_and_error_are_domainbeds() -> None:
    mean, error = mean_and_error([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7)
    assert error == pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 3) / math.sqrt(3))


def test_summary_averages_seeds_and_shows_missing_cells() -> None:
    cells = [
        Cell("d", "lora", held_out, (seed, seed), value)
        for held_out, values in {"a": (0.5, 0.6), "b": (0.7, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    titles, lines = summary([*cells, Cell("d", "full", "a", (0, 0), 0.25)])
    assert titles == ["a", "b", "mean"]
    # Seed means 0.60 and 0.75: mean 67.5, population deviation 7.5 over sqrt 2.
    assert lines["lora"] == ["55.0 ± 3.5", "80.0 ± 7.1", "67.5 ± 5.3"]
    assert lines["full"] == ["25.0", "-", "-"]


def test_summary_refuses_two_runs_for_one_cell() -> None:
    one = Cell("d", "lora", "a", (0, 0), 0.5, "first")
    with pytest.raises(ConfigError, match="first and second"):
        summary([one, replace(one, folder="second")])
    with pytest.raises(ConfigError, match="two datasets"):
        summary([one, replace(one, dataset="e", held_out="b")])
    summary([one, replace(one, seed=(0, 1))])


def test_report_reads_run_folders_and_refuses_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = as_plain(parse(["--data.held_out=plain", "--moa.method=lora"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [row(s, (0.5 + s / 100, 0.0), (0.5, s / 100)) for s in (0, 10)]
    for entry in rows:
        entry["args"] = {"test_envs": [0]}
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main([str(folder)]) == 2
    assert "done" in capsys.readouterr().err
    (folder / "done").write_text("done\n")
    assert main([str(folder), "--format", "markdown"]) == 0
    assert "| `lora` | 60.0 | 60.0 |" in capsys.readouterr().out


def test_resume_cuts_rows_back_and_drops_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    for step in range(5):
        folder.append(folder.metrics, {"step": step, "loss": 1 / 3})
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    with pytest.raises(CheckpointError, match="line 6"):
        read_rows(folder.metrics)
    folder.cut_back(3)
    assert read_rows(folder.metrics) == [{"step": s, "loss": 1 / 3} for s in range(3)]
    folder.release()


def test_checkpoints_beyond_the_start_are_set_aside_and_pruning_spares_the_newest(
    tmp_path: Path,
) -> None:
    info = AdapterInfo("base", "0", MoAConfig(method="linear"), ("a",), {})
    tensors = {"head.weight": torch.zeros(1)}
    for step in (3, 9):
        checkpoint.save(tmp_path, info, tensors, tensors, {"step": step}, keep=5)
    (tmp_path / "step-00000009" / "state.json").write_text("{}")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 3
    checkpoint.set_aside_newer(tmp_path, 3)
    checkpoint.save(tmp_path, info, tensors, tensors, {"step": 5}, keep=1)
    assert {p.name for p in tmp_path.glob("step*")} == {"step-00000005", "step-00000009.damaged"}
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


def test_killed_replacement_of_an_adapter_is_undone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.adapter.with_name("adapter.old").mkdir(parents=True)
    with folder.claimed():
        assert folder.adapter.is_dir()
        assert not folder.adapter.with_name("adapter.old").exists()


def test_resume_refuses_what_changes_the_result_and_allows_the_rest(tmp_path: Path) -> None:
    old = {"config": flat(parse([])), "data": {"seed": 0}}
    free = parse(["--data.workers=2", "--train.steps=999", "--ds_config=ds_configs/zero1.json"])
    check_agreement(old, {"config": flat(free), "data": {"seed": 0}}, tmp_path)
    changed = flat(parse(["--optim.lr=1", "--moa.ranks=[1,2]"]))
    with pytest.raises(ConfigError) as caught:
        check_agreement(old, {"config": changed, "data": {"seed": 0}}, tmp_path)
    assert "optim.lr" in str(caught.value)
    assert "moa.ranks" in str(caught.value)
    with pytest.raises(ConfigError, match="data"):
        check_agreement(old, old | {"data": {"seed": 1}}, tmp_path)


def test_default_recipe_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse([]).ds_config_path() == ROOT / "ds_configs" / "zero2.json"
