"""Files that a crash or a loss of power leaves either whole under their names, or absent."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # suffix of a file still being written
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of folders on some network file systems


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file that gets its name, for good, when all of it is on the disk.

    The temporary name is a new one every time, so that a process that outlives its parent cannot
    interfere with the next run.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(folder)
