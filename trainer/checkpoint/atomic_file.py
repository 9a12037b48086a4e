"""Files that a crash leaves either old or new, never half written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moa.files.atomic_folder import sync, with_path


@contextmanager
def replaced_file(path: Path, contended: bool = False) -> Iterator[Path]:
    """Yields another name to write to; what was written there takes the place of `path`.

    Readers and crashes meet the old content or the new one, and an error leaves the old one. Where
    it is `contended`, other processes may do so at the same time; one has the last word.
    """
    own = f".{uuid.uuid4().hex[:12]}" if contended else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        with with_path(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str, contended: bool = False) -> None:
    """Gives a text file new content as `replaced_file` does."""
    with replaced_file(path, contended) as temporary:
        temporary.write_text(text, encoding="utf-8")
