"""A bounded folder of shards that all processes of a node share.

A file gets its name only when it is whole and verified; one process at a time makes a file, and
others wait for it or go on. When space is needed, the files that were wanted longest ago go first,
and those of the windows being read last. What others are fetching stays, and whoever finds no room
beside it waits until that is done. Nothing else in the folder is ever counted or deleted: a set's
own folder bears the hash of the index inside it, and that index lists its files.
What is open stays readable after it has gone, so no reader can be disturbed.
Nothing waits for the disk (fsync): every read is verified, so what a loss of power damaged is
found and fetched again.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import filelock

from shards.durable import PARTIAL
from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError
from shards.read.checking import parse_index, read_index
from shards.read.layout import INDEX_NAME

GIB = 2**30
_POLL = 0.1  # seconds between looks for room
_HASH = 32  # hexadecimal digits that name a set's folder
_LONG_AGO = 10 * 365 * 86400  # seconds by which passing files are older than all others


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error to raise when a local copy cannot be written."""
    return OutputError(
        f"data.cache_dir: cannot write {path} ({error.strerror}); free space, or give another"
    )


def folder_of(index: bytes) -> str:
    """The name of a set's folder, from the bytes of its index."""
    return hashlib.sha256(index).hexdigest()[:_HASH]


class NodeCache:
    """The cache of one shard set within a folder that may hold other sets as well.

    Args:
        root: the folder (`data.cache_dir`); its size is bounded as a whole.
        name: of this set's own folder.
        limit: largest size of all sets together, in bytes.
        patience: seconds that other processes may fetch the same files, while these leave no room.

    Attributes:
        live: files of this set that go last to make room.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, root: Path, name: str, limit: int, patience: float = 60.0) -> None:
        self.root, self.folder, self.limit, self.patience = root, root / name, limit, patience
        self.live: frozenset[str] = frozenset()
        self._listed: dict[Path, frozenset[str]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # it can be written
        except OSError as error:
            raise OutputError(
                f"data.cache_dir = {str(root)!r}: cannot be written ({error.strerror}); a remote "
                "data.root needs a folder on the node's own disk to keep shards in"
            ) from error

    def path(self, file: str) -> Path:
        """The place of a file, whether it is there or not."""
        return self.folder / file

    def holds(self, file: str) -> bool:
        """Whether a file is there, which means whole."""
        return self.path(file).exists()

    def obtain(
        self, file: str, size: int, make: Callable[[Path], object], *, wait: bool = True
    ) -> bool:
        """Has a file made unless it is there; meanwhile no other process makes it.

        Args:
            file: its name.
            size: bytes to make room for.
            make: writes it to the path it is given, and verifies it; its errors pass through.
            wait: for another process that is making it, or others that take all room.

        Returns:
            Whether the file is there now; False only if that would have meant waiting.

        Raises:
            DataConfigError: it is larger than the bound.
            StorageError: other processes leave no room, and get nowhere.
            OutputError: the folder cannot be written.
        """
        partial = self.path(file + PARTIAL)
        try:
            with filelock.FileLock(self.path(f"{file}.lock"), timeout=-1 if wait else 0):
                if self.holds(file):
                    return True
                if not self._reserve(file, size, wait):
                    return False
                try:
                    make(partial)
                    with self._room():  # whoever is counting must not miss it
                        partial.replace(self.path(file))
                finally:
                    partial.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False
        except StorageError:
            raise
        except OSError as error:
            raise cannot_write(self.path(file), error) from error

    def discard(self, file: str, descriptor: int) -> bool:
        """Deletes a damaged file, which is open, unless another process has replaced it already."""
        path = self.path(file)
        # Nothing gets its name meanwhile.
        with self._room(), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                path.unlink()
                return True
        return False

    def touch(self, files: Collection[str], passing: bool = False) -> None:
        """Notes that files, if there, are wanted: others go before them.

        Those wanted just this once (`passing`) go before all others.
        """
        when = time.time() - (_LONG_AGO if passing else 0)
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path(file), (when, when))

    def _reserve(self, file: str, size: int, wait: bool) -> bool:
        """Takes room for a file, waiting for others to finish theirs if `wait` says so."""
        if size > self.limit:
            raise DataConfigError(
                f"data.cache_gib = {self.limit / GIB:g}: {self.root} has no room for {file} "
                f"({size} bytes), however much is deleted; raise it"
            )
        seen: frozenset[str] = frozenset()
        since = time.monotonic()
        while in_flight := self._take(self.path(file + PARTIAL), size):
            if not wait:
                return False
            if in_flight != seen:
                seen, since = in_flight, time.monotonic()
            elif time.monotonic() - since > self.patience:  # they are stopped, not slow
                raise StorageError(
                    f"data.cache_dir = {str(self.root)!r}: no room for {file}, since other "
                    f"processes have been fetching {', '.join(sorted(in_flight))} for "
                    f"{self.patience:g} s; end them if they hang, or raise data.cache_gib"
                )
            time.sleep(_POLL)
        return True

    def _take(self, partial: Path, size: int) -> frozenset[str]:
        """Takes room for a file now, or names the unfinished files of others that leave too little.

        Nothing is deleted when that would not be enough.
        """
        with self._room():
            partial.unlink(missing_ok=True)  # left over from a process that was killed
            for path in self._written(PARTIAL):
                lock = filelock.FileLock(path.with_suffix(".lock"), timeout=0)
                with contextlib.suppress(filelock.Timeout), lock:  # else someone is making it
                    path.unlink(missing_ok=True)
            in_flight = _statuses(self._written(PARTIAL))
            room = self.limit - size - sum(status.st_size for status in in_flight.values())
            if room < 0:
                return frozenset(path.name.removesuffix(PARTIAL) for path in in_flight)
            self._shrink(room)
            with partial.open("wb") as stream:
                stream.truncate(size)  # counts from now on
        return frozenset()

    def _shrink(self, room: int) -> None:
        """Deletes finished files, the least wanted first, until the others fit into some bytes."""
        kept = _statuses(self._written())
        total = sum(status.st_size for status in kept.values())
        live = {self.path(file) for file in self.live}
        for path in sorted(kept, key=lambda path: (path in live, kept[path].st_mtime)):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= kept[path].st_size

    def _written(self, suffix: str = "") -> Iterator[Path]:
        """The shards of all sets that caches put here; with `PARTIAL`, the unfinished ones."""
        for index in self.root.glob("[0-9a-f]" * _HASH + f"/{INDEX_NAME}"):
            files = self._files(index)
            for path in index.parent.iterdir() if files else ():
                if path.name.endswith(suffix) and path.name.removesuffix(suffix) in files:
                    yield path

    def _files(self, index: Path) -> frozenset[str]:
        """The shards that the index of a set names; none if its folder was not made by a cache."""
        if index not in self._listed:
            with contextlib.suppress(OSError, DamagedDataError, DataConfigError):
                if folder_of(data := read_index(index)) == index.parent.name:
                    shards = parse_index(index, data).shards
                    self._listed[index] = frozenset(shard.file for shard in shards)
        return self._listed.get(index, frozenset())

    def _room(self) -> filelock.BaseFileLock:
        """The lock under which files are counted and get their names."""
        return filelock.FileLock(self.root / ".room.lock")


def _statuses(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Sizes and times of files, except those that are given up meanwhile."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat()
    return found
