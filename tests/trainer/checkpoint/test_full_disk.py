"""Checkpoints on a disk that fills up: the older ones stay, one line tells, no rest is left."""

import errno
import os
import resource
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa.files.atomic_folder import replaced_folder
from moa.files.saving import write_adapter
from tests.support.checkpoint_fixtures import (
    INFO,
    SIZE,
    fresh_copy,
    in_child,
    tag_of,
    tensors,
    two_checkpoints,
    write,
)
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.checkpoint import clean_up, load, load_newest
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.command_line import parse
from trainer.monitor.curves import Curves
from trainer.process.ending import conclude
from trainer.process.errors import OutputError, exit_code
from trainer.process.world import World


def full_disk(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> list[str]:
    """From the call with that number on, writes leave half and fail; returns the calls made."""
    calls: list[str] = []
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync = os.fsync

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, content: Any, *args: Any, **options: Any) -> Any:
            calls.append(f"write {path.name}")
            if len(calls) > fails_at:
                real(path, content[: len(content) // 2], *args, **options)
                raise error
            return real(path, content, *args, **options)

        return call

    def failing_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if len(calls) > fails_at:
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, wrap(getattr(Path, name)))
    return calls


def test_full_disk_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = two_checkpoints(tmp_path / "two")
    root = fresh_copy(two, tmp_path / "root")
    with monkeypatch.context() as patch:
        calls = full_disk(patch, fails_at=10**6)
        write(root, 3, tag=3)
    placed = calls.index("fsync root")
    assert len(calls) > 20
    assert calls[placed - 1] == "fsync step-00000003.tmp"
    for number in range(len(calls)):
        fresh_copy(two, root)
        with monkeypatch.context() as patch:
            full_disk(patch, number)
            with pytest.raises(OutputError) as caught:
                write(root, 3, tag=3)
        assert exit_code(caught.value) == 73
        lines = str(caught.value).splitlines()
        assert len(lines) == 1
        for word in ("No space left", "step-00000003", "step-00000002 is kept", "free space"):
            assert word in lines[0]
        assert not list(root.glob("*.tmp/")), calls[number]
        assert tag_of(load(root / "step-00000002")) == 2
        clean_up(root)
        left = {path.name for path in root.iterdir()}
        expected = {"step-00000001", "step-00000002", "latest"}
        assert left == expected | ({"step-00000003"} if number >= placed else set())
        found = load_newest(root)
        assert found is not None
        assert tag_of(found) == found.state["step"] == (3 if number >= placed else 2)
        write(root, 3, tag=3)


def test_what_a_run_writes_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.metrics.symlink_to("/dev/full")  # the device that always is
    curves = Curves(parse([]), folder.tensorboard, 0, [])
    text = folder.path / "config.yaml"

    worker = curves.writer._get_file_writer().event_writer._async_writer._worker

    def point() -> None:
        worker.exception = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of its thread
        curves.scalars({"loss": 1.0}, 0)

    def adapter() -> None:
        with replaced_folder(folder.adapter) as temporary:
            write_adapter(temporary, tensors(1), INFO)

    actions: dict[Path, Callable[[], object]] = {
        folder.tensorboard: point,
        folder.metrics: lambda: folder.append(folder.metrics, {"step": 0}),
        text: lambda: replace_text(text, "text"),
        folder.adapter: adapter,
    }
    for path, action in actions.items():
        with monkeypatch.context() as patch:
            full_disk(patch, fails_at=0)
            assert conclude(action, World(0, 1, 0, 1)) == 73
        told = capsys.readouterr().err
        assert "cannot write" in told
        assert f"No space left on device: '{path}'" in told
    worker.exception = None
    curves.writer.close()


def test_full_file_system(tmp_path: Path) -> None:
    """A real one where it may be mounted, else a limit of the kernel on the size of files."""
    root, options = tmp_path / "disk", "size=64k"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False

    def fill() -> None:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OutputError, match=r"cannot write .*is kept; free space"):
            deque(write(root, step, tag=step, keep=20) for step in range(2, 20))

    try:
        if not mounted:
            assert SIZE * 8 < 3000 < SIZE * 4 * 4, "one file fits the limit, another does not"
        write(root, 1, tag=1, keep=20)
        assert in_child(fill) == 0
        assert not list(root.glob("*.tmp/"))
        found = load_newest(root)
        assert found is not None
        assert tag_of(found) == found.state["step"]
        assert tag_of(load(root / "step-00000001")) == 1
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(root)], check=True)
