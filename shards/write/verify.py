"""The check of a whole shard set against its index, byte by byte."""

import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import DataConfigError
from shards.read.index import ShardIndex
from shards.read.layout import INFO_NAME, ShardInfo, file_sha256, sample_key, stock_info
from shards.write.progress import progress
from shards.write.worker_pool import run_tasks

log = logging.getLogger(__name__)

_MAX_LINES = 20  # of one shard; a damaged header can hide a thousand samples


class VerifyReport(NamedTuple):
    """What a check has found."""

    problems: list[str]
    """One line per problem; empty when the set is sound."""
    bad_images: int
    """Number of images that cannot be used as they are, incomplete ones included."""


def verify_shards(index: ShardIndex, *, deep: bool, jobs: int = 1) -> VerifyReport:
    """Compare everything stored with the index.

    Args:
        index: an opened set; opening has checked the sizes and the sample tables.
        deep: also decode every image with Pillow. Images that were incomplete when they were
            converted are logged, not counted as problems: they can be used.
        jobs: number of processes.

    Raises:
        DataConfigError: the set is remote.
        OutputError: a process was killed from outside.
    """
    if index.remote:
        raise DataConfigError(
            f"{index.root}: only the cache of a remote set; verify it where it is stored"
        )
    problems = list(_check_folder(index))
    shards: dict[int, _ShardReport] = {}
    with progress("verifying", sum(shard.samples for shard in index.shards)) as advance:
        checks = _checks(index, deep)
        for number, found in run_tasks(_ShardCheck.run, checks, min(jobs, len(index.shards))):
            shards[number] = found
            for line in found.incomplete:
                log.warning("%s", line)
            advance(index.shards[number].samples)
    problems += [line for number in sorted(shards) for line in shards[number].problems]
    return VerifyReport(problems, sum(shard.bad_images for shard in shards.values()))


def _check_folder(index: ShardIndex) -> Iterator[str]:
    """Yield the problems of tables, of files beside the shards, and of `_info.json`."""
    for domain, name in enumerate(index.domains):
        table = index.table(domain)
        if not np.array_equal(table["rank"], np.arange(len(table))):
            yield f"{name}: ranks in the sample table are not 0..{len(table) - 1}"
        if len(table) and int(table["label"].max()) >= len(index.classes):
            yield f"{name}: a label in the sample table names no class"
    known = {shard.file for shard in index.shards}
    for name in sorted(os.listdir(index.root)):
        if name.endswith(".tar") and name not in known:
            yield f"{index.root / name}: a shard that is not in the index; other readers may use it"
    path = index.root / INFO_NAME
    try:
        if json.loads(path.read_bytes()) != stock_info(index.domain_infos, index.shards):
            yield f"{path}: does not describe the shards of the index"
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read ({error})"


def _checks(index: ShardIndex, deep: bool) -> Iterator["_ShardCheck"]:
    """Yield what the index says, shard by shard; a shard belongs to one domain."""
    domains = range(len(index.domains))
    columns = [index.table(domain)["shard"].copy() for domain in domains]
    for number, info in enumerate(index.shards):
        places = [np.flatnonzero(column == number) for column in columns]
        domain = max(domains, key=lambda domain: len(places[domain]))
        yield _ShardCheck(
            path=index.root / info.file,
            info=info,
            domain_name=index.domains[domain],
            prefix=index.domain_infos[domain].key_prefix,
            classes=index.classes,
            rows=index.table(domain)[places[domain]],
            deep=deep,
        )


class _ShardReport(NamedTuple):
    """What is told of one shard."""

    problems: list[str]
    incomplete: list[str]
    bad_images: int


