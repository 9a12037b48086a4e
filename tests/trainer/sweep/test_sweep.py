"""A sweep runs what is missing, refuses what would mix settings, and tells what failed."""

import json
from pathlib import Path
from typing import IO

import pytest

from tests.support.warm import Started
from trainer.report.__main__ import main as report
from trainer.sweep import __main__ as sweep

SHORT = ["--train.steps=3", "--train.eval_every=2", "--train.batch_per_domain=2"]


@pytest.fixture(autouse=True)
def warm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin as forks; the sweep of docs/reports.md has interpreters of their own."""

    def call(command: list[str], stdout: IO[str], stderr: IO[str], env: dict[str, str]) -> int:
        files = (Path(file.name) for file in (stdout, stderr))
        return Started(tuple(command[1:]), *files, env).wait(400)

    monkeypatch.setattr("subprocess.call", call)


def run(root: Path, *more: str, methods: str = "linear", held_out: str = "plain") -> int:
    command = ["--methods", methods, "--held-out", held_out, "--output-dir", str(root), "--"]
    return sweep.main([*command, *SHORT, *more])


def test_a_sweep_from_start_to_refusal(
    few: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = tmp_path / "table of runs", f"--data.root={few['data__root']}"
    assert run(root, data, methods="linear,lora") == 0
    assert f"table: python -m trainer.report '{root}'" in capsys.readouterr().out
    before = (root / "lora-plain-0" / "metrics.jsonl").stat().st_mtime_ns
    assert run(root, data, methods="linear,lora") == 0
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out
    assert (root / "lora-plain-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert run(root, data, "--optim.lr=0.5", "--train.steps=4") == 2
    error = capsys.readouterr().err
    finished = f"the finished run in {root / 'linear-plain-0'} has"
    for name, old, new in (("optim.lr", 0.002, 0.5), ("train.steps", 3, 4)):
        assert f"{name}: {finished} {old}, now {new}" in error
    assert "another --output_dir" in error
    assert report([str(root), "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]["training_domain_validation"]
    assert len(found) == 2


def test_mistakes_are_found_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tmp_path, "--train.stepz=1", methods="linear,linearr", held_out="plane,plain")
    assert code == 2
    error = capsys.readouterr().err
    assert "did you mean 'linear'?" in error
    assert "did you mean 'train.steps'?" in error
    assert run(tmp_path, held_out="plane,plain+outlines") == 2
    error = capsys.readouterr().err
    for name in ("plane", "outlines"):
        assert f"--held_out: no domain {name!r}; legal are plain, inverted" in error
    own = ["--data.held_out=inverted", "--train.seed=5", f"--output_dir={tmp_path}"]
    assert run(tmp_path, *own) == 2
    error = capsys.readouterr().err
    for name in ("data.held_out", "train.seed", "output_dir"):
        assert f"--{name}: cannot be the same for every run" in error
    assert "give it as --seeds" in error
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, methods=",")
    assert "--methods: names nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_without_settings_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "linear-plain-0").mkdir()
    (tmp_path / "linear-plain-0" / "done").touch()
    assert run(tmp_path) == 2
    assert "holds a finished run without its config.yaml" in capsys.readouterr().err


def test_what_a_failed_run_said_is_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tmp_path, "--data.dataset=folder", f"--data.root={tmp_path / 'nowhere'}")
    assert code == 1
    printed = capsys.readouterr().out
    assert f"exit code 2, see {tmp_path / 'linear-plain-0' / 'console.txt'}: error: " in printed
    assert "nowhere" in printed
    assert report([str(tmp_path)]) != 0
    assert f"{tmp_path / 'linear-plain-0'}: no run; see " in capsys.readouterr().err
