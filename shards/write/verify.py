"""The check of a whole shard set against its index, byte by byte."""

import functools
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class _ShardCheck:
    """What the index says of one shard; `rows` are those of its samples in the domain's table."""

    path: Path
    info: ShardInfo
    domain: str
    prefix: str
    classes: tuple[str, ...]
    rows: npt.NDArray[np.void]


class _ShardFindings:
    """What was found in one shard; of images by key, since their paths come later in the file.

    Attributes:
        problems: One line per problem of anything but an image.
        unusable: Key of an image and what is wrong with it.
        incomplete: The same of images that can be used as far as they go.
        sound: Keys of the images that can be used as they are.
        texts: Key to description.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.unusable: list[tuple[str, str]] = []
        self.incomplete: list[tuple[str, str]] = []
        self.sound: set[str] = set()
        self.texts: dict[str, bytes] = {}


class _ShardReport(NamedTuple):
    """What is told of one shard: problems, incomplete images, number of images with a fault."""

    problems: list[str]
    incomplete: list[str]
    bad_images: int


class VerifyReport(NamedTuple):
    """What a check has found.

    Attributes:
        problems: One line per problem; empty when the set is sound.
        bad_images: Number of images that cannot be used as they are, incomplete ones included.
    """

    problems: list[str]
    bad_images: int


def verify_shards(index: ShardIndex, *, deep: bool, jobs: int = 1) -> VerifyReport:
    """Compare everything stored with the index.

    Args:
        index: An opened set; opening has checked the sizes and the sample tables.
        deep: Also decode every image with Pillow. Images that were incomplete when they were
            converted are logged, not counted as problems: they can be used.
        jobs: Number of processes.

    Returns:
        The problems, and how many images they concern.

    Raises:
        DataConfigError: If the set is remote.
        OutputError: If a process is killed from outside.
    """
    if index.remote:
        raise DataConfigError(
            f"{index.root}: only the cache of a remote set; verify it where it is stored"
        )
    problems = list(_check_folder(index))
    shards: dict[int, _ShardReport] = {}
    total = sum(index.num_samples(env) for env in range(len(index.domains)))
    with progress("verifying", total) as advance:
        check = functools.partial(_check_shard, deep=deep)
        for number, found in run_tasks(check, _checks(index), min(jobs, len(index.shards))):
            shards[number] = found
            for line in found.incomplete:
                log.warning("%s", line)
            advance(index.shards[number].samples)
    problems += [line for number in sorted(shards) for line in shards[number].problems]
    return VerifyReport(problems, sum(shard.bad_images for shard in shards.values()))


def _check_folder(index: ShardIndex) -> Iterator[str]:
    """Yield the problems of tables, of files beside the shards, and of `_info.json`."""
    for env, name in enumerate(index.domains):
        table = index.table(env)
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


def _checks(index: ShardIndex) -> Iterator[_ShardCheck]:
    """Yield what the index says, shard by shard; a shard belongs to one domain."""
    envs = range(len(index.domains))
    order = [np.argsort(index.table(env)["shard"], kind="stable") for env in envs]
    sorted_shards = [index.table(env)["shard"][order[env]] for env in envs]
    for number, info in enumerate(index.shards):
        spans = [np.searchsorted(column, [number, number + 1]) for column in sorted_shards]
        env = max(envs, key=lambda env: int(np.diff(spans[env])[0]))
        ranks = order[env][spans[env][0] : spans[env][1]]
        yield _ShardCheck(
            path=index.root / info.file,
            info=info,
            domain=index.domains[env],
            prefix=index.domain_infos[env].key_prefix,
            classes=index.classes,
            rows=np.array(index.table(env)[ranks]),
        )


def _check_shard(check: _ShardCheck, deep: bool) -> _ShardReport:
    """List the problems of one shard, and its incomplete images."""
    found = _ShardFindings()
    try:
        if file_sha256(check.path) != check.info.sha256:
            found.problems.append("sha256 differs from the index")
        found.problems.extend(_compare_members(check, deep, found))
    except (OSError, tarfile.TarError) as error:
        found.problems.append(f"cannot be read ({error})")
    problems = found.problems + _named(found.unusable, found.texts)
    if len(problems) > _MAX_LINES:
        problems[_MAX_LINES:] = [f"and {len(problems) - _MAX_LINES} more problems"]
    return _ShardReport(
        [f"{check.path}: {line}" for line in problems],
        [f"{check.path}: {line}" for line in _named(found.incomplete, found.texts)],
        len(check.rows) - len(found.sound),
    )


def _named(images: list[tuple[str, str]], texts: dict[str, bytes]) -> list[str]:
    """Phrase what is wrong with images, each with its key and, so far as known, original path."""
    lines = []
    for key, wrong in images:
        try:
            path = f" ({json.loads(texts[key])['path']})"
        except (KeyError, TypeError, ValueError):
            path = ""
        lines.append(f"sample {key}{path}: {wrong}")
    return lines


def _compare_members(check: _ShardCheck, deep: bool, found: _ShardFindings) -> Iterator[str]:
    """Yield the differences between a shard's members and the index; note images apart."""
    expected = {sample_key(check.prefix, int(row["rank"])): row for row in check.rows}
    if len(expected) != check.info.samples:
        yield f"{check.info.samples} samples expected, the tables name {len(expected)}"
    seen: dict[str, list[str]] = {key: [] for key in expected}
    with tarfile.open(check.path, "r:") as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            if key not in expected:
                yield f"member {member.name} is not in the index"
                continue
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            seen[key].append(suffix if suffix in ("cls", "json") else "image")
            if suffix == "json":
                found.texts[key] = data
            if suffix in ("cls", "json"):
                yield from _check_text(check, key, suffix, data, expected[key])
            else:
                _check_image(key, member.offset_data, data, expected[key], deep, found)
    for key, kinds in seen.items():
        if not kinds:
            yield f"sample {key} is missing"
            continue
        for kind in ("image", "cls", "json"):
            if kinds.count(kind) != 1:
                yield f"sample {key}: {kinds.count(kind)} members of kind {kind}, expected 1"


