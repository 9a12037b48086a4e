r"""The file of predictions, which is whole or not there: CSV, JSON lines or Parquet.

Names of classes and files may hold anything. In CSV, control characters are escaped as Python does
(`\n`), and a text that a spreadsheet would take for a formula begins with a `'`. One that begins
with `'` itself gets another, so that taking one away leads back. JSON lines hold the names as they
are, and so does Parquet but for bytes that are no UTF-8.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shards.errors import StorageError
from trainer.checkpoint.atomic_file import replaced_file
from trainer.predict.job import Prediction
from trainer.process.errors import ConfigError, OutputError, cannot_write

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_TEXT = re.compile(r"[\ud800-\udfff]")
_FORMULA = re.compile(r"['=+\-@\uff1d\uff0b\uff0d\uff20]")  # ASCII's, and as wide letters
GROUP = 1024
"""Rows of a Parquet file that are in memory at a time."""

Rows = Iterable[Prediction]


def plain(text: str, unwanted: re.Pattern[str] = _CONTROL) -> str:
    """A text in one line, without what a terminal or a reader would obey."""
    return unwanted.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cell(text: str) -> str:
    """A text in CSV, where it starts no formula."""
    return ("'" if _FORMULA.match(text) else "") + plain(text)


def check_target(path: Path) -> None:
    """Refuses what cannot become the file of predictions.

    Raises:
        ConfigError: its ending is none of ours, or needs a package that is missing.
        OutputError: it is there already.
    """
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {path}: unknown ending; legal are {', '.join(WRITERS)}")
    if os.path.lexists(path):
        raise OutputError(f"--out {path}: is there already; delete it, or give another name")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--out {path}: needs pyarrow; pip install 'moa-trainer[parquet]', or give a file "
                "that ends in .csv or .jsonl"
            ) from error


def save(rows: Rows, path: Path, top_k: int, routes: bool) -> None:
    """Writes rows of `top_k` classes or none; `OutputError` if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            WRITERS[path.suffix.lower()](rows, temporary, top_k, routes)
    except StorageError:  # of the images
        raise
    except OSError as error:
        raise cannot_write("--out", path, error) from error


def part_of(path: Path, rank: int) -> Path:
    """Where a process leaves its rows, for the main one to put together."""
    return path.with_name(f".{path.name}.rank-{rank:05d}.jsonl")


def read_parts(path: Path, size: int) -> Iterator[Prediction]:
    """The rows of all processes in order; their files are deleted, whatever happens."""
    parts = [part_of(path, rank) for rank in range(size)]
    try:
        for part in parts:
            with part.open(encoding="utf-8") as stream:
                yield from (Prediction(**json.loads(line)) for line in stream)
    except FileNotFoundError as error:
        raise OutputError(
            f"--out: {error.filename} is not here; give a folder that all processes see"
        ) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _csv(rows: Rows, path: Path, top_k: int, routes: bool) -> None:
    titles = chain.from_iterable((f"class_{n}", f"probability_{n}") for n in range(1, top_k + 1))
    with path.open("w", encoding="utf-8", newline="") as stream:
        # Quotes around every text: some readers take `;` for the end of a cell.
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["image", *titles, "problem", *(["routes"] if routes else [])])
        for row in rows:
            pairs = zip(map(cell, row.classes), row.probabilities, strict=True)
            best = list(chain.from_iterable(pairs)) or [""] * 2 * top_k
            last = [json.dumps(row.routes)] if routes else []
            writer.writerow([cell(row.image), *best, cell(row.problem), *last])


def _jsonl(rows: Rows, path: Path, top_k: int, routes: bool) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            told = {k: v for k, v in asdict(row).items() if routes or k != "routes"}
            stream.write(json.dumps(told) + "\n")


def _parquet(rows: Rows, path: Path, top_k: int, routes: bool) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, number = pa.string(), pa.float64()
    kinds = {"classes": pa.list_(text), "probabilities": pa.list_(number), "problem": text}
    schema = pa.schema({"image": text, **kinds, **({"routes": text} if routes else {})})
    remaining = iter(rows)
    with ParquetWriter(path, schema) as writer:
        while group := list(islice(remaining, GROUP)):
            told = [{k: _for_parquet(value) for k, value in vars(row).items()} for row in group]
            writer.write_table(pa.Table.from_pylist(told, schema))


def _for_parquet(value: Any) -> Any:
    if isinstance(value, list):
        return [_for_parquet(each) for each in value]
    if isinstance(value, dict):
        return json.dumps(value)
    return plain(value, _NO_TEXT) if isinstance(value, str) else value


WRITERS: dict[str, Callable[[Rows, Path, int, bool], None]] = {
    ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet,
}  # fmt: skip
"""What writes a file, by its ending."""
