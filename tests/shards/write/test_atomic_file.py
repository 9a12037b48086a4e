import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from shards.write.atomic_file import replaced_when_whole


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyError), replaced_when_whole(path) as stream:
        stream.write(b"half of the n")
        raise KeyError
    assert path.read_bytes() == b"old"
    with replaced_when_whole(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_content_and_name_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def note(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", note)
    with replaced_when_whole(tmp_path / "file") as stream:
        stream.write(b"new")
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "ENOSYS", "EIO"])
def test_file_systems_that_cannot_sync_folders(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, "fsync", refuse)
    if code == "EIO":
        with pytest.raises(OSError, match=code), replaced_when_whole(tmp_path / "file"):
            pass
    else:
        with replaced_when_whole(tmp_path / "file"):
            pass
        assert (tmp_path / "file").exists()
