"""Trackers beside TensorBoard, read back with the real libraries; and the trace of some steps."""

import csv
import gzip
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.util import get_core_path

import trainer.monitor.tracking
from tests.support.trainer_fixtures import ROOT, arguments, rows
from trainer.checkpoint.run_folder import RunFolder
from trainer.config import log as log_settings
from trainer.config.command_line import parse
from trainer.config.log import LogConfig
from trainer.config.optim import OptimConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.engine.leaving import leave_group
from trainer.monitor.monitor import Monitor
from trainer.monitor.tracking import Tracking, points
from trainer.train import session

SECRET = "hunter2"
PLUGIN = """
import threading

blocked = threading.Event()
made, points = [], []

class Recorder:
    def __init__(self, folder, config):
        made.append((folder, config))

    def scalars(self, step, values):
        points.extend((tag, step, value) for tag, value in values.items())
        if step == 5:
            raise ConnectionError("no route to https://user:hunter2@host/")

class Hanging(Recorder):
    def scalars(self, step, values):
        blocked.wait(60)
"""
Points = dict[tuple[str, int], float]


def offer(folder: Path) -> None:
    """Makes a package that offers a tracker, as an installed one does."""
    (folder / "recorder-1.0.dist-info").mkdir()
    (folder / "recorder-1.0.dist-info" / "METADATA").write_text("Name: recorder\nVersion: 1.0\n")
    text = "[trainer.monitor]\nrecorder = recorder:Recorder\nunused = missing:Missing\n"
    text += "hanging = recorder:Hanging\n"
    (folder / "recorder-1.0.dist-info" / "entry_points.txt").write_text(text)
    (folder / "recorder.py").write_text(PLUGIN)


class Tracked(NamedTuple):
    folder: Path
    store: Path
    status: str
    """MLflow's, of the run that was killed."""
    points: Points
    """In `scalars.csv`."""


