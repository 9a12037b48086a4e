"""What comes from elsewhere and is believed only as far as it was checked: an index and its files.

A set may have been made to do harm. Its files are regular ones of their folder, of bounded size;
its names stay in the folder; its tables point at nothing that is not there.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from shards.errors import DamagedDataError, DataConfigError
from shards.read.layout import (
    FORMAT_VERSION,
    GROUPED_DTYPE,
    INDEX_NAME,
    REMEDY,
    TABLE_DTYPE,
    DomainInfo,
    ShardInfo,
    file_sha256,
    section_digest,
)

Info = TypeVar("Info", DomainInfo, ShardInfo)

INDEX_LIMIT = 32 << 20
"""Bytes of an index that is read at all; a shard takes some 150 of them."""
_TABLE_HEADER = 4096  # bytes, and more than numpy writes before the rows of a table
_ROWS = 1 << 20  # of a table, checked at a time
GROUP_BY = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,500}"
"""What a pattern that names groups may be, to be shown in one line."""
_PATTERNS = {
    "file": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.tar",
    "table": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.npy",
    "sha256": r"[0-9a-f]{64}",
    "key_prefix": r"[A-Za-z0-9_-]{1,99}",
    "name": r"(?!\.{0,2}\Z)[^/\x00]+",  # it was a folder's, and names others
    "group_by": GROUP_BY,
}
_UNIQUE = ("file", "name")


class IndexContent(NamedTuple):
    """What `index.json` says."""

    dataset: str
    classes: tuple[str, ...]
    domains: tuple[DomainInfo, ...]
    shards: tuple[ShardInfo, ...]
    group_by: str | None = None
    """The pattern whose groups the split keeps together; None for DomainBed's split."""


def regular_file(path: Path) -> os.stat_result:
    """The status of a file that is a regular one, or a link to one in the same folder or below.

    Raises:
        DamagedDataError: it is something else, which could hang a reader or lie anywhere.
        OSError: there is none.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
            raise DamagedDataError(
                f"{path}: a link that leaves its folder; replace it by the file itself, as "
                "`cp -rL` copies a folder"
            )
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedDataError(f"{path}: no regular file; {REMEDY}")
    return status


def read_index(path: Path) -> bytes:
    """The bytes of an index file.

    Raises:
        DamagedDataError: it is no regular file, or too large to be one.
        OSError: it cannot be read.
    """
    if regular_file(path).st_size > INDEX_LIMIT:
        raise DamagedDataError(f"{path}: more than {INDEX_LIMIT} bytes, so no index; {REMEDY}")
    return path.read_bytes()


def parse_index(where: str | Path, data: bytes) -> IndexContent:
    """The content of index.json, whose version, digests and every entry must be right."""
    try:
        content = json.loads(data)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataConfigError(
                f"{where}: format version {version!r:.40}, but this program reads version "
                f"{FORMAT_VERSION}; make the shard set again, or use the version that wrote it"
            )
        for section, expected in content.get("digests", {}).items():
            if section_digest(content.get(section)) != expected:
                raise DamagedDataError(
                    f"{where}: its {section!r:.40} were changed after it was written; {REMEDY}"
                )
        found = IndexContent(
            _text("dataset", "name", content["dataset"]),
            tuple(_text(at, "name", name) for at, name in _listed("classes", content["classes"])),
            _entries("domains", content["domains"], DomainInfo),
            _entries("shards", content["shards"], ShardInfo),
            content.get("group_by"),
        )  # fmt: skip
        if found.group_by is not None:
            _text("group_by", "group_by", found.group_by)
    except DataConfigError:  # itself a ValueError
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedDataError(
            f"{where}: not a shard index ({str(error)[:200]}); {REMEDY}"
        ) from error
    return found


def _text(where: str, kind: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(_PATTERNS[kind], value):
        what = "no file name of a shard set" if kind in ("file", "table") else f"no {kind}"
        raise ValueError(f"{where} = {value!r:.80} is {what}")
    return value


def _listed(section: str, values: object) -> Iterator[tuple[str, Any]]:
    """The entries of a section with their places, of which there is one at least."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{section} is no list, or an empty one")
    return ((f"{section}[{place}]", value) for place, value in enumerate(values))


def _entries(section: str, values: object, kind: type[Info]) -> tuple[Info, ...]:
    """The entries of a section, each value of which is of its type and in its range."""
    found, taken = [], set()
    for where, entry in _listed(section, values):
        info = kind(**entry)
        for name, value in vars(info).items():
            if name in _PATTERNS:
                _text(f"{where}.{name}", name, value)
            elif type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"{where}.{name} = {value!r:.80} is no number from 0 to 2^63 - 1")
            if name in _UNIQUE and (name, value) in taken:
                raise ValueError(f"{where}.{name} = {value!r:.80} is there before")
            taken.add((name, value))
        found.append(info)
    return tuple(found)


def most_bytes(info: DomainInfo) -> int:
    """Bytes that a domain's table has at most."""
    return _TABLE_HEADER + info.samples * GROUPED_DTYPE.itemsize


def load_table(root: Path, info: DomainInfo, content: IndexContent) -> npt.NDArray[np.void]:
    """A domain's table, mapped into memory after a check of its hash and of every row."""
    path = root / info.table
    try:
        if regular_file(path).st_size > most_bytes(info):
            raise DamagedDataError(f"{path}: too long for {info.samples} samples; {REMEDY}")
        if file_sha256(path) != info.sha256:
            raise DamagedDataError(f"{path}: sha256 differs from {INDEX_NAME}; {REMEDY}")
        table = map_table(path)
    except DamagedDataError:
        raise
    except Exception as error:  # numpy evaluates the header, which may be anything
        raise DamagedDataError(f"{path}: cannot be read ({str(error)[:200]}); {REMEDY}") from error
    expected = TABLE_DTYPE if content.group_by is None else GROUPED_DTYPE
    if table.dtype != expected or table.shape != (info.samples,):
        raise DamagedDataError(f"{path}: not the table {INDEX_NAME} describes; {REMEDY}")
    _check_rows(path, table, content)
    return table


def map_table(path: Path) -> npt.NDArray[np.void]:
    """A table mapped into memory, as a plain array: numpy's own kind is slow at single rows."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _check_rows(path: Path, table: npt.NDArray[np.void], content: IndexContent) -> None:
    """Raises `DamagedDataError` unless every row points at bytes of a shard, and at a class."""
    ends = np.array([shard.bytes for shard in content.shards], dtype=np.uint64)
    for first in range(0, len(table), _ROWS):
        rows = table[first : first + _ROWS]
        known = rows["shard"] < len(ends)
        end = ends[np.where(known, rows["shard"], 0)]
        wrong = {
            "shard": ~known,
            "label": rows["label"] >= len(content.classes),
            "rank": rows["rank"] != np.arange(first, first + len(rows)),
            "offset": rows["offset"] > end,
            "size": rows["size"] > end - np.minimum(rows["offset"], end),
        }
        for column, bad in wrong.items():
            if bad.any():
                place = int(bad.argmax())
                raise DamagedDataError(
                    f"{path}: sample {first + place} has {column} {rows[column][place]}, which is "
                    f"not in the set; {REMEDY}"
                )
