"""Array bookkeeping: indices, runs, what is finished, and the line that fills the gaps."""

import json
import os
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from trainer.checkpoint.folder_lock import identity
from trainer.config.command_line import parse_without_data
from trainer.config.run_config import as_plain
from trainer.process.errors import ConfigError
from trainer.sweep.grid import Grid, GridRun, array_expression, progress
from trainer.sweep.slurm_array import Note, keep_note, main, progress_lines, read_note

GRID = Grid(("linear", "moa_kron"), ("art", "Real World"), (0, 1))
NOTE = Note(GRID, ("--recipe=x",))


@given(st.sets(st.integers(0, 300)))
def test_array_expression_names_exactly_these_indices(indices: set[int]) -> None:
    found: set[int] = set()
    for part in filter(None, array_expression(sorted(indices)).split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == indices


def test_array_expression_is_short() -> None:
    assert array_expression([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"


def test_every_combination_has_one_index() -> None:
    runs = GRID.runs()
    assert len({cell.name for cell in runs}) == len(runs) == 8
    assert runs[0] == GridRun("linear", "art", 0)
    assert runs[3] == GridRun("moa_kron", "Real World", 0)
    assert runs[4:] == [GridRun(c.method, c.held_out, 1) for c in runs[:4]]


def test_further_seeds_keep_the_indices() -> None:
    assert Grid(GRID.methods, GRID.held_out, (0, 1, 2)).extends(GRID)
    assert not GRID.extends(Grid(GRID.methods, GRID.held_out, (0, 1, 2)))
    assert not Grid(("lora", *GRID.methods), GRID.held_out, GRID.seeds).extends(GRID)
    one = Grid(GRID.methods, GRID.held_out, (0,))
    assert replace(one, hparams_seeds=(0, 1)).extends(one)
    assert not replace(GRID, hparams_seeds=(0, 1)).extends(GRID)


def test_progress_by_what_the_folders_hold(tmp_path: Path) -> None:
    runs = GRID.runs()
    for index in (0, 1, 2):
        (tmp_path / runs[index].name).mkdir()
    (tmp_path / runs[0].name / "done").touch()
    alive, gone = identity(), {**identity(), "pid": 2**22 + 1}
    (tmp_path / runs[1].name / "owner.json").write_text(json.dumps(alive))
    (tmp_path / runs[2].name / "owner.json").write_text(json.dumps(gone))
    assert alive["host"] == socket.gethostname()
    assert alive["pid"] == os.getpid()
    found = progress(tmp_path, runs, queued={0, 5})
    assert found == {"finished": [0], "running": [1, 5], "missing": [2, 3, 4, 6, 7]}


def test_a_folder_keeps_the_meaning_of_its_indices(tmp_path: Path) -> None:
    keep_note(tmp_path, NOTE)
    more = Note(Grid(GRID.methods, GRID.held_out, (0, 1, 2)), ("--recipe=x",))
    assert keep_note(tmp_path, more) == read_note(tmp_path) == more
    assert keep_note(tmp_path, NOTE) == more, "a larger grid stays"
    other = Note(Grid(("lora",), GRID.held_out, (0,)), ())
    with pytest.raises(ConfigError, match="only further seeds may be added"):
        keep_note(tmp_path, other)
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable"):
        read_note(tmp_path)


def test_line_to_submit_survives_a_shell(tmp_path: Path) -> None:
    line = Note(replace(GRID, trial_seed=3), ("--data.root=my shards",)).submit_line([1, 2])
    assert shlex.split(line) == [
        "sbatch", "--array=1-2", "slurm/leave_one_out.sh", "--methods=linear,moa_kron",
        "--held_out=art,Real World", "--seeds=0,1", "--trial_seed=3", "--data.root=my shards",
    ]  # fmt: skip


RECORD = (
    "JobId=81 ArrayJobId=80 ArrayTaskId=1 JobName=x Account=own QOS=(null) Requeue={} "
    "TimeLimit=1-02:00:00 Partition=gpu ReqNodeList=(null) NodeList=n1 NumNodes=2 NumTasks={} "
    "CPUs/Task=6 NtasksPerN:B:S:C=4:0:*:* MinMemoryNode=64G Features=(null) "
    "TresPerNode=gres:gpu:a100:4 MailUser=me MailType=END,FAIL ArrayTaskThrottle=4"
)


@pytest.mark.parametrize(
    ("tasks", "requeue", "size"),
    [(8, 1, ["--ntasks-per-node=4"]), (3, 0, ["--ntasks=3"])],
    ids=["by node", "in all"],
)
def test_the_line_has_the_options_of_the_array_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: int, requeue: int, size: list[str]
) -> None:
    shared = ["--recipe=pacs", "--methods=lora", f"--output_dir={tmp_path / 'pacs'}"]
    assert main([*shared, "--index=0", "--job=79"]) == 0
    (tmp_path / "pacs" / "array-jobs" / "78").touch()  # as an older release left it
    assert main([*shared, "--index=1", "--job=80", "--record", RECORD.format(requeue, tasks)]) == 0
    capsys.readouterr()
    assert main(shared) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[: words.index("slurm/leave_one_out.sh")] == [
        "sbatch", "--array=0-3%4", "--nodes=2", "--cpus-per-task=6", "--mem=64G",
        "--time=1-02:00:00", "--partition=gpu", "--account=own", "--mail-user=me",
        "--mail-type=END,FAIL", *size, "--gpus-per-node=a100:4",
        *([] if requeue else ["--no-requeue"]),
    ]  # fmt: skip


def finish(run: Path, *settings: str) -> None:
    """A run folder as a finished run leaves it, without its results."""
    config = parse_without_data(settings)
    config = replace(config, moa=config.moa.resolved())
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    (run / "done").touch()


def test_command_prints_a_run_and_the_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "pacs"
    shared = [
        "--recipe=pacs",
        "--methods=moa_lora,moa_kron",
        f"--output_dir={root}",
        "--train.steps=5",
    ]
    assert main([*shared, "--seeds=0,1", "--index=9", "--job=77"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "--recipe=pacs", "--train.steps=5", "--moa.method=moa_kron", "--data.held_out=art_painting",
        "--train.seed=1", "--train.trial_seed=1", "--hparams_seed=0",
        f"--output_dir={root}/moa_kron-art_painting-1",
    ]  # fmt: skip
    assert (root / "array-jobs" / "77").is_file()
    finish(root / "moa_lora-sketch-0", "--recipe=pacs", "--moa.method=moa_lora",
           "--data.held_out=sketch", "--train.steps=5")  # fmt: skip
    assert main([*shared, "--seeds=0,1"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{root}: 16 runs, 1 finished, 0 running or queued, 15 missing"
    assert shlex.split(last)[:3] == ["sbatch", "--array=0-5,7-15", "slurm/leave_one_out.sh"]
    # What the line says describes the same grid again.
    assert main([*shlex.split(last)[3:], "--index=9"]) == 0


def test_new_settings_count_unless_a_run_was_made_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "pacs"
    shared = ["--recipe=pacs", "--methods=linear", f"--output_dir={root}"]
    assert main([*shared, "--seeds=0,1"]) == 0
    capsys.readouterr()
    assert main([*shared, "--data.root=elsewhere", "--train.steps=5"]) == 0, "fewer seeds"
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert {"--seeds=0,1", "--data.root=elsewhere", "--train.steps=5"} <= set(line)
    finish(root / "linear-photo-1", "--recipe=pacs", "--moa.method=linear", "--train.seed=1",
           "--data.held_out=photo", "--train.trial_seed=1", "--train.steps=5")  # fmt: skip
    assert main([*shared, "--seeds=0,1", "--data.root=moved", "--train.steps=5"]) == 0
    capsys.readouterr()
    for changed in (["--optim.lr=0.5"], ["--optim.lr=0.5", "--index=3"]):
        assert main([*shared, "--seeds=0,1", "--train.steps=5", *changed]) == 2
        error = capsys.readouterr().err
        assert (
            f"optim.lr: the finished run in {root / 'linear-photo-1'} has 5e-05, now 0.5" in error
        )
    assert "--data.root=moved" in read_note(root).arguments, "as it was before"


def test_lists_that_are_not_given_come_from_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--moa.method=lora", "--train.seed=4", "--held_out=photo"]
    assert main(["--recipe=pacs", *given, f"--output_dir={tmp_path / 'pacs'}"]) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert {"--array=0", "--methods=lora", "--seeds=4", "--held_out=photo"} <= set(line)
    assert main([*line[3:], "--index=0"]) == 0, "the printed line stands for itself"


def test_one_split_for_all_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--recipe=pacs", "--methods=lora", "--seeds=1,2", f"--output_dir={tmp_path / 'pacs'}"]
    assert main([*shared, "--trial-seed=0", "--index=7"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert {"--train.seed=2", "--train.trial_seed=0"} <= set(words)
    assert main(shared) == 2
    assert "[1, 2] with trial seed 0, not" in capsys.readouterr().err


def test_drawn_settings_and_those_of_a_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "pacs"
    sets = ["--set=lora:optim.lr=0.25", "--set", "lora:model.backbone=https://a.b/c?key=secret"]
    shared = ["--recipe=pacs", "--methods=lora,linear", "--seeds=1-2", f"--output_dir={root}"]
    assert main([*shared, "--held_out=photo", "--hparams_seeds=0-2", *sets, "--index=10"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert {"--train.seed=2", "--hparams_seed=2", "--optim.lr=0.25"} <= set(words)
    assert words[-1] == f"--output_dir={root}/lora-photo-2-h2"
    config = parse_without_data(words)
    assert (config.optim.lr, config.hparams_seed) == (0.25, 2), "given, so not drawn"
    assert "secret" not in (root / "grid.json").read_text()
    assert main([*shared, "--held_out=photo", "--hparams-seeds=0-2", *sets, "--index=11"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert "--optim.lr=0.25" not in words
    assert main([*shared, "--held_out=photo", "--hparams_seeds=0-2", *sets[:1]]) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert {"--array=0-11", "--hparams_seeds=0-2", "--set=lora:optim.lr=0.25"} <= set(line)
    assert main([*line[3:], "--index=3"]) == 0, "the printed line stands for itself"
    assert "--hparams_seed=1" in capsys.readouterr().out.splitlines()
    old = json.loads((root / "grid.json").read_text())
    del old["grid"]["hparams_seeds"]  # as an older release wrote it
    (root / "grid.json").write_text(json.dumps(old))
    assert read_note(root).grid.hparams_seeds == (0,)
    assert main([*shared, "--held_out=photo", "--hparams_seeds=0-2"]) == 2
    assert "not [lora, linear] x [photo] x [1, 2] with hparams seeds 0-2" in capsys.readouterr().err


def test_many_tasks_of_an_array_start_at_once(tmp_path: Path) -> None:
    """All note the grid in the same folder; every reader meets a whole note."""
    for attempt in range(5):
        root = tmp_path / str(attempt)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda _, root=root: keep_note(root, NOTE), range(64)))
        assert set(found) == {NOTE}
        assert [path.name for path in root.iterdir()] == ["grid.json"]


def test_pairs_come_after_the_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--recipe=pacs", "--methods=lora", "--pairs", f"--output_dir={tmp_path / 'pacs'}"]
    assert main(shared) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "10 runs, 0 finished" in first
    assert main([*shlex.split(last)[3:], "--index=9"]) == 0
    assert "--data.held_out=photo+sketch" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--index=4"], "array index 4: the grid has 4 runs; submit with --array=0-3"),
        (["--held_out=photos"], "--held_out: no domain 'photos'; legal are art_painting, cartoon"),
        (["--held-out=photo+photos"], "--held_out: no domain 'photos'; legal are art_painting"),
        (["--seeds=a"], "--seeds: 'a': legal are whole numbers"),
        (["--hparams_seeds=3-1"], "--hparams_seeds: '3-1': legal are whole numbers >= 0, and ran"),
        (["--hparams_seeds=0-999999999"], "'0-999999999': legal are"),
        (["--hparams_seed=3", "--hparams_seeds=3,4"], "give it as --hparams_seeds"),
        (["--set=lora"], "--set: 'lora': must be METHOD:SETTING=VALUE, such as lora:optim.lr"),
        (
            ["--set=loar:optim.lr=1", "--methods=lora"],
            "--set loar:optim.lr=1: the sweep has no such "
            "method; legal are lora; did you mean 'lora'?",
        ),
        (
            ["--set=lora:optim.lrr=1", "--methods=lora"],
            "--optim.lrr = '1': unknown setting; did you",
        ),
        (["--set=lora:optim.lr=x", "--methods=lora"], "--optim.lr = 'x': legal is a number"),
        (["--set=lora:train.seed=1", "--methods=lora"], "--train.seed: cannot be the same for ev"),
        (["--methods=moa_cron"], "did you mean 'moa_kron'?"),
        (
            ["--train.trial_seed=0"],
            "--train.trial_seed: cannot be the same for every run; give it as --trial_seed",
        ),
        (["--moa.method=lora", "--methods=lora,linear"], "give it as --methods"),
        (["--train.seed=1", "--seeds=1,2"], "give it as --seeds"),
        (["--data.held_out=photo"], "give it as --held_out"),
        (["--train.stepz=3"], "unknown setting; did you mean 'train.steps'?"),
        (["--recipe=nothing"], "no file or recipe 'nothing'"),
    ],
)
def test_command_refuses(
    wrong: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe=pacs", f"--output_dir={tmp_path / 'new'}", *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_report_tells_what_is_missing(tmp_path: Path) -> None:
    keep_note(tmp_path, NOTE)
    assert progress_lines([tmp_path / "none", tmp_path])[0].endswith("8 missing")
    (tmp_path / "grid.json").write_text("[]")
    assert "not readable" in progress_lines([tmp_path])[0]
