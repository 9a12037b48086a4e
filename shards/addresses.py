"""Addresses of files elsewhere: which are remote, and how they are shown without secrets."""

import re
from pathlib import Path
from typing import TypeGuard

_COMMAND = "pipe:"


def is_remote(root: str | Path) -> TypeGuard[str]:
    """Tell whether a shard set is somewhere else than in a folder.

    Args:
        root: What was given as `data.root`.

    Returns:
        Whether it is a URL or a command.
    """
    return isinstance(root, str) and (root.startswith(_COMMAND) or "://" in root)


def without_secrets(text: str) -> str:
    """Take out of a message what may give access: user names, passwords and queries in URLs.

    Args:
        text: A URL, a command, or a message that holds some.

    Returns:
        The text, with `?...` for a query.
    """
    text = re.sub(r"(://[^\s'\"?]*\?)[^\s'\"]*[^\s'\":;,.)]", r"\1...", text)
    return re.sub(r"://[^\s'\"/]*@", "://", text)
