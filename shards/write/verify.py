"""The check of a whole shard set against its index, byte by byte."""

import functools
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.config import MAX_PIXELS
from shards.errors import DamagedDataError, DataConfigError
from shards.read.checking import regular_file
from shards.read.index import ShardIndex
from shards.read.layout import INFO_NAME, file_sha256, stock_info
from shards.read.members import plain_members
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


def verify_shards(
    index: ShardIndex, *, deep: bool, jobs: int = 1, max_pixels: int = MAX_PIXELS
) -> VerifyReport:
    """Compare everything stored with the index.

    Args:
        index: an opened set; opening has checked the sizes and the sample tables.
        deep: also decode every image with Pillow. Images that were incomplete when they were
            converted are logged, not counted as problems: they can be used.
        jobs: number of processes.
        max_pixels: images with more cannot be decoded.

    Raises:
        DataConfigError: the set is remote.
        OutputError: a process was killed from outside.
    """
    if index.remote:
        raise DataConfigError(
            f"{index.root}: only the cache of a remote set; verify it where it is stored"
        )
    problems = list(_check_folder(index))
    of_shards: dict[int, list[str]] = {}
    bad_images = scaled = 0
    check = functools.partial(_check_shard, index=index, deep=deep, max_pixels=max_pixels)
    with progress("verifying", sum(shard.samples for shard in index.shards)) as advance:
        numbers = range(len(index.shards))
        for number, found in run_tasks(check, numbers, min(jobs, len(numbers))):
            of_shards[number], incomplete, bad, deeper = found
            bad_images += bad
            scaled += deeper
            for line in incomplete:
                log.warning("%s", line)
            advance(index.shards[number].samples)
    if scaled:
        log.warning("16-bit grey images, scaled to 8 bits when they are read: %d", scaled)
    problems += [line for number in numbers for line in of_shards[number]]
    return VerifyReport(problems, bad_images)


def _check_folder(index: ShardIndex) -> Iterator[str]:
    """Yield the problems of files beside the shards, and of `_info.json`."""
    known = {shard.file for shard in index.shards}
    for name in sorted(os.listdir(index.root)):
        if name.endswith(".tar") and name not in known:
            yield f"{index.root / name}: a shard that is not in the index; other readers may use it"
    path = index.root / INFO_NAME
    try:
        regular_file(path)
        if json.loads(path.read_bytes()) != stock_info(index.domain_infos, index.shards):
            yield f"{path}: does not describe the shards of the index"
    except (OSError, ValueError, RecursionError, DamagedDataError) as error:
        yield f"{path}: cannot be read ({error})"


def _check_shard(
    number: int, index: ShardIndex, deep: bool, max_pixels: int
) -> tuple[list[str], list[str], int, int]:
    """Check one shard; gives problems, incomplete images, and how many are bad, and are scaled."""
    check, info = _ShardCheck(index, number, deep, max_pixels), index.shards[number]
    path = index.root / info.file
    try:
        if file_sha256(path) != info.sha256:
            check.problems.append("sha256 differs from the index")
        check.compare_members(path)
    except (OSError, DamagedDataError) as error:
        check.problems.append(f"cannot be read ({error})")
    problems = check.problems + check.named(check.unusable)
    if len(problems) > _MAX_LINES:
        problems[_MAX_LINES:] = [f"and {len(problems) - _MAX_LINES} more problems"]
    return (
        [f"{path}: {line}" for line in problems],
        [f"{path}: {line}" for line in check.named(check.incomplete)],
        len(check.rows) - check.sound,
        check.scaled,
    )


