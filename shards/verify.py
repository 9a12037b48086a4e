"""The check of a whole shard set against its index, byte by byte."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from shards.index import ShardIndex
from shards.layout import ShardInfo, file_sha256


class _Expected(NamedTuple):
    """What the index says of one sample."""

    env: int
    rank: int
    offset: int
    size: int
    label: int
    crc32: int


def verify_shards(index: ShardIndex, *, deep: bool) -> list[str]:
    """Compare every shard with the index.

    Args:
        index: An opened set; opening has checked the sizes and the sample tables.
        deep: Also decode every image with Pillow.

    Returns:
        One line per problem; empty when the set is sound.
    """
    problems = []
    for env, name in enumerate(index.domains):
        table = index.table(env)
        if not np.array_equal(table["rank"], np.arange(len(table))):
            problems.append(f"{name}: ranks in the sample table are not 0..{len(table) - 1}")
        if len(table) and int(table["label"].max()) >= len(index.classes):
            problems.append(f"{name}: a label in the sample table names no class")
    for number, shard in enumerate(index.shards):
        path = index.root / shard.file
        try:
            if file_sha256(path) != shard.sha256:
                problems.append(f"{path}: sha256 differs from the index")
            problems += [f"{path}: {line}" for line in _check_shard(index, number, shard, deep)]
        except (OSError, tarfile.TarError) as error:
            problems.append(f"{path}: cannot be read ({error})")
    return problems


def _expected(index: ShardIndex, number: int) -> dict[str, _Expected]:
    """Collect what the index says of the samples of one shard, by key."""
    found = {}
    for env in range(len(index.domains)):
        table = index.table(env)
        for rank in np.flatnonzero(table["shard"] == number):
            row = table[rank]
            found[index.key(env, int(rank))] = _Expected(
                env,
                int(rank),
                int(row["offset"]),
                int(row["size"]),
                int(row["label"]),
                int(row["crc32"]),
            )
    return found


def _check_shard(index: ShardIndex, number: int, shard: ShardInfo, deep: bool) -> Iterator[str]:
    """Yield the problems of one shard."""
    expected = _expected(index, number)
    if len(expected) != shard.samples:
        yield f"{shard.samples} samples expected, the tables name {len(expected)}"
    images: set[str] = set()
    with tarfile.open(index.root / shard.file, "r:") as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            if key not in expected:
                yield f"member {member.name} is not in the index"
                continue
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if suffix in ("cls", "json"):
                yield from _check_text(index, key, suffix, data, expected[key])
            else:
                images.add(key)
                yield from _check_image(key, member.offset_data, data, expected[key], deep)
    for key in sorted(set(expected) - images):
        yield f"sample {key} is missing"


def _check_text(
    index: ShardIndex, key: str, suffix: str, data: bytes, expected: _Expected
) -> Iterator[str]:
    """Yield the problems of a label or description."""
    try:
        value: Any = json.loads(data)
    except ValueError:
        yield f"sample {key}: its .{suffix} is not readable"
        return
    if suffix == "cls":
        if value != expected.label:
            yield f"sample {key}: label {value}, expected {expected.label}"
        return
    wanted = {
        "domain": index.domains[expected.env],
        "class_name": index.classes[expected.label],
        "index": expected.rank,
    }
    for field, want in wanted.items():
        if not isinstance(value, dict) or value.get(field) != want:
            yield f"sample {key}: its .json does not give {field} {want!r}"


def _check_image(
    key: str, offset: int, data: bytes, expected: _Expected, deep: bool
) -> Iterator[str]:
    """Yield the problems of an image."""
    if (offset, len(data)) != (expected.offset, expected.size):
        yield (
            f"sample {key}: {len(data)} bytes at offset {offset}, expected {expected.size} "
            f"at {expected.offset}"
        )
    elif zlib.crc32(data) != expected.crc32:
        yield f"sample {key}: crc32 differs from the index"
    elif deep:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(data)) as image:
                image.convert("RGB")
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
            yield f"sample {key}: cannot be decoded ({error})"
