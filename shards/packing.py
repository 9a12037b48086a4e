"""The files of a shard set, written: tar shards and sample tables, each renamed when whole."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shards.errors import DamagedDataError
from shards.layout import (
    FORMAT_VERSION,
    INDEX_NAME,
    TABLE_DTYPE,
    DomainInfo,
    ShardInfo,
    file_sha256,
    key_prefixes,
    sample_key,
)
from shards.listing import DomainListing, Listing
from shards.order import Int64Array, hash64, permutation

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # suffix of a file still being written


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it has been written completely.

    Args:
        path: Final name of the file.

    Yields:
        A binary stream to write to.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def member_suffix(path: str) -> str:
    """Give the member name's extension for an image file.

    Args:
        path: Name of the image file.

    Returns:
        The extension in lower case without its dot, `jpg` for `jpeg`.
    """
    suffix = path.rpartition(".")[2].lower()
    return "jpg" if suffix == "jpeg" else suffix


def unreadable(path: Path, error: OSError) -> DamagedDataError:
    """Phrase the failure to read a source image.

    Args:
        path: The image.
        error: What the system reported.

    Returns:
        The error to raise.
    """
    return DamagedDataError(
        f"{path}: cannot be read ({error.strerror}); restore the file or name it in --exclude-list"
    )


class ShardPacker:
    """Writes the shard set of one listing into a folder.

    Args:
        listing: The images.
        out: Existing folder of the shard set.
        dataset: Name of the dataset.
        shard_size: Largest number of samples of one shard.
    """

    def __init__(self, listing: Listing, out: Path, dataset: str, shard_size: int) -> None:
        self.listing = listing
        self.out = out
        self.dataset = dataset
        self.shard_size = shard_size
        self._prefixes = key_prefixes([domain.name for domain in listing.domains])
        self._stems = [f"{key_prefixes([dataset])[0]}-{prefix}" for prefix in self._prefixes]
        self._shards: list[ShardInfo] = []

    def writes(self, name: str) -> bool:
        """Tell whether a file name is one that this packer could write.

        Args:
            name: File name without folder.

        Returns:
            Whether it is a shard, a table or an index of this set, finished or not.
        """
        name = name.removesuffix(PARTIAL)
        stem = re.sub(r"(-\d{6}\.tar|\.npy)$", "", name)
        return name == INDEX_NAME or (stem != name and stem in self._stems)

    def pack(self, source_sha256: str) -> None:
        """Write everything; the index comes last.

        Args:
            source_sha256: Hash of what is converted, stored in the index.

        Raises:
            DamagedDataError: If an image cannot be read.
            OSError: If the output cannot be written.
        """
        domains = [
            self._pack_domain(*of_domain)
            for of_domain in zip(self.listing.domains, self._prefixes, self._stems, strict=True)
        ]
        content = {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "source_sha256": source_sha256,
            "classes": list(self.listing.classes),
            "domains": [asdict(info) for info in domains],
            "shards": [asdict(info) for info in self._shards],
        }
        with replaced_when_whole(self.out / INDEX_NAME) as stream:
            stream.write((json.dumps(content, indent=1) + "\n").encode())

    def _pack_domain(self, domain: DomainListing, prefix: str, stem: str) -> DomainInfo:
        """Write the shards and the table of one domain."""
        num = len(domain.paths)
        order = permutation(hash64("shards", domain.name), num)
        table = np.zeros(num, dtype=TABLE_DTYPE)
        table["rank"] = np.arange(num)
        table["label"] = domain.labels
        for number, first in enumerate(range(0, num, self.shard_size)):
            ranks = order[first : first + self.shard_size]
            self._pack_shard(self.out / f"{stem}-{number:06d}.tar", domain, prefix, ranks, table)
            log.info("%s: %d of %d images", domain.name, first + len(ranks), num)
        path = self.out / f"{stem}.npy"
        with replaced_when_whole(path) as stream:
            np.save(stream, table)
        return DomainInfo(
            name=domain.name,
            key_prefix=prefix,
            table=path.name,
            samples=num,
            sha256=file_sha256(path),
        )

    def _pack_shard(
        self,
        path: Path,
        domain: DomainListing,
        prefix: str,
        ranks: Int64Array,
        table: npt.NDArray[np.void],
    ) -> None:
        """Write one shard and fill its samples' rows of the table."""
        from webdataset.writer import TarWriter  # here: importing webdataset imports torch

        with replaced_when_whole(path) as stream:
            with TarWriter(stream, encoder=False, mtime=0) as writer:
                for rank in ranks:
                    sample = self._sample(domain, prefix, int(rank))
                    image = sample[member_suffix(domain.paths[rank])]
                    table["size"][rank] = len(image)
                    table["crc32"][rank] = zlib.crc32(image)
                    writer.write(sample)
        table["shard"][ranks] = len(self._shards)
        with tarfile.open(path, "r:") as archive:
            offsets = {member.name: member.offset_data for member in archive}
        for rank in ranks:
            name = f"{sample_key(prefix, int(rank))}.{member_suffix(domain.paths[rank])}"
            table["offset"][rank] = offsets[name]
        self._shards.append(
            ShardInfo(
                file=path.name,
                samples=len(ranks),
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
            )
        )

    def _sample(self, domain: DomainListing, prefix: str, rank: int) -> dict[str, Any]:
        """Read one image and build its members."""
        path = domain.paths[rank]
        source = self.listing.root / domain.name / path
        try:
            image = source.read_bytes()
        except OSError as error:
            raise unreadable(source, error) from error
        if not image:
            log.warning("%s is empty; it is stored, and replaced when training", source)
        label = domain.labels[rank]
        about = {
            "class_name": self.listing.classes[label],
            "domain": domain.name,
            "index": rank,
            "path": f"{domain.name}/{path}",
        }
        return {
            "__key__": sample_key(prefix, rank),
            member_suffix(path): image,
            "cls": str(label).encode(),
            "json": json.dumps(about).encode(),
        }


def source_sha256(listing: Listing, dataset: str, shard_size: int) -> str:
    """Hash what is to be converted.

    Args:
        listing: The images.
        dataset: Name of the dataset.
        shard_size: Largest number of samples of one shard.

    Returns:
        sha256 over the settings, file names and file sizes in order, as hexadecimal digits.

    Raises:
        DamagedDataError: If an image is not there.
    """
    digest = hashlib.sha256(f"{dataset}\0{shard_size}\n".encode())
    for domain in listing.domains:
        for path in domain.paths:
            source = listing.root / domain.name / path
            try:
                size = source.stat().st_size
            except OSError as error:
                raise unreadable(source, error) from error
            line = f"{domain.name}/{path}\0{size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
