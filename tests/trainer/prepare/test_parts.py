"""The pure parts of the trainer: command line, DeepSpeed JSON, world, resume."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import yaml

from moa.config import MoAConfig
from moa.files.reading import AdapterInfo
from trainer.checkpoint import checkpoint
from trainer.checkpoint.run_folder import RunFolder, read_rows
from trainer.config import deepspeed_json
from trainer.config.command_line import RECIPES, parse
from trainer.config.run_config import ROOT, RunConfig, TrainConfig, as_plain
from trainer.evaluate.evaluator import Evaluator
from trainer.process.device import use_device
from trainer.process.errors import CheckpointError, ConfigError
from trainer.process.world import ALONE, World, export_world, world_from_environment
from trainer.train.loop import Trainer
from trainer.train.resume import check_agreement, flat

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
    "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_is_legal_and_survives_its_own_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse([f"--recipe={recipe}", f"--data.root={tmp_path}"])
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


def offloaded(section: object, name: str = "offload_optimizer") -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, name: section}}


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_shipped_json_resolves_completely(name: str) -> None:
    config = replace(RunConfig(), ds_config=f"ds_configs/{name}.json")
    resolved = deepspeed_json.resolve(
        config, world_size=4, global_batch=160, bf16=True, trainable=999_999
    )
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
        (
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_acum_dtype": "fp32"}},
            "data_types.grad_acum_dtype is not known; did you mean 'grad_accum_dtype'",
        ),
        (
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp23"}},
            "data_types.grad_accum_dtype is 'fp23'; legal are fp32, bf16",
        ),
        ({"zero_optimization": {"stage": 2}, "data_types": None}, "data_types is None; it must be"),
        (offloaded(None), "zero_optimization.offload_optimizer is None; it must be an object"),
        (offloaded("cpu", "offload_param"), "offload_param is 'cpu'; it must be an object"),
        ({"zero_optimisation": {"stage": 2}}, "has no zero_optimization section"),
        ({"zero_optimization": {"stage": 2}, "activation_checkpointing": {}}, "grad_checkpointing"),
    ],
)
def test_json_that_cannot_work(content: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ds_config") as caught:
        deepspeed_json.resolve(config_with(content, tmp_path), 1, 160, False)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (offloaded({"device": "gpu"}),
         "ds_config: zero_optimization.offload_optimizer.device is 'gpu'; Input should be 'none', "
         "'cpu' or 'nvme' (in "),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}},
         "ds_config: zero_optimization.overlap_comm is 'perhaps'; Input should be a valid boolean"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}},
         "ds_config: zero_optimization; Assertion failed, Partial offloading only"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}},
         "zero_optimization.overlap_com is not known; did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
         "did you mean 'stage3_max_live_parameters'"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}},
         "zero_optimization.cpu_offload is not known"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}},
         "zero_optimization.zenflow is not made for adapters"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"on": True}},
         "bf16.on is not known; legal are enabled"),
        (offloaded({"devise": "cpu"}), "offload_optimizer.devise is not known; did you mean 'dev"),
        (offloaded({"buffer_size": 1}), "offload_optimizer.buffer_size is not known"),
        (offloaded({"devise": "cpu"}, "offload_param"), "offload_param.devise is not known"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_refuse_is_refused_before(
    content: dict[str, Any], line: str, tmp_path: Path
) -> None:
    from trainer.prepare.zero_check import zero_problems

    (problem,) = zero_problems(config_with(content, tmp_path))
    assert line in problem
    assert str(tmp_path) in problem


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda p: p.stem)
def test_deepspeed_knows_every_word_of_the_shipped_files(path: Path) -> None:
    from trainer.prepare.zero_check import zero_problems

    assert zero_problems(RunConfig(ds_config=str(path))) == []


def test_gradient_bucket_must_hold_all_trainables(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    config = config_with(content, tmp_path)
    deepspeed_json.resolve(config, 1, 160, False, 999)
    with pytest.raises(ConfigError, match="reduce_bucket_size 1,000 must exceed the 1,000"):
        deepspeed_json.resolve(config, 1, 160, False, 1000)


JOB_OF_EIGHT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


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
        # The shell of salloc with use_interactive_step: a step of one task in a job of eight.
        (
            {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
            | {"SLURM_NTASKS_PER_NODE": "4", **JOB_OF_EIGHT},
            World(0, 1, 0, 1),
        ),
        # What srun starts in that shell.
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"} | JOB_OF_EIGHT, World(0, 8, 0, 1)),
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
    use_device(world)
    assert world_from_environment() == replace(world, local_size=world.local_size)


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
    assert parse([]).ds_config_path().resolve() == ROOT / "ds_configs" / "zero2.json"


class Asked(Exception):
    """What a loader was asked for."""


def asked(*_: object, **options: Any) -> NoReturn:
    raise Asked(options["pin_memory"])


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_are_pinned(
    device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = object.__new__(Trainer)
    trainer.config, trainer.world, trainer.step = RunConfig(), ALONE, 0
    trainer.engine = SimpleNamespace(device=torch.device(device))  # type: ignore[assignment]
    trainer.stream = SimpleNamespace(loader=asked)  # type: ignore[assignment]
    with pytest.raises(Asked, match=str(pinned)):
        trainer.train(None)
    monkeypatch.setattr("shards.stream.evaluation.BatchLoader", asked)
    index: Any = SimpleNamespace(reported=set())
    size: dict[str, Any] = {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1)}
    evaluator = Evaluator(
        index=index, data_config=size, trial_seed=0, holdout_fraction=0.2, batch_size=1, workers=0,
        world=ALONE, device=torch.device(device), dtype=torch.float32, sum_over_ranks=torch.clone,
    )  # fmt: skip
    with pytest.raises(Asked, match=str(pinned)):
        next(evaluator.batches([], [(0, "in")]))
