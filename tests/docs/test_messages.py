"""The messages that the documentation quotes are those that the code prints."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.docs_blocks import ROOT

PAGES = ("troubleshooting.md", "slurm.md")
ELSEWHERE = ("sbatch: error", "invalid partition")
"""Parts of messages that other programs print."""


def text_of(node: ast.expr) -> str:
    """A string of the code, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


@cache
def code_strings() -> str:
    """Every string of the packages and shell scripts, one a line."""
    found: list[str] = []
    for package in ("moa", "shards", "trainer"):
        for path in (ROOT / package).glob("**/*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [text_of(node) for node in ast.walk(tree) if isinstance(node, ast.expr)]
    scripts = [path.read_text(encoding="utf-8") for path in ROOT.glob("slurm/*.sh")]
    found += [text.replace("\\\n", "") for text in scripts]
    return "\n".join(found)


def quoted_messages() -> Iterator[str]:
    """What stands in backquotes in the first column of tables headed `message`."""
    for page in PAGES:
        path = ROOT / "docs" / page
        inside = False
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            inside = line.startswith("| message") or (inside and line.startswith("|"))
            if inside and line.startswith("| `"):
                yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


@pytest.mark.parametrize("message", quoted_messages())
def test_message_is_in_the_code(message: str) -> None:
    parts = [part.strip(" ?;") for part in message.split("…")]
    unknown = [part for part in parts if len(part) > 3 and part not in code_strings()]
    assert not unknown or any(word in message for word in ELSEWHERE)


def test_a_message_of_nobody_is_found() -> None:
    assert "the moon is full" not in code_strings()
