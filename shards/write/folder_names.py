"""Folders that cannot be a domain or a class by their names, and what mends it."""

import os
import re
import shlex
import unicodedata
from pathlib import Path

from shards.errors import DataConfigError

_LEFTOVERS = {"__MACOSX": "archives made on macOS", "@eaDir": "a Synology disk station"}


def check_names(root: Path, kind: str, names: list[str]) -> None:
    """Raise, with a command that mends it, if one of some folders cannot be a domain or class."""
    for name in names:
        if name in _LEFTOVERS:
            command = f"find {shlex.quote(str(root))} -name {name} -prune -exec rm -r {{}} +"
            raise DataConfigError(
                f"--root {root}: {name!r} is left by {_LEFTOVERS[name]}, no {kind}; move it away, "
                f"or delete all such folders with `{command}`"
            )
        if not is_text(name):
            raise DataConfigError(
                f"--root {root}: {name!r} cannot be the name of a {kind}: it has line breaks, "
                "other control characters or bytes that are no UTF-8; rename it, such as with "
                f"`{_rename_command(root, kind, name, names)}`"
            )


def is_text(name: str) -> bool:
    """Whether a name can be shown in one line, and written to a file."""
    return all(unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") for letter in name)


def _rename_command(root: Path, kind: str, name: str, taken: list[str]) -> str:
    """For bash: gives a domain, or the folders of a class, a name that is text."""
    data, where = os.fsencode(name), shlex.quote(str(root))
    try:
        guess = data.decode()
    except UnicodeDecodeError:
        guess = data.decode("cp1252", "replace")
    new = "".join(letter if is_text(letter) else "_" for letter in guess)
    while new in taken:
        new += "_"
    new = shlex.quote(new)
    old = re.sub(r"[^A-Za-z0-9 ._-]", lambda odd: f"\\x{ord(odd[0]):02x}", data.decode("latin-1"))
    if kind == "domain":
        return f"mv -- {where}/$'{old}' {where}/{new}"
    return f'for d in {where}/*/; do mv -- "$d"$\'{old}\' "$d"{new}; done'
