"""One shard, written and read back: a plain tar file whose bytes depend on its samples alone."""

import errno
import hashlib
import io
import json
import mmap
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shards.durable import replaced_when_whole
from shards.errors import DamagedDataError
from shards.read.layout import ShardInfo, file_sha256, sample_key
from shards.write.shard_plan import ShardTask, unreadable

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

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def tell(self) -> int:
        return self.stream.tell()


def member_suffix(path: str) -> str:
    """The extension of a member that holds an image file: in lower case, `jpg` for `jpeg`."""
    suffix = path.rpartition(".")[2].lower()
    return "jpg" if suffix == "jpeg" else suffix


def pack_shard(task: ShardTask, out: Path) -> PackedShard:
    """Write one shard into the folder `out`, unless an earlier run finished it, and read it back.

    What it gives for the index is taken from the bytes in the file.

    Raises:
        DamagedDataError: an image cannot be read, or changed since the plan was made.
        OSError: the output cannot be written, or reads back differently.
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
            for number, size in enumerate(task.sizes):
                image = _read_image(task, number, int(size), path.parent, notes)
                for name, content in _members(task, number, image):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    member.mode = 0o444
                    member.uname = member.gname = "bigdata"  # as webdataset's own writer
                    archive.addfile(member, io.BytesIO(content))
    return hashed.digest.hexdigest()


def _read_image(task: ShardTask, number: int, size: int, out: Path, notes: list[str]) -> bytes:
    """Read a source image and check that it still has the planned size."""
    source, start = task.folder / task.paths[number], None
    if task.extents is not None:
        file, start = task.extents[number][:2]
        source = out / file  # an absolute path stays as it is
    try:
        with source.open("rb") as stream:
            stream.seek(start or 0)
            image = stream.read(-1 if start is None else size)
    except OSError as error:
        raise unreadable(source, error) from error
    if len(image) != size:
        raise DamagedDataError(
            f"{source}: has {len(image)} bytes, had {size} when listed; convert again when nothing "
            "changes the images any more"
        )
    if not image:
        named = source if start is None else f"{task.domain_name}/{task.paths[number]}"
        notes.append(f"{named} is empty; it is stored, and replaced when training")
    return image


def _members(task: ShardTask, number: int, image: bytes) -> list[tuple[str, bytes]]:
    """Name and fill the members of one sample, in the order in which they are stored."""
    place, path, label = int(task.places[number]), task.paths[number], task.labels[number]
    about = {
        "class_name": task.classes[label],
        "domain": task.domain_name,
        "index": place,
        "path": f"{task.domain_name}/{path}",
    }
    contents = {
        member_suffix(path): image,
        "cls": str(label).encode(),
        "json": json.dumps(about).encode(),
    }
    key = sample_key(task.prefix, place)
    return [(f"{key}.{suffix}", contents[suffix]) for suffix in sorted(contents)]


def _measure(task: ShardTask, path: Path) -> npt.NDArray[np.void]:
    """Find the images in a finished shard."""
    rows = np.zeros(len(task.places), dtype=ROW_DTYPE)
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        tarfile.open(fileobj=stream, mode="r:") as archive,
    ):
        members = {member.name: member for member in archive}
        for number, (place, source) in enumerate(zip(task.places, task.paths, strict=True)):
            member = members[f"{sample_key(task.prefix, int(place))}.{member_suffix(source)}"]
            start, end = member.offset_data, member.offset_data + member.size
            rows[number] = (start, member.size, zlib.crc32(data[start:end]))
    return rows