@dataclass(kw_only=True)
class _ShardCheck:
    """What the index says of one shard, and what is found there.

    Findings on images are kept by key, since their paths come later in the file.
    """

    path: Path
    info: ShardInfo
    domain_name: str
    prefix: str
    classes: tuple[str, ...]
    rows: npt.NDArray[np.void]
    """Those of its samples in the domain's table."""
    deep: bool
    problems: list[str] = field(default_factory=list)
    """Of anything but an image."""
    unusable: list[tuple[str, str]] = field(default_factory=list)
    incomplete: list[tuple[str, str]] = field(default_factory=list)
    """Images that can be used as far as they go."""
    sound: set[str] = field(default_factory=set)
    texts: dict[str, bytes] = field(default_factory=dict)
    """Descriptions."""

    def run(self) -> _ShardReport:
        try:
            if file_sha256(self.path) != self.info.sha256:
                self.problems.append("sha256 differs from the index")
            self._compare_members()
        except (OSError, tarfile.TarError) as error:
            self.problems.append(f"cannot be read ({error})")
        problems = self.problems + self._named(self.unusable)
        if len(problems) > _MAX_LINES:
            problems[_MAX_LINES:] = [f"and {len(problems) - _MAX_LINES} more problems"]
        return _ShardReport(
            [f"{self.path}: {line}" for line in problems],
            [f"{self.path}: {line}" for line in self._named(self.incomplete)],
            len(self.rows) - len(self.sound),
        )

    def _named(self, images: list[tuple[str, str]]) -> list[str]:
        """Phrase what is wrong with images, each with its key and, if known, original path."""
        lines = []
        for key, fault in images:
            try:
                path = f" ({json.loads(self.texts[key])['path']})"
            except (KeyError, TypeError, ValueError):
                path = ""
            lines.append(f"sample {key}{path}: {fault}")
        return lines

    def _compare_members(self) -> None:
        rows = {sample_key(self.prefix, int(row["rank"])): row for row in self.rows}
        if len(rows) != self.info.samples:
            self.problems.append(
                f"{self.info.samples} samples expected, the tables name {len(rows)}"
            )
        seen: dict[str, list[str]] = {key: [] for key in rows}
        with tarfile.open(self.path, "r:") as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                if key not in rows:
                    self.problems.append(f"member {member.name} is not in the index")
                    continue
                stream = archive.extractfile(member)
                data = stream.read() if stream else b""
                kind = suffix if suffix in ("cls", "json") else "image"
                seen[key].append(kind)
                if kind == "image":
                    self._check_image(key, member.offset_data, data, rows[key])
                else:
                    self._check_text(key, kind, data, rows[key])
        for key, kinds in seen.items():
            if not kinds:
                self.problems.append(f"sample {key} is missing")
                continue
            self.problems += [
                f"sample {key}: {kinds.count(kind)} members of kind {kind}, expected 1"
                for kind in ("image", "cls", "json")
                if kinds.count(kind) != 1
            ]

    def _check_text(self, key: str, kind: str, data: bytes, row: np.void) -> None:
        """Note the problems of a label or description."""
        label = int(row["label"])
        if kind == "json":
            self.texts[key] = data
        try:
            value: Any = json.loads(data)
        except ValueError:
            self.problems.append(f"sample {key}: its .{kind} is not readable")
            return
        if kind == "cls":
            if value != label:
                self.problems.append(f"sample {key}: label {value}, expected {label}")
            return
        name = self.classes[label] if label < len(self.classes) else None
        wanted = {"domain": self.domain_name, "class_name": name, "index": int(row["rank"])}
        self.problems += [
            f"sample {key}: its .json does not give {entry} {want!r}"
            for entry, want in wanted.items()
            if not isinstance(value, dict) or value.get(entry) != want
        ]

    def _check_image(self, key: str, offset: int, data: bytes, row: np.void) -> None:
        """Note what is wrong with an image's bytes, or that nothing is."""
        wrong = None
        if (offset, len(data)) != (int(row["offset"]), int(row["size"])):
            there = f"{row['size']} at {row['offset']}"
            wrong = f"{len(data)} bytes at offset {offset}, expected {there}"
        elif zlib.crc32(data) != int(row["crc32"]):
            wrong = "crc32 differs from the index"
        if wrong:
            self.unusable.append((key, wrong))
        error = _decode_error(data) if self.deep else None
        if error is None:
            if not wrong:
                self.sound.add(key)
        elif _decode_error(data, incomplete=True):
            self.unusable.append((key, f"cannot be decoded ({error})"))
        else:
            self.incomplete.append((key, f"the image is incomplete ({error})"))


def _decode_error(data: bytes, *, incomplete: bool = False) -> str | None:
    """Try to decode an image, or what there is of an incomplete one."""
    from shards.pixels.image_file import open_rgb  # here: only the deep check needs Pillow

    try:
        open_rgb(data, incomplete=incomplete)
    except ValueError as error:
        return str(error)
    return None
