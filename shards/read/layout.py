"""The files of a shard set: their names, the table's row, what `index.json` holds.

`index.json` names the domains and classes in order and every shard with its size and sha256. One
`.npy` table per domain holds a row per sample, by its place in the domain's sorted file list.
`_info.json` repeats the shard names and counts in the form that timm's WebDataset reader expects.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import make_command

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
INFO_NAME = "_info.json"
WHOLE_SET = "train"  # timm's default split; here all domains
TABLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # number of the shard in index.json
        ("offset", "<u8"),  # first byte of the image in the shard
        ("size", "<u4"),  # bytes of the image
        ("label", "<u4"),
        ("rank", "<u4"),  # place in the domain's sorted file list; equals the row number
        ("crc32", "<u4"),  # of the image bytes
    ]
)
GROUPED_DTYPE = np.dtype([*TABLE_DTYPE.descr, ("group", "<u8")])
"""Of a set whose split keeps groups together: the hash of a group's name comes last."""
REMEDY = "restore the file, or move the folder away and make the shard set again"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file: name, number of samples, size in bytes, sha256 of its bytes."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DomainInfo:
    """One domain: its name, the prefix of its keys, and its table of samples."""

    name: str
    key_prefix: str
    table: str
    samples: int
    sha256: str


def file_sha256(path: Path) -> str:
    """The hash of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_prefixes(domains: Sequence[str], before: Sequence[str] = ()) -> list[str]:
    """Prefixes of keys and file names, one a domain: ASCII letters, digits, `_` and `-`, unique.

    `before` are the prefixes of the domains that come before these.
    """
    prefixes = [*before]
    for name in domains:
        prefix = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:48]
        taken = {earlier.lower() for earlier in prefixes}  # some file systems ignore case
        prefixes.append(prefix if prefix.lower() not in taken else f"{prefix}_env{len(prefixes)}")
    return prefixes[len(before) :]


def sample_key(prefix: str, place: int) -> str:
    """The key, without dots, of a sample: its domain's prefix and its place in the file list."""
    return f"{prefix}-{place:07d}"


def no_index(root: Path, error: OSError, dataset: str) -> str:
    """The message that there is no shard set, with the command that makes one."""
    here = f"shard set {str(root)!r} (data.root): the folder"
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        what = f"cannot be read ({error.strerror})"
    elif next(root.glob("[!.]*/"), None) is not None:  # a shard set has no folders inside
        return (
            f"{here} holds no {INDEX_NAME} but other folders, as an image folder does; make a "
            f"shard set of it with {make_command(dataset, root, 'my_shards')} and give that one"
        )
    else:
        what = f"holds no {INDEX_NAME}" if root.is_dir() else "does not exist"
    return f"{here} {what}; make a shard set with {make_command(dataset, out=root)}"


def section_digest(value: object) -> str:
    """The sha256 of one section of index.json, so that an edit by hand is noticed and named."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stock_info(domains: Sequence[DomainInfo], shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """The content of `_info.json`, for timm's WebDataset reader; shards come domain by domain.

    The split `train` holds everything, and one split per domain bears the prefix of its keys, or
    `env<number>` where timm could not tell that from a file name.
    """
    splits = {}
    rest = list(shards)
    for number, domain in enumerate(domains):
        mine, samples = [], 0
        while rest and samples < domain.samples:
            mine.append(rest.pop(0))
            samples += mine[-1].samples
        plain = "tar" not in domain.key_prefix and domain.key_prefix != WHOLE_SET
        name = domain.key_prefix if plain else f"env{number}"
        splits[name] = _split_info(name, mine)
    return {"splits": {WHOLE_SET: _split_info(WHOLE_SET, shards), **splits}}


def _split_info(name: str, shards: Sequence[ShardInfo]) -> dict[str, Any]:
    return {
        "name": name,
        "num_samples": sum(shard.samples for shard in shards),
        "filenames": [shard.file for shard in shards],
        "shard_lengths": [shard.samples for shard in shards],
    }
