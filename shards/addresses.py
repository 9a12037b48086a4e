"""Addresses of files elsewhere: which are remote, and how they are shown without secrets."""

import re
from pathlib import Path
from typing import TypeGuard

COMMAND = "pipe:"


def is_remote(root: str | Path | None) -> TypeGuard[str]:
    """Whether a `data.root` is a URL or a command instead of a folder."""
    return isinstance(root, str) and (root.startswith(COMMAND) or "://" in root)


def without_secrets(text: str) -> str:
    """A message without what may give access: user names, passwords and queries in URLs.

    `?...` stands for a query.
    """
    text = re.sub(r"(://[^\s'\"?]*\?)[^\s'\"]*[^\s'\":;,.)]", r"\1...", text)
    return re.sub(r"://[^\s'\"/]*@", "://", text)