def _check_text(
    check: _ShardCheck, key: str, suffix: str, data: bytes, row: np.void
) -> Iterator[str]:
    """Yield the problems of a label or description."""
    try:
        value: Any = json.loads(data)
    except ValueError:
        yield f"sample {key}: its .{suffix} is not readable"
        return
    label = int(row["label"])
    if suffix == "cls":
        if value != label:
            yield f"sample {key}: label {value}, expected {label}"
        return
    name = check.classes[label] if label < len(check.classes) else None
    wanted = {"domain": check.domain, "class_name": name, "index": int(row["rank"])}
    for field, want in wanted.items():
        if not isinstance(value, dict) or value.get(field) != want:
            yield f"sample {key}: its .json does not give {field} {want!r}"


def _check_image(
    key: str, offset: int, data: bytes, row: np.void, deep: bool, found: _ShardFindings
) -> None:
    """Note what is wrong with an image's bytes, or that nothing is."""
    wrong = None
    if (offset, len(data)) != (int(row["offset"]), int(row["size"])):
        wrong = f"{len(data)} bytes at offset {offset}, expected {row['size']} at {row['offset']}"
    elif zlib.crc32(data) != int(row["crc32"]):
        wrong = "crc32 differs from the index"
    if wrong:
        found.unusable.append((key, wrong))
    error = _decode_error(data) if deep else None
    if error is None:
        if not wrong:
            found.sound.add(key)
    elif _decode_error(data, incomplete=True):
        found.unusable.append((key, f"cannot be decoded ({error})"))
    else:
        found.incomplete.append((key, f"the image is incomplete ({error})"))


def _decode_error(data: bytes, *, incomplete: bool = False) -> str | None:
    """Try to decode an image, or what there is of an incomplete one."""
    from shards.pixels.image_file import open_rgb  # here: only the deep check needs Pillow

    try:
        open_rgb(data, incomplete=incomplete)
    except ValueError as error:
        return str(error)
    return None
