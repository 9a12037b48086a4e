"""Bytes of samples from shard files: few files open, failing storage asked again."""

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.errors import StorageError
from shards.read.layout import ShardInfo
from shards.read.retry import DEFAULT_POLICY, FetchPolicy

_MAX_OPEN_SHARDS = 128  # far below the usual limit of 1,024 open files


class Windows(NamedTuple):
    """The shards that a stretch of a stream reads, and those that come next."""

    live: list[int]
    following: list[int]


class ShardStore(Protocol):
    """Where the shards of a set are.

    Attributes:
        shards: All shards of the set.
    """

    shards: Sequence[ShardInfo]

    def open(self, shard: int) -> int:
        """Open a shard and give its descriptor."""

    def refetch(self, shard: int, descriptor: int) -> bool:
        """Throw away the damaged copy that was opened; False if there is but the original."""

    def expect(self, windows: Windows) -> None:
        """Take note of the shards being read and those that come next."""

    def check_capacity(self, needed: int, remedy: str) -> None:
        """Raise unless that many bytes of shards can be at hand."""


class LocalShards:
    """Shards in a folder.

    Args:
        root: The folder.
        shards: All shards of the set.
    """

    def __init__(self, root: Path, shards: Sequence[ShardInfo]) -> None:
        self.root = root
        self.shards = shards

    def open(self, shard: int) -> int:
        """Open a shard.

        Args:
            shard: Its number.

        Returns:
            A descriptor.
        """
        return os.open(self.root / self.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)

    def refetch(self, shard: int, descriptor: int) -> bool:
        """Tell that there is no other copy.

        Args:
            shard: Not used.
            descriptor: Not used.

        Returns:
            False.
        """
        return False

    def expect(self, windows: Windows) -> None:
        """Do nothing: all shards are at hand.

        Args:
            windows: Not used.
        """

    def check_capacity(self, needed: int, remedy: str) -> None:
        """Do nothing: all shards are at hand.

        Args:
            needed: Not used.
            remedy: Not used.
        """


class ShardReader:
    """Reads parts of shards.

    Args:
        store: Where the shards are.
        policy: How often to ask storage that fails.
    """

    def __init__(self, store: ShardStore, policy: FetchPolicy = DEFAULT_POLICY) -> None:
        self.store = store
        self.policy = policy
        self._open_files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read some bytes of a shard.

        Args:
            shard: Number of the shard.
            offset: First byte.
            size: How many.

        Returns:
            The bytes; fewer if the file ends before.

        Raises:
            StorageError: If the storage keeps failing.
        """
        for attempt in range(self.policy.retries + 1):
            if attempt:
                time.sleep(self.policy.pause * 2 ** (attempt - 1))
            try:
                return _read_at(self._descriptor(shard), size, offset)
            except StorageError:
                raise  # was tried often enough
            except OSError as error:
                failure = error
                self.forget(shard)  # on network disks an open file may have gone stale
        raise StorageError(
            failure.errno,
            f"{self.store.shards[shard].file}: {failure.strerror or failure} after "
            f"{self.policy.retries + 1} attempts; check the storage, or raise data.fetch_retries",
        ) from failure

    def forget(self, shard: int) -> None:
        """Close a shard; the next read opens it anew.

        Args:
            shard: Its number.
        """
        if shard in self._open_files:
            os.close(self._open_files.pop(shard))

    def refetch(self, shard: int) -> bool:
        """Have a damaged copy of a shard replaced.

        Args:
            shard: Its number.

        Returns:
            Whether reading again makes sense.
        """
        again = self.store.refetch(shard, self._descriptor(shard))
        self.forget(shard)
        return again

    def close(self) -> None:
        """Close all shards."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        """Return an open descriptor of a shard, closing the least recently used one if many are."""
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
            return self._open_files[shard]
        for number, descriptor in list(self._open_files.items()):
            if os.fstat(descriptor).st_nlink == 0:  # deleted, but takes space while open
                self.forget(number)
        if len(self._open_files) >= _MAX_OPEN_SHARDS:
            os.close(self._open_files.popitem(last=False)[1])
        self._open_files[shard] = self.store.open(shard)
        return self._open_files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open_files"):
            self.close()


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read until there is enough or the file ends: a single read may give less before that."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