@pytest.fixture(scope="module")
def tracked(few: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """A run that ends in its second evaluation, with two steps that no checkpoint has, and goes on.

    It goes on with a profiler.
    """
    here = tmp_path_factory.mktemp("tracked")
    offer(here)
    more = {"train__steps": "7", "train__eval_every": "3", "checkpoint__every": "2", **few}
    more["eval__mode"] = "selection"  # at the end, complete figures of a step that is long past
    more |= {"log__wandb": "team/digits", "log__mlflow": "digits", "log__plugins": "[recorder]"}
    evaluating, begun = Monitor.evaluating, []

    def killed(self: Monitor) -> None:
        begun.append(self)
        if len(begun) == 2:
            raise ValueError("killed")
        evaluating(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(sys, "argv", ["run.py", f"--data.root=https://user:{SECRET}@host"])
        patch.syspath_prepend(here)
        patch.chdir(here)
        patch.setattr(Monitor, "pages", lambda *_: None)  # pictures, which take their time
        with pytest.MonkeyPatch.context() as once:
            once.setattr(Monitor, "evaluating", killed)
            assert session.main(arguments(here / "run", **more)) == 1
        leave_group()
        assert [row["step"] for row in rows(here / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
        (run,) = store(here).search_runs([experiment(here)])
        more["train__profile"] = "4:6"
        assert session.main(arguments(here / "run", **more)) == 0
        with (here / "run" / "scalars.csv").open(newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["step", "tag", "value"]
        found = {(tag, int(step)): float(value) for step, tag, value in lines}
        assert len(found) == len(lines), "no point is there twice"
        yield Tracked(here / "run", here, run.info.status, found)


def store(here: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient((here / "mlruns").as_uri())


def experiment(here: Path) -> str:
    found = store(here).get_experiment_by_name("digits")
    assert found is not None
    return str(found.experiment_id)


def test_killed_and_resumed_is_one_run_without_a_doubled_step(tracked: Tracked) -> None:
    """TensorBoard, the file, W&B, MLflow and the plugin have the same points."""
    wanted = tracked.points
    assert steps_of("train/loss", wanted) == list(range(7))
    assert steps_of("eval/plain/out_acc", wanted) == [0, 3, 6]
    selected = {row["step"] for row in rows(tracked.folder / "results.jsonl")}
    assert set(steps_of("eval/rotated/in_acc", wanted)) == selected
    events = EventAccumulator(str(tracked.folder / "tensorboard")).Reload()
    assert {tag for tag, _ in wanted} == set(events.Tags()["scalars"]) - hparams(events)
    losses = {row["step"]: row["loss"] for row in rows(tracked.folder / "metrics.jsonl")}
    assert {step: wanted["train/loss", step] for step in losses} == losses

    ids, found, files = set(), [], sorted(tracked.folder.glob("wandb/offline-run-*/run-*.wandb"))
    for file in files:
        for record in records(file):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["project"] == "digits"
                assert record["run"]["entity"] == "team"
                config = record["run"]["config"]["update"]
                assert config["optim"]["lr"] == parse([]).optim.lr
            if record["type"] == "history":
                row = record["history"]["item"]
                names = [name for name in row if name[0] != "_" and name != "step"]
                found += [((name, row["step"]), row[name]) for name in names]
    assert len(files) == 2
    assert dict(found) == wanted
    assert len(found) == len(wanted)

    known = {k: v for row in rows(tracked.folder / "tracking.jsonl") for k, v in row.items()}
    assert ids == {known["run of log.wandb team/digits"]}
    (run,) = store(tracked.store).search_runs([experiment(tracked.store)])
    assert run.info.run_id == known["run of log.mlflow digits"]
    assert (tracked.status, run.info.status) == ("KILLED", "FINISHED")
    assert run.data.params["optim.lr"] == str(parse([]).optim.lr)
    history = [
        ((tag, metric.step), metric.value)
        for tag in {tag for tag, _ in wanted}
        for metric in store(tracked.store).get_metric_history(run.info.run_id, tag)
    ]
    assert dict(history) == wanted
    assert len(history) == len(wanted)


def steps_of(tag: str, found: Points) -> list[int]:
    return [step for name, step in found if name == tag]


def hparams(events: EventAccumulator) -> set[str]:
    """Tags that only the hparams page has."""
    return {tag for tag in events.Tags()["scalars"] if not events.Scalars(tag)}


def records(file: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in an offline run."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    told = subprocess.run([*command, file, file.parent], capture_output=True, check=True)
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_a_plugin_that_fails_is_told_of_once_and_the_run_goes_on(tracked: Tracked) -> None:
    import recorder  # type: ignore[import-not-found]

    assert [folder for folder, _ in recorder.made] == [tracked.folder] * 2
    assert recorder.made[0][1]["log"]["plugins"] == ["recorder"]
    got = Counter((tag, step) for tag, step, _ in recorder.points)
    assert {point for point in tracked.points if point[1] < 5} <= set(got)
    assert max(step for _, step in got) == 5
    assert max(got.values()) == 1
    lines = (tracked.folder / "log.txt").read_text().splitlines()
    (warning,) = (line for line in lines if "log." in line and "WARNING" in line)
    assert "log.plugins recorder: ConnectionError: no route to https://host/" in warning


def test_no_secret_is_written(tracked: Tracked) -> None:
    written = [*tracked.folder.rglob("*"), *tracked.store.rglob("mlruns/**/*")]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_trace_has_its_steps_and_the_layers_operations(tracked: Tracked) -> None:
    (trace,) = tracked.folder.glob("profile/rank-00000.*.pt.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") in ("user_annotation", "cpu_op"):
            spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {name for name in spans if "ProfilerStep" in name} == {
        "ProfilerStep#4", "ProfilerStep#5"
    }  # fmt: skip
    for label in ("forward", "backward", "update"):
        assert len(spans[label]) == 2, label
    assert len(spans["data"]) >= 2
    (start, _), (_, end) = spans["forward"][0], spans["forward"][-1]
    assert all(start <= begun <= end for begun, _ in spans["_ScaledCosine"]), "of our routers"
    assert steps_of("perf/img_s", tracked.points) == [0, 1, 2, 3, 6], "not of what is profiled"


def tracking(folder: Path, first_step: int = 0, lr: float = 0.1, **log: Any) -> Tracking:
    config = RunConfig(optim=OptimConfig(lr=lr), log=LogConfig(**log))
    folder.mkdir(exist_ok=True)
    return Tracking(config, RunFolder(folder), first_step)


def test_a_record_that_was_torn_is_mended_and_another_run_begins_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for first, end in ((0, 4), (2, 6)):
        tracker = tracking(tmp_path, first, csv=True)
        for step in range(first, end):
            tracker.scalars({"train/loss": 0.5}, step)
        tracker.close(whole=False)
        with folder.scalars.open("a") as file:
            file.write(f"\n{'x' * 200_000}\n,\n6,train/lo")
    for lr, kept in ((0.1, range(6)), (0.2, range(0))):
        tracking(tmp_path, lr=lr, csv=True).close(whole=False)
        assert [point[:3] for point in points(folder.scalars)] == [
            (step, "train/loss", 0.5) for step in kept
        ]
    assert folder.scalars.read_text() == "step,tag,value\n"


def test_what_was_not_sent_when_a_run_ended_is_sent_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the tracker is new, was left out, or had not come to it when the run was killed."""
    offer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import recorder

    recorder.points.clear()
    none = {"plugins": ("recorder",)}
    for first, end, log in ((0, 4, {"csv": True}), (4, 8, none), (8, 10, none)):
        tracker = tracking(tmp_path, first, **log)
        for step in range(first, end):
            tracker.scalars({"train/loss": 0.5, "train/ce": 0.5}, step)
        tracker.close(whole=False)  # amid the second it fails, at step 5
    for name in ("train/loss", "train/ce"):
        assert [step for tag, step, _ in recorder.points if tag == name] == list(range(10))


def test_a_tracker_that_cannot_start_or_does_not_end_leaves_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    wandb.teardown()  # it reads its environment once
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    tracker = tracking(tmp_path / "run", wandb="p", plugins=("unused", "hanging"))
    tracker.scalars({"train/loss": 0.5}, 0)
    monkeypatch.setattr(trainer.monitor.tracking, "CLOSING", 1.0)
    tracker.close(whole=True)
    import recorder

    recorder.blocked.set()
    missing, key, late = sorted(
        record.getMessage() for record in caplog.records if record.name == "trainer"
    )
    assert missing == (
        "log.plugins unused: ModuleNotFoundError: No module named 'missing'; "
        "the run goes on without it"
    )
    assert "log.wandb p: no API key is configured; wandb login, or WANDB_MODE=offline" in key
    assert late == "log: trackers did not take everything within 1 s"
    (point,) = points(tmp_path / "run" / "scalars.csv")
    assert point[:3] == (0, "train/loss", 0.5)


def test_bad_values_are_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for section, words in (
        (LogConfig(wandb=""), "log.wandb: '' is no name"),
        (LogConfig(wandb="a/b/c"), "log.wandb: 'a/b/c'; must be PROJECT or ENTITY/PROJECT"),
        (LogConfig(mlflow=" "), "log.mlflow: ' ' is no name"),
        (LogConfig(plugins=("recordr",)), "as trainer.monitor; did you mean 'recorder'?"),
        (LogConfig(plugins=("x",)), "offers 'x' as trainer.monitor; installed are hanging, reco"),
        (TrainConfig(profile="5"), "train.profile: '5'; must be START:STOP"),
        (TrainConfig(profile="5:5"), "train.profile: '5:5'; must be START:STOP"),
        (TrainConfig(profile="-1:5"), "0 <= START < STOP <= train.steps (5001)"),
        (TrainConfig(profile="a:b"), "train.profile: 'a:b'; must be START:STOP"),
        (TrainConfig(profile="0:101"), "up to 100 steps"),
        (TrainConfig(profile="4999:5002"), "<= train.steps (5001)"),
    ):
        (line,) = section.problems()
        assert words in line
    config = parse(["--train.profile=3:5", "--log.wandb=7", "--log.plugins=[recorder]"])
    assert config.train.profiled == range(3, 5)
    assert config.log == LogConfig(wandb="7", plugins=("recorder",))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_is_told_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_here = ModuleSpec(name, None)  # as Python sees a folder of that name
    monkeypatch.setattr(log_settings, "find_spec", {"wandb": folder_here}.get)
    (line,) = LogConfig(**{name: "digits"}).problems()
    remedy = f"pip install 'moa-trainer[{name}]', or leave it out"
    assert line == f"log.{name}: {name} is not installed; {remedy}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert name in extras["optional-dependencies"][name][0]
