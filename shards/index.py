"""The index of a shard set: what it holds, where every sample lies, and reads that are checked.

The sample tables are memory-mapped, so loader processes share them; `shards.layout` describes the
files.
"""

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.datasets import nearest
from shards.errors import DamagedDataError, DataConfigError
from shards.layout import (
    INDEX_NAME,
    REMEDY,
    DomainInfo,
    ShardInfo,
    load_table,
    no_index,
    parse_index,
    sample_key,
)
from shards.order import Int64Array

_MAX_OPEN_SHARDS = 128  # far below the usual limit of 1,024 open files


class Sample(NamedTuple):
    """One stored image: its key, its original bytes and its class number."""

    key: str
    image: bytes
    label: int


class ShardIndex:
    """A complete shard set, opened for random access.

    Attributes:
        root: Folder of the set.
        dataset: Name of the dataset.
        domains: Domain names in the dataset's order; a domain's number is its place here.
        classes: Class names; a label is a place here.
        shards: All shards of the set.
        sha256: Hash of `index.json`, which contains the hashes of everything else.
    """

    def __init__(
        self,
        root: Path,
        content: dict[str, Any],
        sha256: str,
        tables: Sequence[npt.NDArray[np.void]],
    ) -> None:
        self.root = root
        self.dataset = str(content["dataset"])
        self.domain_infos = tuple(DomainInfo(**entry) for entry in content["domains"])
        self.domains = tuple(info.name for info in self.domain_infos)
        self.classes = tuple(str(name) for name in content["classes"])
        self.shards = tuple(ShardInfo(**entry) for entry in content["shards"])
        self.sha256 = sha256
        self._tables = tuple(tables)
        self._open_files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor

    @classmethod
    def load(cls, root: str | Path) -> "ShardIndex":
        """Open a shard set and check that it is whole.

        Checks that every shard exists with the size recorded and that the sample tables are
        unaltered; the shards' own bytes are checked at every read, or all at once by `verify`.

        Args:
            root: Folder of the set.

        Returns:
            The opened set.

        Raises:
            DataConfigError: If there is no shard set, or one of another format version.
            DamagedDataError: If a file is missing, cut short or altered.
        """
        root = Path(root).expanduser()
        path = root / INDEX_NAME
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataConfigError(no_index(root, error)) from error
        content = parse_index(path, data)
        try:
            tables = [load_table(root, DomainInfo(**entry)) for entry in content["domains"]]
            index = cls(root, content, hashlib.sha256(data).hexdigest(), tables)
        except (KeyError, TypeError) as error:
            raise DamagedDataError(
                f"{path}: field missing or malformed ({error}); {REMEDY}"
            ) from error
        index._check_sizes()
        return index

    def num_samples(self, env: int) -> int:
        """Give the number of samples of a domain.

        Args:
            env: Number of the domain.

        Returns:
            All its samples, before any split.
        """
        return len(self._tables[env])

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

    def domain_number(self, name: str) -> int:
        """Give the number of a domain.

        Args:
            name: Name of the domain.

        Returns:
            Its place in `domains`.

        Raises:
            DataConfigError: If the set has no such domain; lists its domains and the nearest name.
        """
        if name not in self.domains:
            raise DataConfigError(
                f"data.held_out = {name!r}: not a domain of {self.dataset}; "
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
            DamagedDataError: If the bytes are not those the index promises.
            OSError: If the storage fails.
        """
        row = self._tables[env][rank]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        image = os.pread(self._descriptor(shard), size, offset)
        if len(image) != size or zlib.crc32(image) != int(row["crc32"]):
            found = f"{len(image)} bytes" if len(image) != size else "another crc32"
            raise DamagedDataError(
                f"{self.root / self.shards[shard].file}: sample {self.key(env, rank)} at offset "
                f"{offset} is damaged ({size} bytes with crc32 {int(row['crc32']):08x} expected, "
                f"{found} found); {REMEDY}"
            )
        return Sample(self.key(env, rank), image, int(row["label"]))

    def verify(self, deep: bool = False) -> list[str]:
        """Compare everything stored with the index.

        Args:
            deep: Also decode every image.

        Returns:
            One line per problem; empty when the set is sound.
        """
        from shards.verify import verify_shards

        return verify_shards(self, deep=deep)

    def close(self) -> None:
        """Close the shard files; the next read opens them again."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        """Return an open descriptor of a shard, closing the least recently used one if many are."""
        if shard in self._open_files:
            self._open_files.move_to_end(shard)
            return self._open_files[shard]
        if len(self._open_files) >= _MAX_OPEN_SHARDS:
            os.close(self._open_files.popitem(last=False)[1])
        descriptor = os.open(self.root / self.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)
        self._open_files[shard] = descriptor
        return descriptor

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
        return {**self.__dict__, "_open_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open_files"):
            self.close()
