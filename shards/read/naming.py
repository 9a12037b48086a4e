"""What a shard set is called: its own name in `index.json`, if it was given one."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shards.datasets import DATASETS
from shards.errors import DamagedDataError, DataConfigError
from shards.read.layout import REMEDY, section_digest


def name_problem(name: object, dataset: object) -> str:
    """What is wrong with the name of a set of some dataset; empty if nothing."""
    if not (isinstance(name, str) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)):
        return "must be up to 64 ASCII letters, digits, `.`, `_`, `-`; the first a letter or digit"
    other = name.lower() in DATASETS and name.lower() != dataset
    return "is the name of another dataset" if other else ""


def index_bytes(content: Mapping[str, Any]) -> bytes:
    """What `index.json` holds."""
    return (json.dumps(content, indent=1) + "\n").encode()


def named(content: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The content of an index as that of a set with a name of its own, or without one."""
    result = {key: value for key, value in content.items() if key != "name"}
    digests = {k: digest for k, digest in content.get("digests", {}).items() if k != "name"}
    if name is not None:
        result["name"], digests["name"] = name, section_digest(name)
    return {**result, "digests": digests} if "digests" in content else result


def name_and_sha256(path: Path, data: bytes, dataset: str) -> tuple[str, str]:
    """Name of the set with this index, else that of its dataset; the hash of the index without it.

    `data` are the bytes of the file at `path`.

    Raises `DamagedDataError`: the name is not legal.
    """
    content = json.loads(data)
    if "name" not in content:
        return dataset, hashlib.sha256(data).hexdigest()
    if problem := name_problem(content["name"], dataset):
        raise DamagedDataError(f"{path}: its name {content['name']!r:.80} {problem}; {REMEDY}")
    return content["name"], hashlib.sha256(index_bytes(named(content, None))).hexdigest()


def printable(text: str) -> str:
    """A text in one line; what cannot be printed is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def check_texts(root: Path, names: Iterable[str]) -> None:
    """Raises `DataConfigError` if a domain or class has a name that nothing can print."""
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataConfigError(
                f"{root}: the name {name!r} of a class or domain has bytes that are no UTF-8; "
                "rename its folders and make the shard set again"
            )
