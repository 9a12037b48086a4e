"""Who may write into a run folder and when: the lock, background saves, changed settings."""

import errno
import json
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import Future, wait as wait_for
from pathlib import Path
from typing import Any

import pytest
import timm

from moa import adapter_state_dict, inject
from trainer.checkpoint import folder_lock
from trainer.checkpoint.folder_lock import identity, is_alive
from trainer.checkpoint.run_folder import RunFolder, read_rows
from trainer.checkpoint.save_queue import SaveQueue
from trainer.config.command_line import parse
from trainer.config.resume_rules import FIXED, FREE, LEAKING
from trainer.config.run_config import RunConfig, flat
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError, OutputError, exit_code
from trainer.process.world import ALONE
from trainer.train.resume import check_agreement


def held_by_a_child(folder: Path, with_worker: bool = False) -> int:
    """Pid of a child that holds the folder; its own child, if any, ends after it."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        RunFolder(folder).claim()
        if with_worker:
            alive, keep = os.pipe()
            if os.fork() == 0:
                os.close(keep)
                os.read(alive, 1)  # until its parent, which holds the other end, is gone
                os._exit(0)
        os.write(tell, b"x")
        signal.pause()
        os._exit(0)
    os.close(tell)
    assert os.read(told, 1) == b"x"
    os.close(told)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_run_is_refused_and_a_dead_one_leaves_no_lock(tmp_path: Path) -> None:
    child = held_by_a_child(tmp_path / "run")
    with pytest.raises(OutputError) as caught:
        RunFolder(tmp_path / "run").claim()
    assert exit_code(caught.value) == 73
    for word in (socket.gethostname(), f"pid {child} since 20", "--output_dir"):
        assert word in str(caught.value)
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["pid"] == child
    kill(child)
    with RunFolder(tmp_path / "run").claimed():
        assert json.loads((tmp_path / "run" / "owner.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "owner.json").exists()


def test_loader_processes_of_a_dead_run_are_waited_for(tmp_path: Path) -> None:
    kill(held_by_a_child(tmp_path / "run", with_worker=True))
    with RunFolder(tmp_path / "run").claimed():
        pass


class LyingLock:
    """A lock on a file system that grants it to everyone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def acquire(self, timeout: float) -> None:
        pass

    def release(self) -> None:
        pass


def note(folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "owner.json").write_text(json.dumps(identity() | changes))


def test_where_the_lock_holds_nobody_off_the_note_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = held_by_a_child(tmp_path / "run")
    monkeypatch.setattr(folder_lock, "FileLock", LyingLock)
    with pytest.raises(OutputError, match=f"pid {child} since"):
        RunFolder(tmp_path / "run").claim()
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["pid"] == child
    kill(child)
    with RunFolder(tmp_path / "run").claimed():
        pass


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"started": 1}, False),  # the number was given to another process since
        ({"boot": "before"}, False),
        ({"boot": None}, None),
        ({"namespace": "pid:[1]"}, None),
        ({"host": "elsewhere"}, None),
    ],
    ids=str,
)
def test_what_the_note_can_tell(
    changes: dict[str, Any], alive: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_alive(identity() | changes) is alive
    note(tmp_path / "run", **changes)
    if alive:
        with pytest.raises(OutputError):
            RunFolder(tmp_path / "run").claim()
        return
    with RunFolder(tmp_path / "run").claimed():
        assert is_alive(json.loads((tmp_path / "run" / "owner.json").read_text()))
    assert ("elsewhere" in caplog.text) == ("host" in changes)


def test_an_unreadable_note_stops_nobody(tmp_path: Path) -> None:
    for content in ("", "[1]", "{", "{}"):
        (tmp_path / "owner.json").write_text(content)
        with RunFolder(tmp_path).claimed():
            pass
    assert is_alive({}) is None


class NoLock(LyingLock):
    """A lock on a file system that has none, such as NFS without its lock daemon."""

    def acquire(self, timeout: float) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_no_obstacle_but_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder_lock, "FileLock", NoLock)
    with RunFolder(tmp_path / "run").claimed():
        assert "file system without locks (No locks available)" in caplog.text
        with pytest.raises(OutputError, match=f"in use by .* pid {os.getpid()}"):
            RunFolder(tmp_path / "run").claim()


