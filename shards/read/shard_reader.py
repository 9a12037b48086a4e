"""Bytes of samples from shard files: few files open, failing storage asked again."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import StorageError
from shards.read.layout import ShardInfo
from shards.read.remote import RemoteShards
from shards.read.retry import attempts

_MAX_OPEN_SHARDS = 128  # far below the usual limit of 1,024 open files


@dataclass(eq=False, repr=False)
class ShardReader:
    """Reads parts of shards."""

    root: Path
    """Folder of the shards, if they are not remote."""
    shards: Sequence[ShardInfo]
    retries: int
    """How often storage that fails is asked again."""
    remote: RemoteShards | None = None
    """What fetches the shards of a remote set."""
    _open_files: OrderedDict[int, int] = field(default_factory=OrderedDict, init=False)
    """Shard -> descriptor."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard; fewer if the file ends before.

        Raises `StorageError`: the storage keeps failing.
        """
        for _ in attempts(self.retries):
            try:
                return _read_at(self._descriptor(shard), size, offset)
            except StorageError:
                raise  # was tried often enough
            except OSError as error:
                failure = error
                self._forget(shard)  # on network disks an open file may have gone stale
        raise StorageError(
            failure.errno,
            f"{self.shards[shard].file}: {failure.strerror or failure} after "
            f"{self.retries + 1} attempts; check the storage, or raise data.fetch_retries",
        ) from failure

    def refetch(self, shard: int) -> bool:
        """Has a damaged copy of a shard replaced; False if there is but the original."""
        if self.remote is None:
            return False
        self.remote.discard(shard, self._descriptor(shard))
        self._forget(shard)
        return True

    def close(self) -> None:
        """Closes all shards; the next read opens them again."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        """An open descriptor of a shard; the least recently used one is closed if many are."""
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
            return self._open_files[shard]
        for number, descriptor in list(self._open_files.items()):
            if os.fstat(descriptor).st_nlink == 0:  # deleted, but takes space while open
                self._forget(number)
        if len(self._open_files) >= _MAX_OPEN_SHARDS:
            os.close(self._open_files.popitem(last=False)[1])
        self._open_files[shard] = self._open(shard)
        return self._open_files[shard]

    def _open(self, shard: int) -> int:
        if self.remote is not None:
            return self.remote.open(shard)
        return os.open(self.root / self.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)

    def _forget(self, shard: int) -> None:
        """Closes a shard; the next read opens it anew."""
        if shard in self._open_files:
            os.close(self._open_files.pop(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open_files"):
            self.close()


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Reads until there is enough or the file ends: a single read may give less before that."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
