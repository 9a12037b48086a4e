"""The members of a shard, whose headers may say anything."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shards.errors import DamagedDataError


class Member(NamedTuple):
    """One file in a shard; `offset` is that of its first byte."""

    name: str
    offset: int
    content: bytes


def plain_members(path: Path, *, folders: bool = False) -> Iterator[Member]:
    """The members of a tar file, one after the other; `folders` passes over those there may be.

    Raises `DamagedDataError`: it cannot be read, or holds other things than plain files.
    """
    end = 0
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            size = os.fstat(stream.fileno()).st_size
            for member in archive:
                if folders and member.isdir():
                    continue
                start, before = member.offset_data, end
                end = start + member.size
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
                if not plain or not before < start <= end <= size:  # else it could go in circles
                    raise DamagedDataError(f"member {member.name!r:.80} is no plain file")
                yield Member(member.name, start, os.pread(stream.fileno(), member.size, start))
    except DamagedDataError:
        raise
    except Exception as error:  # a header that is odd enough raises anything
        raise DamagedDataError(str(error)[:200] or type(error).__name__) from error
