"""What a conversion will write, decided before it writes: which images go to which shard.

The plan is a pure function of the listing, the files' sizes and the settings, so that an
interrupted conversion can be continued by another process and ends with the same bytes.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.durable import PARTIAL
from shards.errors import DamagedDataError
from shards.randomness import Int64Array, UInt64Array, hash64, permutation
from shards.read.layout import FORMAT_VERSION, GROUPED_DTYPE, INDEX_NAME, INFO_NAME, key_prefixes
from shards.write.listing import STAGED_NAME, Extent, Listing

BLOCK = 512  # tar's unit
STATE_NAME = ".writer.state"
_STAT_THREADS = 16  # hides the latency of network file systems
_SMALL_BLOCKS = 5 * BLOCK  # three headers, label and description of a sample


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write: its samples in order, each with place, path, size and label."""

    file: str
    domain_name: str
    folder: Path
    prefix: str
    classes: tuple[str, ...]
    places: Int64Array
    paths: tuple[str, ...]
    sizes: Int64Array
    labels: tuple[int, ...]
    extents: tuple[Extent, ...] | None = None
    """Where the images' bytes are; None: in the files `paths` in `folder`."""
    sha256: str | None = None
    """Hash of the shard if an earlier run finished it."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All that a conversion writes; `prefixes` and `stems` name the domains in keys and files."""

    listing: Listing
    dataset: str
    prefixes: tuple[str, ...]
    stems: tuple[str, ...]
    tasks: tuple[ShardTask, ...]
    source_sha256: str
    """Over settings, file names and sizes in order; part of the index."""
    state_sha256: str
    """The same with modification times: what an unfinished conversion must agree on."""
    group_by: str | None = None
    groups: tuple[UInt64Array, ...] = ()
    """Of every domain the images' groups by place; empty if the split is DomainBed's."""

    def writes(self, name: str) -> bool:
        """Tell whether a file name is one that this conversion could write, finished or not."""
        name = re.sub(r"(\.[0-9a-f]{8})?" + re.escape(PARTIAL) + "$", "", name)
        stem = re.sub(r"(-\d{6}\.tar|\.npy)$", "", name)
        return name in (INDEX_NAME, INFO_NAME, STATE_NAME, STAGED_NAME) or (
            stem != name and stem in self.stems
        )

    def num_bytes(self) -> int:
        """Estimate the bytes of all shards and tables, within one block per sample."""
        images = sum(int(sample_bytes(task.sizes).sum()) for task in self.tasks)
        staged = sum(int(task.sizes.sum()) for task in self.tasks) if self.listing.stage else 0
        rows = sum(len(task.places) for task in self.tasks) * GROUPED_DTYPE.itemsize
        return images + staged + rows


def sample_bytes(sizes: Int64Array) -> Int64Array:
    """Estimate what images of some sizes take in a tar file with all that belongs to them."""
    return -(-sizes // BLOCK) * BLOCK + _SMALL_BLOCKS


def unreadable(path: Path, error: OSError) -> DamagedDataError:
    """Phrase the failure to read a source image."""
    return DamagedDataError(
        f"{path}: cannot be read ({error.strerror}); restore the file or name it in --exclude_list"
    )


def make_plan(
    listing: Listing,
    dataset: str,
    shard_size: int,
    shard_bytes: int,
    group_by: str | None = None,
    groups: tuple[UInt64Array, ...] = (),
    before: Sequence[str] = (),
) -> ShardPlan:
    """Decide what goes where; the numbers limit a shard as in `write_shards`.

    `before` are the prefixes of domains that these are to follow.

    Raises `DamagedDataError`: an image is not there.
    """
    prefixes = tuple(key_prefixes([domain.name for domain in listing.domains], before))
    stems = tuple(f"{key_prefixes([dataset])[0]}-{prefix}" for prefix in prefixes)
    settings = f"{dataset}\0{shard_size}\0{shard_bytes}\n".encode()
    settings += b"" if group_by is None else f"group_by {group_by}\n".encode()
    source, state = hashlib.sha256(settings), hashlib.sha256(settings)
    state.update(f"format {FORMAT_VERSION}\n".encode())
    tasks: list[ShardTask] = []
    for domain, prefix, stem in zip(listing.domains, prefixes, stems, strict=True):
        sizes, times = _stat_all(listing.root / domain.name, domain.paths, domain.extents)
        for path, size, time in zip(domain.paths, sizes, times, strict=True):
            line = f"{domain.name}/{path}\0{size}\n".encode("utf-8", "surrogateescape")
            source.update(line)
            state.update(line + f"{time}\n".encode())
        order = permutation(hash64("shards", domain.name), len(sizes))
        tasks += [
            ShardTask(
                file=f"{stem}-{number:06d}.tar", domain_name=domain.name, prefix=prefix,
                folder=listing.root / domain.name, classes=listing.classes, places=places,
                paths=tuple(domain.paths[place] for place in places), sizes=sizes[places],
                labels=tuple(domain.labels[place] for place in places),
                extents=domain.extents and tuple(domain.extents[place] for place in places),
            )
            for number, places in enumerate(_cut(order, sizes, shard_size, shard_bytes))
        ]  # fmt: skip
    return ShardPlan(
        listing=listing, dataset=dataset, prefixes=prefixes, stems=stems, tasks=tuple(tasks),
        source_sha256=source.hexdigest(), state_sha256=state.hexdigest(), group_by=group_by,
        groups=groups,
    )  # fmt: skip


def _cut(
    order: Int64Array, sizes: Int64Array, shard_size: int, shard_bytes: int
) -> Iterator[Int64Array]:
    """Cut the shuffled places of a domain into shards, each as full as both limits allow."""
    first, total = 0, 0
    for number, size in enumerate(sample_bytes(sizes[order]).tolist()):
        if number > first and (number - first == shard_size or total + size > shard_bytes):
            yield order[first:number]
            first, total = number, 0
        total += size
    if first < len(order):
        yield order[first:]


def _stat_all(
    folder: Path, paths: tuple[str, ...], extents: tuple[Extent, ...] | None
) -> tuple[Int64Array, Int64Array]:
    """Ask for the sizes in bytes and modification times in nanoseconds of many images."""

    def some(files: Sequence[str | Extent]) -> list[tuple[int, int]]:
        found = []
        for file in files:
            extent = Extent(file) if isinstance(file, str) else file
            if extent.start is not None:
                found.append((extent.size, extent.time))
                continue
            path = folder / extent.file
            try:
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                    raise OSError(errno.EINVAL, "no plain file")
            except OSError as error:
                raise unreadable(path, error) from error
            found.append((status.st_size, status.st_mtime_ns))
        return found

    files: Sequence[str | Extent] = extents or paths
    parts = [files[first : first + 500] for first in range(0, len(files), 500)]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        rows = [row for part in pool.map(some, parts) for row in part]
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
