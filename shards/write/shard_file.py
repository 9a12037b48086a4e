"""One shard, written and read back: a plain tar file whose bytes depend on its samples alone."""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import secrets
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from shards.errors import DamagedDataError
from shards.read.layout import ShardInfo, file_sha256, sample_key
from shards.write.shard_plan import PARTIAL, ShardTask, unreadable

if TYPE_CHECKING:
    from typing_extensions import Buffer

ROW_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """A finished shard."""

    info: ShardInfo
    rows: npt.NDArray[np.void]
    """`ROW_DTYPE` array [samples] in the shard's order."""
    notes: tuple[str, ...]
    """What the user should know about it."""


class _HashedStream(io.BufferedIOBase):
    """Passes on what is written to it and hashes it on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: "Buffer") -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def tell(self) -> int:
        return self.stream.tell()


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it has been written completely.

    The temporary name is a new one every time, so that a process that outlives its parent cannot
    interfere with the next run.

    Args:
        path: Final name of the file.

    Yields:
        A binary stream to write to.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power, where the file system can do that.

    Args:
        folder: The folder.

    Raises:
        OSError: If the storage fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def member_suffix(path: str) -> str:
    """Give the member name's extension for an image file.

    Args:
        path: Name of the image file.

    Returns:
        The extension in lower case without its dot, `jpg` for `jpeg`.
    """
    suffix = path.rpartition(".")[2].lower()
    return "jpg" if suffix == "jpeg" else suffix


def pack_shard(task: ShardTask, out: Path) -> PackedShard:
    """Write one shard, unless an earlier run finished it, and read it back.

    Args:
        task: What it holds.
        out: Existing folder of the shard set.

    Returns:
        What the index needs to know, taken from the bytes in the file.

    Raises:
        DamagedDataError: If an image cannot be read, or changed since the plan was made.
        OSError: If the output cannot be written, or reads back differently.
    """
    path = out / task.file
    notes: list[str] = []
    sha256 = task.sha256
    if sha256 is not None and file_sha256(path) != sha256:
        notes.append(f"{path}: not as an earlier run wrote it; written again")
        sha256 = None
    if sha256 is None:
        sha256 = _write(task, path, notes)
        if file_sha256(path) != sha256:
            path.unlink()
            raise OSError(errno.EIO, f"{path} reads back differently from what was written")
    rows = _measure(task, path)
    info = ShardInfo(file=path.name, samples=len(rows), bytes=path.stat().st_size, sha256=sha256)
    return PackedShard(info=info, rows=rows, notes=tuple(notes))


def _write(task: ShardTask, path: Path, notes: list[str]) -> str:
    """Write the tar file; give its sha256."""
    with replaced_when_whole(path) as stream:
        hashed = _HashedStream(stream)
        with tarfile.open(fileobj=hashed, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
            for place, size in enumerate(task.sizes):
                image = _read_image(task.folder / task.paths[place], int(size), notes)
                for name, content in _members(task, place, image):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    member.mode = 0o444
                    member.uname = member.gname = "bigdata"  # as webdataset's own writer
                    archive.addfile(member, io.BytesIO(content))
    return hashed.digest.hexdigest()


def _read_image(source: Path, size: int, notes: list[str]) -> bytes:
    """Read a source image and check that it still has the planned size."""
    try:
        image = source.read_bytes()
    except OSError as error:
        raise unreadable(source, error) from error
    if len(image) != size:
        raise DamagedDataError(
            f"{source}: has {len(image)} bytes, had {size} when listed; convert again when nothing "
            "changes the images any more"
        )
    if not image:
        notes.append(f"{source} is empty; it is stored, and replaced when training")
    return image


def _members(task: ShardTask, place: int, image: bytes) -> list[tuple[str, bytes]]:
    """Name and fill the members of one sample, in the order in which they are stored."""
    rank, path, label = int(task.ranks[place]), task.paths[place], task.labels[place]
    about = {
        "class_name": task.class_names[place],
        "domain": task.domain,
        "index": rank,
        "path": f"{task.domain}/{path}",
    }
    contents = {
        member_suffix(path): image,
        "cls": str(label).encode(),
        "json": json.dumps(about).encode(),
    }
    key = sample_key(task.prefix, rank)
    return [(f"{key}.{suffix}", contents[suffix]) for suffix in sorted(contents)]


def _measure(task: ShardTask, path: Path) -> npt.NDArray[np.void]:
    """Find the images in a finished shard."""
    rows = np.zeros(len(task.ranks), dtype=ROW_DTYPE)
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        tarfile.open(fileobj=stream, mode="r:") as archive,
    ):
        members = {member.name: member for member in archive}
        for place, (rank, source) in enumerate(zip(task.ranks, task.paths, strict=True)):
            member = members[f"{sample_key(task.prefix, int(rank))}.{member_suffix(source)}"]
            start, end = member.offset_data, member.offset_data + member.size
            rows[place] = (start, member.size, zlib.crc32(data[start:end]))
    return rows
