"""Shard sets on a server or behind a command: whole shards, through a cache on the node."""

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shards.addresses import without_secrets
from shards.config import DataConfig, cache_dir_missing
from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError
from shards.read.checking import INDEX_LIMIT, most_bytes, parse_index
from shards.read.download import check_remote, file_url
from shards.read.layout import INDEX_NAME, ShardInfo
from shards.read.node_cache import GIB, NodeCache, folder_of
from shards.read.retry import fetch

log = logging.getLogger(__name__)


class Windows(NamedTuple):
    """The shards that a stretch of a stream reads, and those that come next, by number."""

    live: list[int]
    following: list[int]


@dataclass(eq=False, repr=False)
class RemoteShards:
    """The shards of a remote set, fetched when needed and one window ahead."""

    root: str
    """URL or command of the set."""
    cache: NodeCache
    shards: Sequence[ShardInfo]
    config: DataConfig
    """How long and how often to try."""
    _wanted: list[ShardInfo] = field(default_factory=list, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _owner: int = field(default=0, init=False)
    """Process that the thread runs in."""

    def open(self, shard: int) -> int:
        """A descriptor of a shard, which is fetched if it is not in the cache.

        Raises:
            DamagedDataError: what is stored is not what the index promises.
            StorageError: it cannot be had.
        """
        info = self.shards[shard]
        while True:
            fetched = not self.cache.holds(info.file)
            self._obtain(info, wait=True)
            try:
                descriptor = os.open(self.cache.path(info.file), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process needed the room
            if fetched and info.file not in self.cache.live:
                self.cache.touch([info.file], passing=True)  # not before, or it may go unread
            return descriptor

    def discard(self, shard: int, descriptor: int) -> None:
        """Throws away the copy of a shard, open as `descriptor`, that proved damaged."""
        file = self.shards[shard].file
        if self.cache.discard(file, descriptor):
            log.warning("%s: damaged in the cache; fetched again", file)

    def expect(self, windows: Windows) -> None:
        """Takes note of the shards being read and coming; missing ones are fetched meanwhile."""
        coming = [self.shards[shard] for shard in (*windows.live, *windows.following)]
        names = frozenset(info.file for info in coming)
        if names == self.cache.live and self._owner == os.getpid():
            return
        self.cache.live = names
        self.cache.touch(names)
        self._wanted = coming
        if self._owner != os.getpid() or self._thread is None or not self._thread.is_alive():
            self._owner = os.getpid()
            self._thread = threading.Thread(target=self._prefetch, daemon=True)
            self._thread.start()

    def check_capacity(self, needed: int, remedy: str) -> None:
        """Raises `DataConfigError` with the remedy unless the cache can hold so many bytes."""
        if needed > self.cache.limit:
            raise DataConfigError(
                f"data.cache_gib = {self.cache.limit / GIB:g}: this order needs "
                f"{needed / GIB:.3g} GiB of shards at hand; {remedy}"
            )

    def _prefetch(self) -> None:
        """Fetches what is wanted until nothing is missing; runs in a thread of its own."""
        while missing := [info for info in self._wanted if not self.cache.holds(info.file)]:
            list_then = self._wanted
            got = 0
            for info in missing:
                if self._wanted is not list_then:
                    break
                try:
                    got += self._obtain(info, wait=False)
                except (StorageError, DamagedDataError, DataConfigError, OutputError) as error:
                    log.debug("prefetch: %s", error)  # whoever needs the shard will meet it again
                    return
            if not got and self._wanted is list_then:
                return  # other processes are fetching the rest

    def _obtain(self, info: ShardInfo, *, wait: bool) -> bool:
        url = file_url(self.root, info.file)
        make = functools.partial(
            fetch, url, config=self.config, size=info.bytes, sha256=info.sha256
        )
        return self.cache.obtain(info.file, info.bytes, make, wait=wait)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_owner": 0, "_wanted": []}


def fetch_index(root: str, config: DataConfig) -> NodeCache:
    """Brings `index.json` and the sample tables of a remote set into its cache.

    Raises:
        DataConfigError: no cache is given, or the root cannot be asked for files.
        DamagedDataError: a file is not what it should be.
        StorageError: a file cannot be had.
        OutputError: the cache cannot be written.
    """
    check_remote(root)
    if config.cache_dir is None:
        raise DataConfigError(cache_dir_missing(root))
    limit = int(config.cache_gib * GIB)
    staging = NodeCache(Path(config.cache_dir).expanduser(), "index", limit)
    with tempfile.NamedTemporaryFile(dir=staging.folder) as temporary:
        fetch(file_url(root, INDEX_NAME), Path(temporary.name), config, most=INDEX_LIMIT)
        data = Path(temporary.name).read_bytes()
    content = parse_index(without_secrets(file_url(root, INDEX_NAME)), data)
    digest = hashlib.sha256(data).hexdigest()
    cache = NodeCache(staging.root, folder_of(data), limit, config.fetch_deadline)
    _place(cache, INDEX_NAME, digest, lambda path: path.write_bytes(data))
    for info in content.domains:
        make = functools.partial(
            fetch, file_url(root, info.table), config=config, sha256=info.sha256,
            most=min(limit, most_bytes(info)),
        )  # fmt: skip
        _place(cache, info.table, info.sha256, make)
    return cache


def _place(cache: NodeCache, file: str, sha256: str, make: Callable[[Path], object]) -> None:
    """Has a small file made in the cache; it takes no part in the bound.

    A copy that is not what it should be is replaced: a loss of power may have emptied it.
    """
    with contextlib.suppress(FileNotFoundError), cache.path(file).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            cache.discard(file, stream.fileno())
    cache.obtain(file, 0, make)
