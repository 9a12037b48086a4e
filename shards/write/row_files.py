"""Files that hold rows: CSV manifests, parquet as the Hub lays image sets out, WebDataset archives.

What they say is not trusted: every error names the file and the row.
"""

import csv
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shards.errors import DamagedDataError, DataConfigError
from shards.read.members import Member, plain_members
from shards.write.listing import STAGED_NAME, Extent, is_image, some
from shards.write.rows import Row, Rows, check_path, parts, pick, value

_BATCH = 64  # rows of parquet in memory at a time
_LONGEST_TEXT = 2**20  # of a member of an archive that is no image

Columns = Mapping[str, str]


def row_source(kind: str, root: Path, columns: Columns) -> Rows:
    """The source that the files of a kind in a folder are, or one such file.

    `columns` names what is not called as usual: `image`, `label`, `domain`, `path` -> a column.
    """
    return Rows(root, functools.partial(READERS[kind], root, columns), columns)


def _manifest(root: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a CSV file, whose paths are relative to its folder."""
    usual = root / "metadata.csv"
    files = [usual] if usual.is_file() else _files(root, ".csv")
    if len(files) > 1:
        raise DataConfigError(f"--root {root}: holds {len(files)} CSV files; give one, {files[0]}")
    line = 0
    try:
        with files[0].open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, strict=True)
            header = next(lines, [])
            column = pick("path", columns, header, str(files[0]))
            for cells in filter(None, lines):
                line = lines.line_num
                where = f"{files[0]}, line {line}"
                if len(cells) != len(header):
                    raise DataConfigError(f"{where}: {len(cells)} values, expected {len(header)}")
                fields = dict(zip(header, cells, strict=True))
                path = value("path", column, fields, where).removeprefix("./")
                check_path(path, where)
                yield Row(where, fields, path, Extent(str(files[0].parent.absolute() / path)))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataConfigError(
            f"{files[0]}, after line {line}: cannot be read as CSV in UTF-8 ({error})"
        ) from error


def _parquet(root: Path, columns: Columns) -> Iterator[Row]:
    """Rows of parquet files with an `image` of bytes and path, or of bytes alone."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataConfigError(
            f"parquet files need pyarrow ({error}); pip install 'moa-trainer[parquet]'"
        ) from error
    start = 0
    for file in _files(root, ".parquet"):
        time, usual = file.stat().st_mtime_ns, _folder_fields(root, file)
        try:
            with parquet.ParquetFile(file) as table:
                image, path_column, wanted = _wanted(table.schema_arrow.names, columns, usual, file)
                names = _class_names(table.schema_arrow.metadata or {})
                batches = table.iter_batches(_BATCH, columns=wanted)
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                for number, fields in enumerate(rows):
                    where, held = f"{file}, row {number}", fields.pop(image)
                    about = held if isinstance(held, dict) else {"bytes": held}
                    data, path = about.get("bytes"), about.get("path")
                    if not isinstance(data, bytes):
                        raise DataConfigError(f"{where}: column {image!r} holds no bytes")
                    for column in names.keys() & fields.keys():
                        fields[column] = _class_name(column, fields[column], names[column], where)
                    if path_column is not None:
                        path = path_column and value("path", path_column, fields, where)
                    extent = Extent(STAGED_NAME, start, len(data), time)
                    yield Row(where, {**usual, **fields}, path or None, extent, data)
                    start += len(data)
        except DataConfigError:
            raise
        except Exception as error:  # damaged files make pyarrow raise errors of any kind
            raise DamagedDataError(f"{file}: cannot be read as parquet ({error!s:.200})") from error


