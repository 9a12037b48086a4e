"""Sets that come as rows, of a list, a table or an archive, listed as a folder of them would be."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.datasets import nearest
from shards.errors import DamagedDataError, DataConfigError
from shards.write.folder_names import is_text
from shards.write.listing import STAGED_NAME, Extent, some
from shards.write.progress import progress

USUAL = {
    "image": ("image", "img"),
    "label": ("class_name", "label", "y", "cls"),
    "domain": ("domain",),
    "path": ("path", "file_name", "filename", "img_filename", "@name"),
}
"""What a column is for -> what it is usually called."""

_BEGINNINGS = {b"\x89PNG": "png", b"RIFF": "webp", b"II*\0": "tif", b"MM\0*": "tif"}


_NUMBERED = ", or number the images with --columns path="


class Row(NamedTuple):
    """One image; `where` tells file and row, `path` is None if it has no name of its own."""

    where: str
    fields: Mapping[str, object]
    path: str | None
    extent: Extent
    data: bytes = b""


def parts(column: str) -> list[str]:
    """The columns that a pattern such as `im_{id}.png` is made of; a column's name is one."""
    return re.findall(r"\{([^{}]*)\}", column) or [column]


def pick(role: str, columns: Mapping[str, str], there: Iterable[str], where: str) -> str:
    """The column for something: the one given, else the first usual one that is there.

    Raises `DataConfigError`: there is none.
    """
    names, given = list(there), columns.get(role)
    wanted = USUAL[role] if given is None else parts(given)
    found = [name for name in wanted if name in names]
    if given is not None and len(found) == len(wanted):
        return given
    if given is None and found:
        return found[0]
    lacking = next(name for name in wanted if name not in names)
    said = f"none for the {role} ({', '.join(wanted)})" if given is None else f"no {lacking!r}"
    raise DataConfigError(
        f"{where}: of the columns there is {said}; there are {some(names)}; name one with "
        f"--columns {role}=COLUMN{nearest(lacking, names)}"
    )


def value(role: str, column: str, fields: Mapping[str, object], where: str) -> str:
    """What a row has in a column, or the text that a pattern such as `im_{id}.png` makes of it.

    Raises `DataConfigError`: nothing, or no text and no whole number.
    """
    if "{" in column:
        return re.sub(r"\{([^{}]*)\}", lambda part: value(role, part[1], fields, where), column)
    found = fields.get(column)
    if isinstance(found, str | int) and str(found):
        return str(found)
    raise DataConfigError(f"{where}: has no {role} (column {column!r}); mend or leave out the row")


def check_path(path: str, where: str, remedy: str = "") -> None:
    """Raise `DataConfigError` if a path could lead elsewhere, or cannot be shown in one line."""
    if not is_text(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise DataConfigError(
            f"{where}: {path!r:.200} is no plain path below a folder; mend the row or leave it out"
            f"{remedy}"
        )


class Rows:
    """The source that is rows; they are read once, before anything else is done."""

    stage: Callable[[BinaryIO], None] | None = None

    def __init__(
        self, root: Path, read: Callable[[], Iterator[Row]], columns: Mapping[str, str]
    ) -> None:
        self.root, self._read, self._columns = root, read, columns
        self._inside = True  # whether all paths begin with their domain and class

    @functools.cached_property
    def _found(self) -> dict[str, dict[str, list[tuple[str, str, Extent]]]]:
        """Domain -> class -> path, row and bytes of its images."""
        found: dict[str, dict[str, list[tuple[str, str, Extent]]]] = {}
        row_of: dict[str, str] = {}
        for number, (where, fields, path, extent, data) in enumerate(self._read()):
            domain, label = (
                value(role, pick(role, self._columns, fields, where), fields, where)
                for role in ("domain", "label")
            )
            if path is None:
                path = f"{number:08d}.{_BEGINNINGS.get(data[:4], 'jpg')}"
            check_path(domain if "/" not in domain else f"{domain}/", where)
            check_path(f"{label}/{path}", where, _NUMBERED)
            if extent.start is None and row_of.setdefault(extent.file, where) != where:
                raise DataConfigError(_named_twice(where, path, row_of[extent.file]))
            self._inside &= path.startswith(f"{domain}/{label}/")
            found.setdefault(domain, {}).setdefault(label, []).append((path, where, extent))
            if extent.file == STAGED_NAME:
                self.stage, self._end = self._stage, (extent.start or 0) + extent.size
                self._rows = number + 1
        if not found:
            raise DataConfigError(f"--root {self.root}: holds no row")
        return found

    def domains(self) -> list[str]:
        """Name the domains that rows have."""
        return sorted(self._found)

    def classes(self, domain: str) -> list[str]:
        """Name the classes that rows of a domain have."""
        return sorted(self._found[domain])

    def images(self, domain: str, class_name: str) -> Iterator[tuple[str, Extent]]:
        """Name the images of a class, sorted as files of these names."""
        before = path_before = ""
        rows = self._found[domain][class_name]
        for path, where, extent in sorted(rows, key=lambda row: os.path.split(row[0])):
            if path == path_before:
                raise DataConfigError(_named_twice(where, path, before) + _NUMBERED)
            before, path_before = where, path
            yield (
                path.removeprefix(f"{domain}/") if self._inside else f"{class_name}/{path}",
                extent,
            )

    def hint(self, *paths: str) -> str:
        """Nothing."""
        return ""

    def _stage(self, stream: BinaryIO) -> None:
        with progress("unpacking", self._rows) as advance:
            for row in self._read():
                stream.write(row.data)
                advance(1)
        if stream.tell() != self._end:
            raise DamagedDataError(
                f"{self.root}: changed while it was read; convert again when nothing changes it"
            )


def _named_twice(where: str, path: str, first: str) -> str:
    return f"{where}: {path!r} is in {first} already; leave one of them out"
