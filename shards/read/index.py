"""The index of a shard set: what it holds, where every sample lies, and reads that are checked.

The sample tables are memory-mapped, so loader processes share them; `shards.layout` describes the
files.
"""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.addresses import is_remote
from shards.datasets import nearest
from shards.errors import DamagedDataError, DamagedSampleError, DataConfigError
from shards.randomness import Int64Array
from shards.read.layout import (
    INDEX_NAME,
    REMEDY,
    DomainInfo,
    ShardInfo,
    load_table,
    map_table,
    no_index,
    parse_index,
    sample_key,
)
from shards.read.remote import DEFAULT_STORAGE, RemoteShards, StorageOptions, fetch_index
from shards.read.shard_reader import LocalShards, ShardReader, ShardStore


class Sample(NamedTuple):
    """One stored image: its key, its original bytes and its class number."""

    key: str
    image: bytes
    label: int


class Subset(NamedTuple):
    """The samples that are kept.

    Attributes:
        kept: For every domain a bool array [num_samples], by ImageFolder rank.
        fingerprint: Hash of which samples are kept, 16 hexadecimal digits.
    """

    kept: tuple[npt.NDArray[np.bool_], ...]
    fingerprint: str


class ShardIndex:
    """A complete shard set, opened for random access.

    Attributes:
        root: Folder of the set; of a remote set, the folder in the cache.
        dataset: Name of the dataset.
        domains: Domain names in the dataset's order; a domain's number is its place here.
        classes: Class names; a label is a place here.
        shards: All shards of the set.
        sha256: Hash of `index.json`, which contains the hashes of everything else.
        reader: What reads the shards.
        remote: Whether shards have to be fetched.
        subset: The samples that are used; None for all.
        reported: Keys of the bad samples that the log has named, by whatever loader met them.
    """

    def __init__(
        self,
        root: Path,
        content: dict[str, Any],
        sha256: str,
        tables: Sequence[npt.NDArray[np.void]],
        reader: ShardReader | None = None,
    ) -> None:
        self.root = root
        self.dataset = str(content["dataset"])
        self.domain_infos = tuple(DomainInfo(**entry) for entry in content["domains"])
        self.domains = tuple(info.name for info in self.domain_infos)
        self.classes = tuple(str(name) for name in content["classes"])
        self.shards = tuple(ShardInfo(**entry) for entry in content["shards"])
        self.sha256 = sha256
        self._tables = tuple(tables)
        self.reader = reader or ShardReader(LocalShards(root, self.shards))
        self.remote = False
        self.subset: Subset | None = None
        self.reported: set[str] = set()

    @classmethod
    def load(
        cls,
        root: str | Path,
        options: StorageOptions = DEFAULT_STORAGE,
        dataset: str = "folder",
    ) -> "ShardIndex":
        """Open a shard set and check that it is whole.

        Checks that every shard exists with the size recorded and that the sample tables are
        unaltered; the shards' own bytes are checked at every read, or at once by `verify_shards`.

        Args:
            root: Folder of the set, or the URL or command of a remote one.
            options: Patience with the storage, and the cache of a remote set.
            dataset: What it should hold, for the advice how to make a set that is missing.

        Returns:
            The opened set.

        Raises:
            DataConfigError: If there is no shard set, or one of another format version, or a remote
                set lacks a cache.
            DamagedDataError: If a file is missing, cut short or altered.
            StorageError: If a remote set cannot be reached.
            OutputError: If the cache cannot be written.
        """
        cache = fetch_index(root, options) if is_remote(root) else None
        folder = Path(root).expanduser() if cache is None else cache.folder
        path = folder / INDEX_NAME
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataConfigError(no_index(folder, error, dataset)) from error
        content = parse_index(path, data)
        try:
            tables = [load_table(folder, DomainInfo(**entry)) for entry in content["domains"]]
            index = cls(folder, content, hashlib.sha256(data).hexdigest(), tables)
        except (KeyError, TypeError) as error:
            raise DamagedDataError(
                f"{path}: field missing or malformed ({error}); {REMEDY}"
            ) from error
        if cache is None:
            index._check_sizes()
            store: ShardStore = LocalShards(folder, index.shards)
        else:
            index.remote = True
            store = RemoteShards(str(root), cache, index.shards, options.policy)
        index.reader = ShardReader(store, options.policy)
        return index

    def num_samples(self, env: int) -> int:
        """Give the number of samples of a domain.

        Args:
            env: Number of the domain.

        Returns:
            All its samples, before any split.
        """
        return len(self._tables[env])

    def kept(self, env: int, ranks: Int64Array) -> Int64Array:
        """Take those of some samples that the subset keeps.

        Args:
            env: Number of the domain.
            ranks: int64 array of ImageFolder ranks.

        Returns:
            The same without those that are left out, in the same order.
        """
        return ranks if self.subset is None else ranks[self.subset.kept[env][ranks]]

    def labels(self, env: int) -> Int64Array:
        """Give the class numbers of a domain's samples.

        Args:
            env: Number of the domain.

        Returns:
            int64 array [num_samples], by ImageFolder rank.
        """
        return self._tables[env]["label"].astype(np.int64)

    def table(self, env: int) -> npt.NDArray[np.void]:
        """Give the sample table of a domain.

        Args:
            env: Number of the domain.

        Returns:
            Read-only structured array [num_samples] of `TABLE_DTYPE`, by ImageFolder rank.
        """
        return self._tables[env]

    def key(self, env: int, rank: int) -> str:
        """Give the key of a sample without reading it.

        Args:
            env: Number of the domain.
            rank: Place in the domain's sorted file list.

        Returns:
            The key under which the sample's members stand in its tar file.
        """
        return sample_key(self.domain_infos[env].key_prefix, rank)

    def domain_number(self, name: str, setting: str = "data.held_out") -> int:
        """Give the number of a domain.

        Args:
            name: Name of the domain.
            setting: What the error says it was given as.

        Returns:
            Its place in `domains`.

        Raises:
            DataConfigError: If the set has no such domain; lists its domains and the nearest name.
        """
        if name not in self.domains:
            raise DataConfigError(
                f"{setting} = {name!r}: not a domain of {self.dataset}; "
                f"legal: {', '.join(self.domains)}{nearest(name, list(self.domains))}"
            )
        return self.domains.index(name)

    def read(self, env: int, rank: int) -> Sample:
        """Read one sample and check its bytes.

        Args:
            env: Number of the domain.
            rank: Place in the domain's sorted file list.

        Returns:
            The key, the original image bytes and the label.

        Raises:
            DamagedSampleError: If the bytes are not those the index promises.
            DamagedDataError: If the shard ends before them.
            StorageError: If the storage keeps failing.
        """
        row = self._tables[env][rank]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        image = self.reader.read(shard, offset, size)
        sound = _sound(image, row)
        if not sound and self.reader.refetch(shard):
            image = self.reader.read(shard, offset, size)
            sound = _sound(image, row)
        if not sound:
            short = len(image) != size
            found = f"{len(image)} bytes" if short else "another crc32"
            raise (DamagedDataError if short else DamagedSampleError)(
                f"{self.root / self.shards[shard].file}: sample {self.key(env, rank)} at offset "
                f"{offset} is damaged ({size} bytes with crc32 {int(row['crc32']):08x} expected, "
                f"{found} found); {REMEDY}"
            )
        return Sample(self.key(env, rank), image, int(row["label"]))

    def close(self) -> None:
        """Close the shard files; the next read opens them again."""
        self.reader.close()

    def _check_sizes(self) -> None:
        """Raise unless every shard exists with the recorded size."""
        for shard in self.shards:
            path = self.root / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DamagedDataError(f"{path}: {error.strerror}; {REMEDY}") from error
            if size != shard.bytes:
                raise DamagedDataError(f"{path}: {size} bytes, expected {shard.bytes}; {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": ()}  # a process of its own maps them itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = tuple(map_table(self.root / info.table) for info in self.domain_infos)


def _sound(image: bytes, row: npt.NDArray[np.void]) -> bool:
    """Tell whether bytes are those that a row of the table promises."""
    return len(image) == int(row["size"]) and zlib.crc32(image) == int(row["crc32"])