def _wanted(
    there: list[str], columns: Columns, usual: Mapping[str, object], file: Path
) -> tuple[str, str | None, list[str]]:
    """The column of images, that of paths if one was given, and all that are to be read."""
    image = pick("image", columns, there, str(file))
    roles = ["label", "domain", *(["path"] if columns.get("path") else [])]
    picked = [pick(role, columns, [*there, *usual], str(file)) for role in roles]
    wanted = [name for column in picked for name in parts(column) if name not in usual]
    return image, columns.get("path"), [*dict.fromkeys([image, *wanted])]


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[object]]:
    """The names of numbered classes by column, as `datasets` writes them into a schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"].items()
        named = {column: list(kind["names"]) for column, kind in features if "names" in kind}
        return {column: names for column, names in named.items() if len({*names}) == len(names)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def _class_name(column: str, number: object, names: list[object], where: str) -> object:
    """The name of a numbered class."""
    if isinstance(number, int) and not 0 <= number < len(names):
        raise DataConfigError(
            f"{where}: {column} is {number}, outside the {len(names)} names of the file's features"
        )
    return names[number] if isinstance(number, int) else number


def _archives(root: Path, columns: Columns) -> Iterator[Row]:
    """Samples of WebDataset archives: members `<key>.<field>`, and the entries of a `.json`."""
    for file in _files(root, ".tar"):
        time, usual = file.stat().st_mtime_ns, _folder_fields(root, file)
        try:
            for key, group in itertools.groupby(plain_members(file, folders=True), _key):
                if key is not None:
                    where = f"{file}, sample {key!r:.200}"
                    image, path, fields = _sample(where, list(group), columns, usual)
                    extent = Extent(str(file.absolute()), image.offset, len(image.content), time)
                    yield Row(where, fields, path, extent, image.content)
        except DamagedDataError as error:
            raise DamagedDataError(
                f"{file}: cannot be read as a tar file ({error}); unpack it if it is compressed"
            ) from error


def _key(member: Member) -> str | None:
    """What the names of a sample's members begin with, up to a dot; None for other files."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, dot, _ = name.partition(".")
    return folder + slash + stem if stem and dot else None


def _sample(
    where: str, members: list[Member], columns: Columns, usual: Mapping[str, object]
) -> tuple[Member, str | None, dict[str, object]]:
    """The image of a sample of an archive, its path and all fields."""
    images: dict[str, Member] = {}
    fields: dict[str, object] = {}
    for member in members:
        field = member.name.rpartition("/")[2].partition(".")[2]
        if is_image(f".{field}"):
            images[field] = member
        elif field != "json" and len(member.content) < _LONGEST_TEXT:
            fields[field] = member.content.decode(errors="replace").strip()
        elif field == "json":
            try:
                about = json.loads(member.content)
            except (ValueError, RecursionError) as error:
                raise DataConfigError(f"{where}: its .json cannot be read") from error
            fields = {**about, **fields} if isinstance(about, dict) else fields
    wanted = columns.get("image", next(iter(images), ""))
    if wanted not in images or ("image" not in columns and len(images) > 1):
        raise DataConfigError(
            f"{where}: holds {len(images)} images ({some(images)}); name one with --columns "
            "image=ENDING, or leave the sample out"
        )
    image = images[wanted]
    fields = {**usual, **fields, "@name": image.name.removeprefix("./")}
    path = None
    if columns.get("path") != "":
        path = value("path", pick("path", columns, fields, where), fields, where)
    return image, path, fields


def _files(root: Path, ending: str) -> list[Path]:
    """The files of a kind below a folder in order, or the file that is given instead."""
    files = [root] if root.is_file() else sorted(root.glob(f"**/*{ending}"), key=str)
    if found := [file for file in files if file.is_file()]:
        return found
    raise DataConfigError(f"--root {root}: no such file, and no folder that holds *{ending} files")


def _folder_fields(root: Path, file: Path) -> dict[str, object]:
    """What a file's name tells of its rows: `@folder` below the root, `@file` without numbers."""
    folders = file.relative_to(root).parts[:-1]
    name = re.sub(r"(-\d+(-of-\d+(-\w+)?)?)?\.\w+$", "", file.name)
    return {"@file": name, **({"@folder": folders[0]} if folders else {})}


READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    "csv": _manifest,
    "parquet": _parquet,
    "webdataset": _archives,
}
"""What `--format` may say beside `folder`."""
