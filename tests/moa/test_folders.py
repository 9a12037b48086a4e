"""Folders that are replaced at once, on file systems that behave as network ones do."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moa.files.atomic_folder import discard, recover_folder, replaced_folder, sync


def write(folder: Path, text: str) -> None:
    with replaced_folder(folder) as temporary:
        (temporary / "file").write_text(text)


def test_a_rename_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "adapter", Path.rename
    write(folder, "old")

    def failing(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            write(folder, "new")
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_someone_reads_on_nfs_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a file that is open keeps its folder from being deleted, not from being renamed."""
    folder = tmp_path / "adapter"
    write(folder, "0")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_args, **_options: None)
        for text in "123":
            write(folder, text)
        assert len(list(tmp_path.iterdir())) > 1
    assert (folder / "file").read_text() == "3"
    write(folder, "4")
    recover_folder(folder)
    assert (folder / "file").read_text() == "4"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_may_be_named_from_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("adapter", "../beside", "./adapter/../other"):
        write(Path(name), name)
        assert (here / name / "file" if name == "adapter" else Path(name) / "file").exists()


@pytest.mark.parametrize("name", [".", "..", "below/..", "{here}"])
def test_the_current_folder_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "below").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(OSError, match="is the current folder"):
        write(Path(name.format(here=here)), "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "here"]


def test_a_process_without_a_current_folder_may_still_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    write(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter" / "file").read_text() == "new"


def test_discard_of_nothing_does_nothing(tmp_path: Path) -> None:
    discard(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "on_folder", "on_file"),
    [
        (errno.EINVAL, True, False),
        (errno.ENOSYS, True, False),
        (errno.ENOTSUP, True, False),
        (errno.ENOSPC, False, False),
    ],
    ids=lambda value: errno.errorcode.get(value, str(value)),
)
def test_what_may_fail_in_a_sync(
    number: int, on_folder: bool, on_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", failing)
    for path, passes in ((tmp_path, on_folder), (tmp_path / "file", on_file)):
        if passes:
            sync(path)
        else:
            with pytest.raises(OSError, match=os.strerror(number)):
                sync(path)
