import errno
import os
import stat
from pathlib import Path

import pytest

from shards.durable import replaced_when_whole


def test_a_file_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.npy"
    path.write_bytes(b"old")
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if folder else "file", path.read_bytes()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with replaced_when_whole(path) as stream:
        stream.write(b"new")
    assert synced == [("file", b"old"), ("folder", b"new")]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replaced_when_whole(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"), replaced_when_whole(tmp_path / "a"):
            pass
    else:
        with replaced_when_whole(tmp_path / "a") as stream:
            stream.write(b"content")
        assert (tmp_path / "a").read_bytes() == b"content"
