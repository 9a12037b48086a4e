"""Real runs killed with SIGKILL, continued and extended, against one that nobody disturbed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import warm
from tests.support.shards_fixtures import folder_bytes
from tests.support.trainer_fixtures import (
    ROOT,
    arguments,
    environment,
    kill_after_step,
    launch,
    rows,
)
from trainer.checkpoint.run_folder import SPEED
from trainer.export.__main__ import main as export

SECRET = "S3CRT0KEN"


def results(folder: Path) -> list[dict[str, Any]]:
    """The rows of evaluations without what is measured by the clock, and the folder's name."""
    found: list[dict[str, Any]] = rows(folder / "results.jsonl")
    for row in found:
        assert row.pop(SPEED, 1) > 0, "a row that could not measure it has none"
        del row["args"]["output_dir"]
    return found


def test_killed_continued_and_extended_runs_equal_an_undisturbed_one(
    few: dict[str, str], tmp_path: Path
) -> None:
    """Checkpoints every 4 steps in the background, evaluations after 0, 6 and the last step, 10.

    One start is killed, the next finishes the 11 steps, the last one goes on to 13.
    """
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert launch(*arguments(whole, **few)).returncode == 0
    short = arguments(output, **few, train__steps="11", checkpoint__background="true")
    # After step 9 the save of step 8 may be under way, and so that of step 4 must be complete.
    kill_after_step(short, 9)
    stray = output / "checkpoints" / "step-00000099.tmp"
    stray.mkdir(parents=True)
    result = launch(*short)
    assert result.returncode == 0, result.stderr
    assert re.search(r"resumed after step [37] .*steps to repeat: [2-7]\n", result.stdout)
    assert f"removed {stray}" in result.stdout
    assert not stray.exists()
    assert [row["step"] for row in results(output)] == [0, 6, 10]
    state = json.loads((output / "checkpoints" / "step-00000011" / "state.json").read_text())
    assert state["step"] == 11
    assert {"world_size", "ep_size", "zero_stage", "config_sha256", "seeds", "best"} <= set(state)

    result = launch(*arguments(output, **few))
    assert result.returncode == 0, result.stderr
    assert "resumed after step 10" in result.stdout
    assert (output / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert results(output) == results(whole)
    for adapter in ("adapter", "adapter-last"):
        for file in (whole / adapter).iterdir():
            texts = [
                (folder / adapter / file.name).read_text("latin-1") for folder in (whole, output)
            ]
            for number, folder in enumerate((whole, output)):  # in the command, and so in its hash
                text = texts[number].replace(str(folder), "run")
                texts[number] = re.sub('"adapter_config.json": "[0-9a-f]{64}"', "", text)
            assert texts[0] == texts[1], file
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(13))
    for name in ("step-00000012", "step-00000013"):
        for file in ("optimizer.safetensors", "adapter_model.safetensors"):
            path = Path("checkpoints") / name / file
            assert (output / path).read_bytes() == (whole / path).read_bytes()


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """Whenever it comes: all checkpoints verify, and no more steps are lost than lie between two.

    The worker also holds every run that got to its end against one that nobody disturbed.
    """
    worker = str(ROOT / "tests" / "support" / "killed_worker.py")
    result = warm.run(worker, str(tmp_path), "20", env=environment(), timeout=500)
    assert result.returncode == 0, result.stderr
    kills = json.loads((tmp_path / "outcome.json").read_text())
    assert len(kills) == 20
    every, resumed = 2, 0
    for kill in kills:
        # A save in the background may be under way while the next steps are done.
        assert 0 <= kill["recorded"] - kill["saved"] <= every * (2 if kill["background"] else 1)
        before = kill["before"][1]
        assert kill["saved"] >= before, "never back to an older checkpoint"
        found = re.search(r"resumed after step (\d+) from", kill["log"])
        assert found is None or int(found[1]) == before - 1, kill
        assert "damaged" not in kill["log"]
        resumed += found is not None
    assert resumed >= 3
    assert sum(kill["recorded"] > kill["before"][0] for kill in kills) >= 8
    assert {kill["background"] for kill in kills} == {False, True}


def test_an_allowed_change_is_kept_on_record_and_no_secret(
    few: dict[str, str], tmp_path: Path
) -> None:
    """What was selected before the change is set aside; the root's token stands in no file."""
    output = tmp_path / "run"
    root = f"pipe:TOKEN={SECRET} cat {few['data__root']}/{{}} #-H 'Authorization: {SECRET}'"
    one = {"data__root": root, "data__cache_dir": str(tmp_path / "cache")}
    one |= {"moa__method": "linear", "train__steps": "1", "optim__lr": "0.1"}
    assert launch(*arguments(output, **one)).returncode == 0
    selected = folder_bytes(output / "adapter")
    more = one | {"train__steps": "2", "optim__lr": "0.2"}
    result = launch(*arguments(output, **more), "--checkpoint.allow_changes=[optim.lr]")
    assert result.returncode == 0, result.stderr
    assert "optim.lr: 0.1 -> 0.2, as --checkpoint.allow_changes says" in result.stdout
    assert [row["lr"] for row in rows(output / "metrics.jsonl")] == [0.1, 0.2]
    change = {"step": 1, "setting": "optim.lr", "old": 0.1, "new": 0.2}
    environment = json.loads((output / "environment.json").read_text())
    state = json.loads((output / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert environment["changes_on_resume"] == state["changes"] == [change]
    assert state["config"]["optim.lr"] == pytest.approx(0.2)
    before = output / "before-step-1"
    assert f"selected anew; what was before is kept in {before}" in (output / "log.txt").read_text()
    assert folder_bytes(before / "adapter") == selected
    assert [row["step"] for row in rows(before / "results.jsonl")] == [0]
    assert [row["step"] for row in rows(output / "results.jsonl")] == [0, 1], "evaluated anew"
    files = [path for path in output.rglob("*") if path.is_file()]
    assert any("events" in path.name for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "pipe:TOKEN=... cat" in (output / "config.yaml").read_text()
    assert export(["--adapter", str(output / "adapter"), "--push", "a/b"]) == 2
