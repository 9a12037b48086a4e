"""Small files that a crash leaves either old or new, never half written."""

import os
import uuid
from pathlib import Path

from moa.files.atomic_folder import sync


def replace_text(path: Path, text: str, contended: bool = False) -> None:
    """Gives a file new content at once: readers and crashes meet the old one or the new one.

    Args:
        path: the file.
        text: its new content.
        contended: whether other processes may do so at the same time; one has the last word.
    """
    own = f".{uuid.uuid4().hex[:12]}" if contended else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
