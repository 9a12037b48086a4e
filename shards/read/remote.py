"""Shard sets on a server or behind a command: whole shards, through a cache on the node."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.addresses import without_secrets
from shards.config import DataConfig, cache_dir_missing
from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError
from shards.read.download import check_names, check_remote, file_url
from shards.read.layout import INDEX_NAME, ShardInfo
from shards.read.node_cache import NodeCache
from shards.read.retry import FetchPolicy, fetch
from shards.read.shard_reader import Windows

log = logging.getLogger(__name__)

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How stored shards are reached.

    Attributes:
        cache_dir: Folder on the node's own disk for shards of a remote set.
        cache_bytes: Largest size of that folder.
        policy: How long and how often storage is asked.
    """

    cache_dir: Path | None = None
    cache_bytes: int = 50 * _GIB
    policy: FetchPolicy = field(default_factory=FetchPolicy)

    @classmethod
    def of(cls, config: DataConfig) -> "StorageOptions":
        """Take the options from the data section of a run.

        Args:
            config: The data section.

        Returns:
            The options.
        """
        return cls(
            cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            cache_bytes=int(config.cache_gib * _GIB),
            policy=FetchPolicy(deadline=config.fetch_deadline, retries=config.fetch_retries),
        )


DEFAULT_STORAGE = StorageOptions()


class RemoteShards:
    """The shards of a remote set, fetched when needed and one window ahead.

    Args:
        root: URL or command of the set.
        cache: Where they are kept.
        shards: All shards of the set.
        policy: How long and how often to try.
    """

    def __init__(
        self, root: str, cache: NodeCache, shards: Sequence[ShardInfo], policy: FetchPolicy
    ) -> None:
        self.root = root
        self.cache = cache
        self.shards = shards
        self.policy = policy
        self._live: frozenset[str] = frozenset()
        self._wanted: list[ShardInfo] = []
        self._thread: threading.Thread | None = None
        self._owner = 0  # process that the thread runs in

    def open(self, shard: int) -> int:
        """Open a shard, fetching it if it is not in the cache.

        Args:
            shard: Its number.

        Returns:
            A descriptor.

        Raises:
            DamagedDataError: If what is stored is not what the index promises.
            StorageError: If it cannot be had.
        """
        info = self.shards[shard]
        while True:
            fetched = not self.cache.holds(info.file)
            self._obtain(info, wait=True)
            try:
                descriptor = os.open(self.cache.path(info.file), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process needed the room
            if fetched and info.file not in self._live:
                self.cache.touch([info.file], passing=True)  # not before, or it may go unread
            return descriptor

    def refetch(self, shard: int, descriptor: int) -> bool:
        """Throw away the copy of a shard that proved damaged.

        Args:
            shard: Its number.
            descriptor: The copy as it was opened.

        Returns:
            True: opening it again gives a new copy.
        """
        file = self.shards[shard].file
        if self.cache.discard(file, descriptor):
            log.warning("%s: damaged in the cache; fetched again", file)
        return True

    def expect(self, windows: Windows) -> None:
        """Say which shards are being read and which come next; missing ones are fetched meanwhile.

        Args:
            windows: Their numbers.
        """
        coming = [self.shards[shard] for shard in (*windows.live, *windows.following)]
        names = frozenset(info.file for info in coming)
        if names == self._live and self._owner == os.getpid():
            return
        self._live = names
        self.cache.touch(names)
        self._wanted = coming
        if self._owner != os.getpid() or self._thread is None or not self._thread.is_alive():
            self._owner = os.getpid()
            self._thread = threading.Thread(target=self._prefetch, daemon=True)
            self._thread.start()

    def check_capacity(self, needed: int, remedy: str) -> None:
        """Raise unless the cache can hold what is needed at a time.

        Args:
            needed: Bytes.
            remedy: What the user may do.

        Raises:
            DataConfigError: If it cannot.
        """
        if needed > self.cache.limit:
            raise DataConfigError(
                f"data.cache_gib = {self.cache.limit / _GIB:g}: this order needs "
                f"{needed / _GIB:.3g} GiB of shards at hand; {remedy}"
            )

    def _prefetch(self) -> None:
        """Fetch what is wanted until nothing is missing; runs in a thread of its own."""
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

    def _obtain(self, info: ShardInfo, wait: bool) -> bool:
        """Have a shard in the cache."""

        def make(path: Path) -> None:
            url = file_url(self.root, info.file)
            fetch(url, path, self.policy, size=info.bytes, sha256=info.sha256)

        return self.cache.obtain(info.file, info.bytes, make, self._live, wait)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_owner": 0, "_wanted": []}


def fetch_index(root: str, options: StorageOptions) -> NodeCache:
    """Bring the index and the sample tables of a remote set into the cache.

    Args:
        root: URL or command of the set.
        options: Cache and patience.

    Returns:
        The set's cache, whose folder holds `index.json` and the tables.

    Raises:
        DataConfigError: If no cache is given, or the root cannot be asked for files.
        DamagedDataError: If a file is not what it should be.
        StorageError: If a file cannot be had.
        OutputError: If the cache cannot be written.
    """
    check_remote(root)
    if options.cache_dir is None:
        raise DataConfigError(cache_dir_missing(root))
    staging = NodeCache(options.cache_dir.expanduser(), "index", options.cache_bytes)
    with tempfile.NamedTemporaryFile(dir=staging.folder) as temporary:
        fetch(file_url(root, INDEX_NAME), Path(temporary.name), options.policy)
        data = Path(temporary.name).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    cache = NodeCache(staging.root, digest[:32], options.cache_bytes, options.policy.deadline)
    _place(cache, INDEX_NAME, digest, lambda path: path.write_bytes(data))
    try:
        content = json.loads(data)
        check_names(entry["file"] for entry in content["shards"])
        tables = [(entry["table"], entry["sha256"]) for entry in content["domains"]]
        check_names(name for name, _ in tables)
    except (ValueError, KeyError, TypeError) as error:
        shown = without_secrets(file_url(root, INDEX_NAME))
        raise DamagedDataError(f"{shown}: not a shard index ({error}); check data.root") from error
    for table, sha256 in tables:
        url = file_url(root, table)
        make = functools.partial(fetch, url, policy=options.policy, sha256=sha256)
        _place(cache, table, sha256, make)
    return cache


def _place(cache: NodeCache, file: str, sha256: str, make: Callable[[Path], object]) -> None:
    """Have a small file made in the cache; it takes no part in the bound.

    A copy that is not what it should be is replaced: a loss of power may have emptied it.
    """
    with contextlib.suppress(FileNotFoundError), cache.path(file).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            cache.discard(file, stream.fileno())
    cache.obtain(file, 0, make)
