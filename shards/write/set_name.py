"""The name of a set, and how its index gets a new content without ever being half there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.durable import replaced_when_whole
from shards.errors import DataConfigError, OutputError
from shards.read import layout, naming


def name_set(out: Path, name: str) -> None:
    """Give a finished set a name; nothing but `index.json` is written.

    Raises:
        DataConfigError: the name is not legal.
        OutputError: it cannot be written.
    """
    path = out / layout.INDEX_NAME
    content = json.loads(path.read_bytes())
    check_name(name, content.get("dataset", ""))
    if content.get("name") != name:
        try:
            write_json(path, naming.named(content, name))
        except OSError as error:
            raise OutputError(f"--name: cannot write {path} ({error.strerror})") from error


def check_name(name: str | None, dataset: str) -> None:
    """Raise `DataConfigError` if a set of this dataset cannot be called so."""
    if name is not None and (problem := naming.name_problem(name, dataset)):
        raise DataConfigError(f"--name {name}: {problem}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an index or what is like one."""
    with replaced_when_whole(path) as stream:
        stream.write(naming.index_bytes(content))