class _ShardCheck:
    """What is found in one shard; of images by key, since their paths come later in the file."""

    def __init__(self, index: ShardIndex, number: int, deep: bool, max_pixels: int) -> None:
        self.index, self.samples = index, index.shards[number].samples
        self.deep, self.max_pixels = deep, max_pixels
        domains = range(len(index.domains))
        mine = [np.flatnonzero(index.table(domain)["shard"] == number) for domain in domains]
        self.domain = max(domains, key=lambda domain: len(mine[domain]))  # a shard belongs to one
        rows = index.table(self.domain)[mine[self.domain]]
        self.rows = {index.key(self.domain, int(row["rank"])): row for row in rows}
        self.problems: list[str] = []  # of anything but an image
        self.unusable: list[tuple[str, str]] = []
        self.incomplete: list[tuple[str, str]] = []  # can be used as far as they go
        self.sound = self.scaled = 0
        self.paths: dict[str, str] = {}  # original ones

    def named(self, images: list[tuple[str, str]]) -> list[str]:
        return [f"sample {key}{self.paths.get(key, '')}: {fault}" for key, fault in images]

    def compare_members(self, path: Path) -> None:
        if len(self.rows) != self.samples:
            self.problems.append(
                f"{self.samples} samples expected, the tables name {len(self.rows)}"
            )
        seen: dict[str, list[str]] = {key: [] for key in self.rows}
        for member in plain_members(path):
            key, _, suffix = member.name.partition(".")
            if key not in self.rows:
                self.problems.append(f"member {member.name} is not in the index")
                continue
            kind = suffix if suffix in ("cls", "json") else "image"
            seen[key].append(kind)
            if kind == "image":
                self._check_image(key, member.offset, member.content)
            else:
                self._check_text(key, kind, member.content)
        for key, kinds in seen.items():
            if not kinds:
                self.problems.append(f"sample {key} is missing")
                continue
            self.problems += [
                f"sample {key}: {kinds.count(kind)} members of kind {kind}, expected 1"
                for kind in ("image", "cls", "json")
                if kinds.count(kind) != 1
            ]

    def _check_text(self, key: str, kind: str, data: bytes) -> None:
        """Note the problems of a label or description."""
        label, classes = int(self.rows[key]["label"]), self.index.classes
        try:
            value: Any = json.loads(data)
        except (ValueError, RecursionError):
            self.problems.append(f"sample {key}: its .{kind} is not readable")
            return
        if kind == "cls":
            if value != label:
                self.problems.append(f"sample {key}: label {value}, expected {label}")
            return
        about = value if isinstance(value, dict) else {}
        if "path" in about:
            self.paths[key] = f" ({about['path']})"
        wanted = {
            "domain": self.index.domains[self.domain],
            "class_name": classes[label] if label < len(classes) else None,
            "index": int(self.rows[key]["rank"]),
        }
        self.problems += [
            f"sample {key}: its .json does not give {entry} {want!r}"
            for entry, want in wanted.items()
            if about.get(entry) != want
        ]

    def _check_image(self, key: str, offset: int, data: bytes) -> None:
        """Note what is wrong with an image's bytes, or that nothing is."""
        row, wrong = self.rows[key], None
        if (offset, len(data)) != (int(row["offset"]), int(row["size"])):
            there = f"{row['size']} at {row['offset']}"
            wrong = f"{len(data)} bytes at offset {offset}, expected {there}"
        elif zlib.crc32(data) != int(row["crc32"]):
            wrong = "crc32 differs from the index"
        if wrong:
            self.unusable.append((key, wrong))
        error = self._decode_error(data) if self.deep else None
        if error is None:
            self.sound += not wrong  # at most once for a key: the offset was right
        elif self._decode_error(data, incomplete=True):
            self.unusable.append((key, f"cannot be decoded ({error})"))
        else:
            self.incomplete.append((key, f"the image is incomplete ({error})"))

    def _decode_error(self, data: bytes, *, incomplete: bool = False) -> str | None:
        """Try to decode an image, or what there is of an incomplete one."""
        from shards.pixels import image_file  # here: only the deep check needs Pillow

        try:
            image = image_file.open_rgb(data, incomplete=incomplete, max_pixels=self.max_pixels)
        except ValueError as error:
            return str(error)
        self.scaled += image_file.SCALED in image.info
        return None
