"""Folders that a crash leaves either old or new, never half written."""

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""What a file system answers that knows no waiting for a folder."""


@contextmanager
def with_path(path: Path | str) -> Iterator[None]:
    """Within it, an error of writing tells the path; a full disk's own knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which takes the place of `folder` when all went well.

    Files are synced before the rename, and the rename before this returns, so `folder` is at no
    time half written. An error leaves it as it was, and nothing beside it. A kill may leave the new
    one half written or the old one aside; `recover_folder` cleans up.

    Raises `OSError`: `folder` cannot be written, or is where this process works.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name that could be given an ending
    if holds_current(folder):
        raise OSError(errno.EBUSY, "it is the current folder, or holds it", str(folder))
    recover_folder(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    temporary.mkdir(parents=True)
    try:
        with with_path(folder):
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                sync(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        recover_folder(folder)
        raise
    sync(folder.parent)
    discard(old)


def holds_current(folder: Path) -> bool:
    """Whether this process works in `folder` or below, and would work in nothing without it."""
    try:
        return Path.cwd().is_relative_to(folder.resolve())
    except FileNotFoundError:  # it works in nothing already
        return False


def recover_folder(folder: Path) -> None:
    """Finishes or undoes a `replaced_folder` that was killed."""
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for rest in (old, temporary):
        discard(rest)


def discard(folder: Path) -> None:
    """Deletes a folder, or at least its name, so that the name is free afterwards.

    NFS keeps a file that someone still reads, and with it the folder. That goes under a name of its
    own, and is deleted by the first later call that finds nobody reading.
    """
    for rest in (folder, *folder.parent.glob(f"{glob.escape(folder.name)}.*.rest")):
        shutil.rmtree(rest, ignore_errors=True)
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.rest"))


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk.

    Some network file systems cannot wait for folders; there is nothing to be had then.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(descriptor)
