"""A sweep runs what is missing, refuses what would mix settings, and tells what came of it."""

import io
import json
import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trainer.process.errors import ConfigError
from trainer.report.__main__ import main as report
from trainer.sweep import __main__ as sweep, processes
from trainer.sweep.processes import visible_gpus

SHORT = ["--train.steps=3", "--train.eval_every=2", "--train.batch_per_domain=2"]


def run(root: Path, *more: str, methods: str = "linear", held_out: str = "plain") -> int:
    command = ["--methods", methods, "--held-out", held_out, "--output-dir", str(root), "--"]
    return sweep.main([*command, *SHORT, *more])


def test_a_sweep_from_start_to_refusal(
    few: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = tmp_path / "table of runs", f"--data.root={few['data__root']}"
    assert run(root, data, methods="linear,lora") == 0
    printed = capsys.readouterr().out
    assert f"table: python -m trainer.report '{root}'" in printed
    first, last = re.findall(r"(\d) of 2: (\S+): ([\d.]+) %; took \d:\d\d:\d\d; (.*)", printed)
    assert (first[:2], last[:2]) == (("1", "linear-plain-0"), ("2", "lora-plain-0"))
    assert re.fullmatch(r"1 run left, about \d:\d\d:\d\d", first[3]), "as long as the first"
    assert last[3] == "0 runs left"
    for _, name, accuracy, _ in (first, last):
        assert f"held-out accuracy, plain │ {accuracy}" in " ".join(
            (root / name / "console.txt").read_text().split()
        ), "what the run itself says"
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


FAKE = """
import json, os, pathlib, signal, sys, time
flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(flags["output_dir"])
note = lambda text: (folder / "note").write_text(text)
def save(*_):
    note("asked")
    if flags["data.held_out"] != "inverted":  # that one hangs
        sys.exit(75)
if flags["data.held_out"] in ("inverted", "outline"):
    signal.signal(signal.SIGTERM, save)
    note("waits")
    while True:
        time.sleep(0.05)
(folder / "metrics.jsonl").write_text('{"step": 0, "a": 1}\\n{"step": 1, "a": 1}\\n')
time.sleep(float(flags["optim.lr"]))
row = {"step": 0, "moa/domains": ["a", "plain"], "args": {"test_envs": [1]}}
row |= {"env0_in_acc": 0.1, "env0_out_acc": 0.2, "env1_in_acc": 0.625, "env1_out_acc": 0.4}
(folder / "results.jsonl").write_text(json.dumps(row) + "\\n")
note(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + " " + flags["optim.lr"])
(folder / "done").touch()
"""
"""In the place of `trainer/run.py`: a run that takes `optim.lr` seconds, or waits for a signal."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the runs of a sweep whose runs are fakes."""
    (tmp_path / "code" / "trainer").mkdir(parents=True)
    (tmp_path / "code" / "trainer" / "run.py").write_text(FAKE)
    monkeypatch.setattr(processes, "ROOT", tmp_path / "code")
    return tmp_path / "runs"


def interrupt(*notes: tuple[Path, str], number: int = signal.SIGINT) -> threading.Thread:
    """Sends a signal each time that a run has noted what it should."""

    def watch() -> None:
        for path, text in notes:
            deadline = time.monotonic() + 30
            while not (path.is_file() and path.read_text() == text) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_runs_save_and_says_how_to_go_on(
    fake: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    thread = interrupt((fake / "linear-outline-0" / "note", "waits"), number=number)
    secret = "--data.root=https://a.b/c?key=hidden"
    command = [
        "--methods=linear", f"--output_dir={fake}", "--jobs=2", "--held_out=outline,rotated,plain"
    ]  # fmt: skip
    rest = ["--", "--optim.lr=1", "--data.cache_dir=x", secret]
    (fake / "linear-rotated-0").mkdir(parents=True)
    assert sweep.main([*command, *rest]) == 75
    thread.join()
    printed = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: 2 runs under way to save and end" in printed
    assert "linear-outline-0: stopped, and can be continued" in printed
    assert not (fake / "linear-plain-0").exists(), "begun no more"
    again = printed.splitlines()[-1].partition("; to go on: ")
    assert "hidden" not in printed
    assert shlex.split(again[2])[3:] == [*command, *rest[:-1], "--data.root=https://a.b/c?..."]


def test_a_second_ctrl_c_kills_a_run_that_hangs(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = fake / "linear-inverted-0" / "note"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an earlier test's may be there
    thread = interrupt((note, "waits"), (note, "asked"))
    assert sweep.main(["--methods=linear", f"--output_dir={fake}", "--held_out=inverted"]) == 75
    thread.join()
    printed = capsys.readouterr().out
    assert "SIGINT: 1 run under way to save and end; Ctrl-C again kills" in printed
    assert "SIGINT: killing 1 run under way" in printed
    assert "linear-inverted-0: ended by SIGKILL, see " in printed
    assert "finished 0 of 1 runs; to go on: python -m trainer.sweep --methods=linear" in printed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dry_run_shows_all_domains_and_runs_nothing(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--methods=linear,lora", f"--output_dir={fake}", "--set=lora:optim.lr=0.125"]
    assert sweep.main([*command, "--dry-run", "--hparams_seeds=0,4"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "24 runs, 0 of them finished before"
    assert not fake.exists()
    assert lines[0::2][:2] == ["missing: linear-plain-0", "missing: lora-plain-0"]
    assert lines[-2] == "missing: lora-rotated-0-h4"
    words = shlex.split(lines[-1])
    assert words[1].endswith("trainer/run.py")
    assert {"--optim.lr=0.125", "--hparams_seed=4", "--data.held_out=rotated"} <= set(words)
    assert "--optim.lr=0.125" not in lines[1]


def test_gpus_are_dealt_out_and_methods_have_their_settings(
    fake: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    command = ["--methods=linear,lora", "--held_out=plain", f"--output_dir={fake}", "--gpus=2"]
    sets = ["--set=linear:optim.lr=0.5", "--set", "lora:optim.lr=0.25"]
    assert sweep.main([*command, *sets]) == 0
    assert "lora-plain-0: 62.5 %; took 0:00:0" in capsys.readouterr().out
    assert (fake / "linear-plain-0" / "note").read_text() == "4 0.5"
    assert (fake / "lora-plain-0" / "note").read_text() == "6 0.25"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
    with pytest.raises(ConfigError, match=r"--gpus 4: 3 visible \(CUDA_VISIBLE_DEVICES is not"):
        visible_gpus(4)
    for wrong, told in {"--gpus=0": "must be 1 or more", "--jobs=3": "leave --jobs out"}.items():
        with pytest.raises(SystemExit, match="2"):
            sweep.main([*command, wrong])
        assert told in capsys.readouterr().err
    assert sweep.main([*command, "--set=lroa:optim.lr=1", "--set=lora:optim.lrr=1"]) == 2
    told = capsys.readouterr().err
    assert "--set lroa:optim.lr=1: the sweep has no such method" in told
    assert "--optim.lrr = '1': unknown setting; did you mean 'optim.lr'?" in told


def test_a_terminal_shows_a_bar_for_each_run(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(sweep, "output_console", lambda: console)
    command = ["--methods=linear", "--held_out=plain", f"--output_dir={fake}"]
    assert sweep.main([*command, "--", "--optim.lr=0.5", "--train.steps=3"]) == 0
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"linear-plain-0 \S+ 2/3 steps", shown)
    assert "1 of 1: linear-plain-0: 62.5 %" in shown
