"""A bounded folder of shards that all processes of a node share.

A file gets its name only when it is whole and verified; one process at a time makes a file, and
others wait for it or go on. When space is needed, the files that were wanted longest ago go first,
and those of the windows being read last.
What is open stays readable after it has gone, so no reader can be disturbed.
"""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import filelock

from shards.errors import DataConfigError, OutputError

PARTIAL = ".partial"
_GIB = 2**30
_LONG_AGO = 10 * 365 * 86400  # seconds by which passing files are older than all others


class NodeCache:
    """The cache of one shard set within a folder that may hold other sets as well.

    Args:
        root: The folder (`data.cache_dir`); its size is bounded as a whole.
        name: Name of this set's own folder.
        limit: Largest size of all sets together, in bytes.

    Raises:
        OutputError: If the folder cannot be written.
    """

    def __init__(self, root: Path, name: str, limit: int) -> None:
        self.root = root
        self.folder = root / name
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"data.cache_dir = {str(root)!r}: cannot be written ({error.strerror}); a remote "
                "data.root needs a folder on the node's own disk to keep shards in"
            ) from error

    def path(self, file: str) -> Path:
        """Give the place of a file, whether it is there or not.

        Args:
            file: File name.

        Returns:
            Its path.
        """
        return self.folder / file

    def holds(self, file: str) -> bool:
        """Tell whether a file is there, which means whole.

        Args:
            file: File name.

        Returns:
            Whether it can be opened now.
        """
        return self.path(file).exists()

    def obtain(
        self,
        file: str,
        size: int,
        make: Callable[[Path], object],
        live: Collection[str] = (),
        wait: bool = True,
    ) -> bool:
        """Have a file made unless it is there; meanwhile no other process makes it.

        Args:
            file: File name.
            size: Its size in bytes.
            make: Writes it to the path it is given, and verifies it.
            live: Files of this set that go last to make room.
            wait: Whether to wait if another process is making it.

        Returns:
            Whether the file is there now; False only if another process is making it.

        Raises:
            DataConfigError: If there is no room for it.
            Exception: Whatever `make` raises.
        """
        lock = filelock.FileLock(self.folder / f"{file}.lock", timeout=-1 if wait else 0)
        try:
            with lock:
                if not self.holds(file):
                    self._make(file, size, make, live)
        except filelock.Timeout:
            return False
        return True

    def discard(self, file: str) -> None:
        """Delete a file that proved damaged.

        Args:
            file: File name.
        """
        self.path(file).unlink(missing_ok=True)

    def touch(self, files: Collection[str], passing: bool = False) -> None:
        """Note that files are wanted, so that others go before them.

        Args:
            files: File names; those that are not there are ignored.
            passing: Whether they are wanted just this once, so that they go before all others.
        """
        when = time.time() - (_LONG_AGO if passing else 0)
        for file in files:
            try:
                os.utime(self.path(file), (when, when))
            except FileNotFoundError:
                pass

    def _make(
        self, file: str, size: int, make: Callable[[Path], object], live: Collection[str]
    ) -> None:
        """Make room, have the file made under another name, and rename it."""
        partial = self.path(file + PARTIAL)
        self._reserve(partial, size, {self.path(name) for name in (*live, file)})
        try:
            make(partial)
            with self._room():  # whoever is counting must not miss it
                partial.replace(self.path(file))
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int, live: Collection[Path]) -> None:
        """Make room and take it, while no other process does the same."""
        with self._room():
            partial.unlink(missing_ok=True)  # left over from a process that was killed
            kept, total = [], 0
            for path in [*self.root.glob("*/*.tar"), *self.root.glob(f"*/*.tar{PARTIAL}")]:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # given up meanwhile
                total += status.st_size
                kept.append((status.st_mtime, path, status.st_size))
            kept.sort(key=lambda entry: (entry[1] in live, entry[0]))
            for _, path, bytes_ in kept:
                if total + size <= self.limit:
                    break
                if self._remove(path):
                    total -= bytes_
            if total + size > self.limit:
                raise DataConfigError(
                    f"data.cache_gib = {self.limit / _GIB:g}: {self.root} has no room for "
                    f"{partial.name.removesuffix(PARTIAL)} ({size} bytes); raise it, or give "
                    "every job a data.cache_dir of its own"
                )
            with partial.open("wb") as stream:
                stream.truncate(size)  # counts from now on

    def _room(self) -> filelock.BaseFileLock:
        """Give the lock under which files are counted and get their names."""
        return filelock.FileLock(self.root / ".room.lock")

    def _remove(self, path: Path) -> bool:
        """Delete a file, but none that another process is making."""
        if path.suffix != PARTIAL:
            path.unlink(missing_ok=True)
            return True
        name = path.name.removesuffix(PARTIAL)
        try:
            with filelock.FileLock(path.with_name(f"{name}.lock"), timeout=0):
                path.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False