def test_a_folder_removed_or_taken_under_a_run_ends_it(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.claim()
    first.append(first.metrics, {"step": 0})
    shutil.rmtree(first.path)
    with pytest.raises(OutputError, match="was removed while this run went on") as caught:
        first.append(first.metrics, {"step": 1})
    assert exit_code(caught.value) == 73
    child = held_by_a_child(first.path)
    for write in (lambda: first.append(first.metrics, {"step": 1}), first.sync_rows):
        with pytest.raises(OutputError, match=f"taken over by .* pid {child} since"):
            write()
    first.release()
    assert not first.metrics.exists()
    assert json.loads((first.path / "owner.json").read_text())["pid"] == child
    kill(child)


def test_rows_are_with_the_system_at_once_and_follow_a_file_that_was_replaced(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    with folder.claimed():
        for step in range(2):
            folder.append(folder.metrics, {"step": step})
            assert read_rows(folder.metrics)[-1] == {"step": step}
        folder.metrics.rename(tmp_path / "aside")
        folder.sync_rows()
        folder.append(folder.metrics, {"step": 2})
        assert read_rows(folder.metrics) == [{"step": 2}]


def test_a_row_that_finds_a_full_disk_ends_with_73(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)

    def write() -> None:
        with folder.claimed():
            folder.append(Path("/dev/full"), {"step": 0})

    assert conclude(write, ALONE) == 73
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line


def test_a_last_line_of_garbage_is_a_torn_one(tmp_path: Path) -> None:
    for tail in (b'{"step": 2', b"\0\0\0", b"\xff\xfe\x00{", b'{"step": 1}\n\xc3'):
        (tmp_path / "rows").write_bytes(b'{"step": 0}\n{"step": 1}\n' + tail)
        assert [row["step"] for row in read_rows(tmp_path / "rows", torn=True)][:2] == [0, 1]


def finished(saves: SaveQueue) -> None:
    """Waits until the save under way has ended, without taking note of it."""
    assert isinstance(saves._pending, Future)
    wait_for([saves._pending])


def test_background_saves_run_one_after_another_in_order() -> None:
    gate, done = threading.Event(), list[int]()

    def save(number: int, wait: bool) -> None:
        if wait:
            assert gate.wait(60)
        done.append(number)

    with SaveQueue(background=True) as saves:
        saves.put(lambda: save(0, wait=True))
        assert done == [], "put came back while the save was held up"
        saves.check()
        second = threading.Thread(target=lambda: saves.put(lambda: save(1, wait=False)))
        second.start()
        assert done == []
        gate.set()
        second.join(60)
        saves.put(lambda: save(2, wait=False))
    assert done == [0, 1, 2]


def fail() -> None:
    raise OutputError("checkpoint: cannot write")


def test_background_errors_surface_on_the_main_thread() -> None:
    with SaveQueue(background=True) as saves:
        saves.put(fail)
        finished(saves)
        with pytest.raises(OutputError, match="cannot write"):
            saves.check()
        saves.check()  # told once
        saves.put(fail)
        with pytest.raises(OutputError):
            saves.put(lambda: None)
    with pytest.raises(OutputError), SaveQueue(background=True) as saves:
        saves.put(fail)
    with pytest.raises(OutputError), SaveQueue(background=False) as saves:
        saves.put(fail)


def test_an_error_of_training_is_not_hidden_by_one_of_saving(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saves = SaveQueue(background=True)
    saves.put(fail)
    with pytest.raises(KeyError), saves:
        raise KeyError
    assert "cannot write" in caplog.text


# One other legal value per setting that must not change on resume, where one is easily named.
CHANGED = {
    "optim.lr": "0.5", "optim.name": "adamw", "optim.clip": "3", "optim.eps": "1e-3",
    "optim.weight_decay": "0.1", "train.seed": "9", "train.trial_seed": "9",
    "train.batch_per_domain": "3", "train.eval_every": "3", "train.accumulation": "2",
    "train.precision": "bf16", "data.held_out": "plain", "data.holdout_fraction": "0.3",
    "data.max_pixels": "9",
    "model.backbone": "vit_tiny", "model.head": "cosine", "moa.method": "moa_lora",
    "moa.ranks": "[1, 2]", "moa.aux_weight": "0.5",
    "moa.gate_noise": "0.5", "moa.top_k": "2", "moa.shared_rank": "2",
    "moa.router": "linear", "moa.router_dim": "8", "moa.balance": "bias", "moa.balance_rate": "0.1",
    "moa.kron_dim": "8", "moa.kron_impl": "dense", "moa.expert_dropout": "0.5",
    "moa.targets": "[mlp.fc1]", "moa.blocks": "all", "eval.mode": "selection",
}  # fmt: skip
DATA = {"sources": [["plain", 3]], "seed": 0, "batch_per_domain": 4, "index_sha256": "a"}


def state(*argv: str, **data: Any) -> dict[str, Any]:
    return {"config": flat(parse(argv)), "data": DATA | data}


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_each_change_is_refused_with_old_and_new_value_unless_allowed(
    name: str, tmp_path: Path
) -> None:
    old, new = state(), state(f"--{name}={CHANGED[name]}")
    values = [repr(each["config"][name]) for each in (old, new)]
    assert values[0] != values[1]
    with pytest.raises(ConfigError) as caught:
        check_agreement(old, new, tmp_path)
    for word in (name, *values, "--output_dir"):
        assert word in str(caught.value)
    offered = f"--checkpoint.allow_changes='[{name}]'" in str(caught.value)
    assert offered == (name not in LEAKING and name not in FIXED), "only a way that can be gone"
    changes = check_agreement(old, new, tmp_path, allowed=(name,))
    assert [tuple(map(repr, (c["old"], c["new"]))) for c in changes] == [tuple(values)]


@pytest.mark.parametrize("name", sorted(n for n in CHANGED if n.startswith("moa.")))
def test_what_cannot_change_is_what_the_checkpoint_would_not_fit(name: str) -> None:
    """Every setting of the adapters that is not free: no other list of them can be forgotten."""
    adapters = {n for n in flat(RunConfig()) if n.startswith("moa.") and n not in FREE}
    assert adapters <= CHANGED.keys()
    places = []
    for changes in ((), (f"--{name}={CHANGED[name]}",)):
        model = timm.create_model("vit_embedded")
        inject(model, parse(changes).moa)
        places.append({n: t.shape for n, t in adapter_state_dict(model).items()})
    assert (places[0] != places[1]) == (name in FIXED)
    allow = f"--checkpoint.allow_changes=[{name}]"
    if name not in FIXED:
        assert parse([allow])
    else:
        with pytest.raises(ConfigError, match=f"'{name}' cannot change within a run.*not fit"):
            parse([allow])


def test_what_an_allowed_change_decides_may_change_with_it(tmp_path: Path) -> None:
    seed = state("--train.seed=9", seed=9)
    assert check_agreement(state(), seed, tmp_path, ("train.seed",))
    domain = state("--data.held_out=plain", sources=[["inverted", 3]])
    assert check_agreement(state(), domain, tmp_path, ("data.held_out",))
    other = state("--train.seed=9", seed=9, index_sha256="b" * 64)
    with pytest.raises(ConfigError, match=r"index_sha256.* 'a', now 'bbbbbbbbbbbb'; .*\[data\]"):
        check_agreement(state(), other, tmp_path, ("train.seed",))
    changes = check_agreement(state(), other, tmp_path, ("train.seed", "data"))
    assert {"setting": "data (index_sha256)", "old": "a", "new": "b" * 64} in changes
    assert check_agreement(state(), state(), tmp_path, ("train.seed", "data")) == []


def test_a_setting_that_an_earlier_release_did_not_have_counts_as_its_default(
    tmp_path: Path,
) -> None:
    old = state()
    del old["config"]["optim.clip"]
    assert check_agreement(old, state(), tmp_path) == []
    with pytest.raises(ConfigError, match=r"optim.clip: the run in .* has 0\.0, now 3\.0"):
        check_agreement(old, state("--optim.clip=3"), tmp_path)


def test_allowing_what_is_no_setting_is_an_error() -> None:
    assert parse(["--checkpoint.allow_changes=[optim.lr, data]"]).checkpoint.allow_changes
    with pytest.raises(ConfigError, match=r"'optim\.rl' is no setting; did you mean 'optim\.lr'"):
        parse(["--checkpoint.allow_changes=[optim.rl]"])
    assert "checkpoint.background" in flat(parse([]))


def test_the_closing_evaluation_is_cut_back_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(10):
        folder.append(folder.metrics, {"step": step})
    for step in (0, 6, 9):
        folder.append(folder.results, {"step": step})
    folder.cut_back(10, 9)
    assert [row["step"] for row in read_rows(folder.metrics)] == list(range(10))
    assert [row["step"] for row in read_rows(folder.results)] == [0, 6]
