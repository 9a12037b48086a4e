"""The main job from end to end, through the real engine: few launches, many checks each."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from moa.files.reading import read_adapter
from shards import DataConfig, DomainStream, open_shards
from tests.support import warm
from tests.support.shards_fixtures import make_set
from tests.support.trainer_fixtures import arguments, environment, launch, launch_anew, rows
from trainer.checkpoint.run_folder import SPEED

DOMAINS = ["plain", "inverted", "outline", "coarse", "textured", "rotated"]
LOSSES = ("loss", "ce", "aux_loss", "grad_norm")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and console output of the short run in one plain process."""
    output = tmp_path_factory.mktemp("one") / "run"
    result = launch_anew(*arguments(output))
    assert result.returncode == 0, result.stderr
    return output, result.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same run in two processes, evaluated at both ends alone."""
    output = tmp_path_factory.mktemp("two") / "run"
    result = launch(*arguments(output, train__eval_every="50"), processes=2)
    assert result.returncode == 0, result.stderr
    return output


def accuracies(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if k.endswith("_acc")}
        for row in rows(folder / "results.jsonl")
    ]  # type: ignore[misc]


def test_metrics_have_one_row_per_step_in_the_streams_order(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(13))
    stream = DomainStream(
        open_shards(DataConfig()), sources=range(5), batch_per_domain=4, seed=3, trial_seed=0,
        transform=lambda x: x,
    )  # fmt: skip
    assert [row["batch_digest"] for row in metrics] == [stream.batch_digest(s) for s in range(13)]
    assert all(row["aux_loss"] > 0 and row["lr"] == 2e-3 for row in metrics)
    assert all(row["loss"] == pytest.approx(row["ce"] + row["aux_loss"]) for row in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_run_folder_is_complete(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    assert (folder / "done").exists()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["held_out"] == "rotated"
    assert config["moa"]["ranks"] == [1, 2, 4, 8]
    resolved = json.loads((folder / "ds_config.json").read_text())
    assert resolved["train_batch_size"] == 20
    assert resolved["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(resolved)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["tf32"] == {"cublas": False, "cudnn": False}
    assert (folder / "log.txt").stat().st_size > 0
    newest = (folder / "checkpoints" / "latest").read_text().strip()
    kept = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    assert kept == ["step-00000012", "step-00000013"]
    assert newest == kept[-1]


def test_results_rows_are_what_domainbed_reads(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    results = rows(folder / "results.jsonl")
    assert [row["step"] for row in results] == [0, 6, 12]
    assert [row.get(SPEED, 0) > 0 for row in results] == [False, True, True]  # type: ignore[operator]
    for row in results:
        for env in range(6):
            for split in ("in", "out"):
                assert 0 <= row[f"env{env}_{split}_acc"] <= 1  # type: ignore[operator]
        assert row["args"]["test_envs"] == [5]  # type: ignore[index]
        assert {"dataset", "algorithm", "trial_seed", "seed", "hparams_seed", "holdout_fraction",
                "output_dir"} <= set(row["args"])  # type: ignore[call-overload]  # fmt: skip
        assert row["epoch"] == pytest.approx(row["step"] * 4 / 240, rel=0.01)  # type: ignore[operator]


def test_closing_table_tells_what_is_asked_for(one_process: tuple[Path, str]) -> None:
    folder, console = one_process
    best = max(
        rows(folder / "results.jsonl"),
        key=lambda row: sum(row[f"env{i}_out_acc"] for i in range(5)),  # type: ignore[misc]
    )
    for word in ("held-out accuracy, rotated", "trainable / total", "adapter file", "images/s"):
        assert word in console
    assert f"{100 * best['env5_in_acc']:.1f}" in console  # type: ignore[operator]
    assert "tensorboard --logdir" in console
    assert "\x1b[" not in console, "no colours or cursor movements outside a terminal"
    assert sum(line.startswith("step ") for line in console.splitlines()) >= 10


def test_two_processes_train_the_same_model(
    one_process: tuple[Path, str], two_processes: Path
) -> None:
    one, two = rows(one_process[0] / "metrics.jsonl"), rows(two_processes / "metrics.jsonl")
    assert [row["batch_digest"] for row in one] == [row["batch_digest"] for row in two]
    for a, b in zip(one, two, strict=True):
        for name in LOSSES:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])
    first = read_adapter(one_process[0] / "adapter-last")[1]
    second = read_adapter(two_processes / "adapter-last")[1]
    assert first.keys() == second.keys()
    # Adam turns rounding of a near-zero gradient into a step of up to lr, so values are compared
    # against the distance training has moved them (about 13 steps of 2e-3).
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 13 * 2e-3 * 0.05, name
    assert accuracies(one_process[0])[0] == pytest.approx(accuracies(two_processes)[0], abs=0.01)


def test_bf16_run_resumes_and_is_evaluated_to_the_same_numbers(
    few: dict[str, str], tmp_path: Path
) -> None:
    """Resumed masters must be the saved ones, not the model's rounded weights.

    The same by static buffers as without them.
    """
    output = tmp_path / "run"
    changes = {"train__precision": "bf16", "train__steps": "4", "checkpoint__every": "2"}
    command = arguments(output, **few, **changes)
    assert launch(*command).returncode == 0
    whole = rows(output / "metrics.jsonl")
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    (output / "done").unlink()
    result = launch(*command, "--train.graph=on")
    assert result.returncode == 0, result.stderr
    assert "resumed after step 1" in result.stdout
    assert "train.graph: forward and backward are in static buffers" in result.stdout
    assert rows(output / "metrics.jsonl") == whole
    own = {k: v for k, v in rows(output / "results.jsonl")[-1].items() if k.endswith("_acc")}
    adapter = ["--adapter", str(output / "adapter-last"), "--data.root", few["data__root"]]
    found = []
    for precision in ([], ["--precision", "fp32"]):
        command = ["-m", "trainer.evaluate", *adapter, "--json", *precision]
        result = warm.run(*command, env=environment())
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
    assert {name: found[0][name] for name in own} == own
    assert found[0]["moa/env5_out_nll"] != found[1]["moa/env5_out_nll"]


def test_finished_run_without_checkpoints_is_not_overwritten(
    one_process: tuple[Path, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(one_process[0], output)
    shutil.rmtree(output / "checkpoints")
    result = launch(*arguments(output))
    assert result.returncode == 73
    assert rows(output / "results.jsonl") == rows(one_process[0] / "results.jsonl")


def test_finished_run_is_shown_not_repeated(one_process: tuple[Path, str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(one_process[0], output)
    before = (output / "metrics.jsonl").read_bytes()
    again = launch(*arguments(output))
    assert again.returncode == 0, again.stderr
    assert "held-out accuracy, rotated" in again.stdout
    assert (output / "metrics.jsonl").read_bytes() == before


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    one_process: tuple[Path, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(one_process[0], output)
    damaged = output / "checkpoints" / "step-00000013" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = launch(*arguments(output))
    assert result.returncode == 0, result.stderr
    assert "damaged checkpoint" in result.stdout
    assert "resumed after step 11" in result.stdout
    assert rows(output / "metrics.jsonl") == rows(one_process[0] / "metrics.jsonl")


def test_checkpoint_and_adapter_hold_no_frozen_tensor(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    model = timm.create_model("vit_embedded.glyphs", num_classes=10)
    moa.inject(model, moa.MoAConfig(method="moa_kron"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    for name in ("adapter", "adapter-last", "checkpoints/step-00000013"):
        with safe_open(folder / name / "adapter_model.safetensors", "pt") as file:
            assert set(file.keys()) == trainable
    with safe_open(folder / "checkpoints/step-00000013/optimizer.safetensors", "pt") as file:
        assert {key.split("|")[0] for key in file.keys()} == trainable
    size = sum(p.stat().st_size for p in (folder / "checkpoints/step-00000013").iterdir())
    assert size < 3.2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapter_gives_the_same_accuracies_in_a_new_process(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    command = ["-m", "trainer.evaluate", "--adapter", str(folder / "adapter"), "--json"]
    result = warm.run(*command, env=environment(), cwd=folder)
    assert result.returncode == 0, result.stderr
    found = {k: v for k, v in json.loads(result.stdout).items() if k.endswith("_acc")}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert found == {k: v for k, v in config["results"].items() if k.endswith("_acc")}
    assert found in accuracies(folder)


def test_tensorboard_has_the_contracts_curves(one_process: tuple[Path, str]) -> None:
    folder, _ = one_process
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {f"train/{name}" for name in ("loss", "ce", "aux_loss", "lr", "grad_norm")}
    wanted |= {f"eval/{domain}/{split}_acc" for domain in DOMAINS for split in ("in", "out")}
    wanted |= {"select/training_domain_validation/target_acc", "router/dead_experts"}
    wanted |= {f"router/blocks.{b}.attn.qkv/load_{e}" for b in (0, 2, 4) for e in range(4)}
    wanted |= {f"perf/{name}" for name in ("img_s", "step_ms", "data_wait_ms")}
    assert wanted <= tags
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == list(range(13))
    loads = [events.Scalars(f"router/blocks.0.attn.qkv/load_{e}")[-1].value for e in range(4)]
    assert sum(loads) == pytest.approx(1)
    means = [
        sum(row[f"env{env}_out_acc"] for env in range(5)) / 5  # type: ignore[misc]
        for row in rows(folder / "results.jsonl")
    ]
    best = [max(means[: number + 1]) for number in range(len(means))]
    for tag, numbers in (
        ("eval/mean_source_out_acc", means),
        ("select/training_domain_validation/validation_acc", best),
    ):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(numbers, abs=1e-6)
    assert events.Scalars("mem/peak_gib")[-1].value > 0.1
    assert "perf/mfu" not in tags, "nobody knows what this CPU could do"


def test_tensorboard_has_pages_of_every_evaluation_and_charts_of_what_there_is(
    one_process: tuple[Path, str], two_processes: Path
) -> None:
    folder, console = one_process
    events, of_two = (
        EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
        for run in (folder, two_processes)
    )
    for tag in ("routing/maps", "routing/expert_by_domain", "routing/expert_by_class"):
        assert [image.step for image in events.Images(tag)] == [0, 6, 12]
    tags = events.Tags()["scalars"]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    for category in layout.category:
        for chart in category.chart:
            found = [tag for tag in tags for rule in chart.multiline.tag if re.match(rule, tag)]
            assert found or chart.title.startswith("model FLOP"), chart.title
    for layer in (0, 2, 4):
        for what in ("domain", "class"):
            tag = f"router/blocks.{layer}.attn.qkv/bits_{what}"
            first, second = (e.Scalars(tag)[0].value for e in (events, of_two))
            assert first == pytest.approx(second, rel=1e-3), "two ranks count what one counts"
            assert 0 < first < 2
    first, second = (e.Images("confusion/held_out")[0] for e in (events, of_two))
    assert first.encoded_image_string == second.encoded_image_string
    assert f"routing map: {folder}/routing.png" in console
    with Image.open(folder / "routing.png") as picture:
        assert picture.width > 500


def test_every_method_trains(tmp_path: Path) -> None:
    methods = ("full", "linear", "lora", "kadaptation", "moa_lora")
    data = {"data__dataset": "folder", "data__root": str(make_set(tmp_path / "data").root)}
    steps = dict.fromkeys(methods, 3) | {"linear": 1}
    for method in methods:
        changes = {"moa__method": method, "train__steps": str(steps[method])}
        result = launch(*arguments(tmp_path / method, **changes, **data))
        assert result.returncode == 0, result.stderr
        metrics = rows(tmp_path / method / "metrics.jsonl")
        assert len(metrics) == steps[method]
        measured = "images/s" if steps[method] > 1 else "not measured"
        assert re.search(rf"training speed .* {measured} ", result.stdout)
        assert (method == "moa_lora") == (metrics[0]["aux_loss"] > 0)  # type: ignore[operator]


def test_losses_equal_the_stored_curve(one_process: tuple[Path, str]) -> None:
    """A change of these numbers is a change of the method: update the file and say why."""
    golden = json.loads((Path(__file__).parents[2] / "golden" / "short_run.json").read_text())
    losses = [row["loss"] for row in rows(one_process[0] / "metrics.jsonl")]
    assert losses == pytest.approx(golden["losses"], rel=2e-3)


def test_second_run_on_one_folder_is_refused(one_process: tuple[Path, str], tmp_path: Path) -> None:
    from trainer.checkpoint.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.claim()
    result = launch(*arguments(tmp_path / "run"))
    folder.release()
    assert result.returncode == 73
    assert f"pid {os.getpid()}" in result.stderr
    assert "Traceback" not in result.stderr
