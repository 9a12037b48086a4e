"""The index of a shard set: what it holds, where every sample lies, and reads that are checked.

The sample tables are memory-mapped, so loader processes share them; `shards.read.layout` describes
the files.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.addresses import is_remote
from shards.config import DataConfig
from shards.datasets import nearest
from shards.errors import DamagedDataError, DamagedSampleError, DataConfigError
from shards.randomness import Int64Array
from shards.read import layout
from shards.read.checking import (
    IndexContent,
    load_table,
    map_table,
    parse_index,
    read_index,
    regular_file,
)
from shards.read.naming import check_texts, name_and_sha256
from shards.read.remote import RemoteShards, fetch_index
from shards.read.shard_reader import ShardReader


class Sample(NamedTuple):
    """One stored image: its key, its original bytes and its class number."""

    key: str
    image: bytes
    label: int


class Subset(NamedTuple):
    """The samples that are kept."""

    kept: tuple[npt.NDArray[np.bool_], ...]
    """For every domain a bool array [num_samples], by place."""
    fingerprint: str
    """Hash of which samples are kept, 16 hexadecimal digits."""


class ShardIndex:
    """A complete shard set, opened for random access.

    A domain is given as its number, which is its place in `domains`, and a sample of it by its
    place in the domain's sorted file list (the order of `ImageFolder`).

    Attributes:
        root: folder of the set; of a remote set, the folder in the cache.
        domains: names in the dataset's order.
        classes: class names; a label is a place here.
        name: the set's own name if it was given one, else that of the dataset.
        sha256: hash of `index.json`, the name apart; it contains the hashes of everything else.
        remote: whether shards have to be fetched.
        subset: the samples that are used; None for all.
        group_by: pattern whose groups the split keeps together; None for DomainBed's split.
        reported: keys of the bad samples that the log has named, by whatever loader met them.
    """

    def __init__(
        self, root: Path, content: IndexContent, name: str, sha256: str, config: DataConfig
    ) -> None:
        self.root, self.name, self.sha256 = root, name, sha256
        self.dataset, self.classes, self.domain_infos, self.shards, self.group_by = content
        self.domains = tuple(info.name for info in self.domain_infos)
        self._tables = tuple(load_table(root, info, content) for info in self.domain_infos)
        self.reader = ShardReader(root, self.shards, config.fetch_retries)
        self.remote = False
        self.subset: Subset | None = None
        self.reported: set[str] = set()

    @classmethod
    def load(
        cls, root: str | Path, config: DataConfig | None = None, dataset: str = "folder"
    ) -> "ShardIndex":
        """Opens a shard set and checks that it is whole.

        Every shard must exist with the size recorded, and the sample tables be unaltered; the
        shards' own bytes are checked at every read, or at once by `verify_shards`.

        Args:
            root: folder of the set, or the URL or command of a remote one.
            config: patience with the storage, and the cache of a remote set.
            dataset: what it should hold, for the advice how to make a set that is missing.

        Raises:
            DataConfigError: there is no shard set, or one of another format version, or a remote
                set lacks a cache.
            DamagedDataError: a file is missing, cut short, altered, or not what a set is made of.
            StorageError: a remote set cannot be reached.
            OutputError: the cache cannot be written.
        """
        config = config or DataConfig()
        cache = fetch_index(root, config) if is_remote(root) else None
        folder = Path(root).expanduser() if cache is None else cache.folder
        path = folder / layout.INDEX_NAME
        try:
            data = read_index(path)
        except OSError as error:
            raise DataConfigError(layout.no_index(folder, error, dataset)) from error
        content = parse_index(path, data)
        check_texts(folder, (*content.classes, *(domain.name for domain in content.domains)))
        name, sha256 = name_and_sha256(path, data, content.dataset)
        index = cls(folder, content, name, sha256, config)
        if cache is None:
            index._check_sizes()
        else:
            index.remote = True
            index.reader.remote = RemoteShards(str(root), cache, index.shards, config)
        return index

    def num_samples(self, domain: int) -> int:
        """How many samples a domain has, before any split."""
        return len(self._tables[domain])

    def kept(self, domain: int, places: Int64Array) -> Int64Array:
        """Those of some samples (an int64 array) that the subset keeps, in the same order."""
        return places if self.subset is None else places[self.subset.kept[domain][places]]

    def labels(self, domain: int) -> Int64Array:
        """The class numbers of a domain's samples: int64 array [num_samples], by place."""
        return self._tables[domain]["label"].astype(np.int64)

    def table(self, domain: int) -> npt.NDArray[np.void]:
        """A domain's sample table: read-only array [num_samples] of `TABLE_DTYPE`, by place."""
        return self._tables[domain]

    def key(self, domain: int, place: int) -> str:
        """The key under which a sample's members stand in its tar file; nothing is read."""
        return layout.sample_key(self.domain_infos[domain].key_prefix, place)

    def domain_number(self, name: str, setting: str = "data.held_out") -> int:
        """The number of a domain; `setting` is what the error says its name was given as.

        Raises:
            DataConfigError: the set has no such domain; lists its domains and the nearest name.
        """
        if name not in self.domains:
            raise DataConfigError(
                f"{setting} = {name!r}: not a domain of {self.name}; "
                f"legal: {', '.join(self.domains)}{nearest(name, list(self.domains))}"
            )
        return self.domains.index(name)

    def read(self, domain: int, place: int) -> Sample:
        """Reads one sample, its original image bytes, and checks them.

        Raises:
            DamagedSampleError: the bytes are not those the index promises.
            DamagedDataError: the shard ends before them.
            StorageError: the storage keeps failing.
        """
        row = self._tables[domain][place]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        crc32, key = int(row["crc32"]), self.key(domain, place)
        image = self.reader.read(shard, offset, size)
        found = len(image), zlib.crc32(image)
        if found != (size, crc32) and self.reader.refetch(shard):
            image = self.reader.read(shard, offset, size)
            found = len(image), zlib.crc32(image)
        if found != (size, crc32):
            short = len(image) != size
            what = f"{len(image)} bytes" if short else "another crc32"
            raise (DamagedDataError if short else DamagedSampleError)(
                f"{self.root / self.shards[shard].file}: sample {key} at offset {offset} is "
                f"damaged ({size} bytes with crc32 {crc32:08x} expected, {what} found); "
                f"{layout.REMEDY}"
            )
        return Sample(key, image, int(row["label"]))

    def close(self) -> None:
        """Closes the shard files; the next read opens them again."""
        self.reader.close()

    def _check_sizes(self) -> None:
        """Raises unless every shard exists with the recorded size."""
        for shard in self.shards:
            path = self.root / shard.file
            try:
                size = regular_file(path).st_size
            except OSError as error:
                raise DamagedDataError(f"{path}: {error.strerror}; {layout.REMEDY}") from error
            if size != shard.bytes:
                expected = f"{size} bytes, expected {shard.bytes}"
                raise DamagedDataError(f"{path}: {expected}; {layout.REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": ()}  # a process of its own maps them itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = tuple(map_table(self.root / info.table) for info in self.domain_infos)
