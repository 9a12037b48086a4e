"""Names and figures in Markdown: shown as they are, whatever markup somebody put into them."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=\bwww)\.")


def visible(text: str) -> str:
    """A text whose control characters, which a terminal or a reader would obey, are replaced."""
    return _CONTROL.sub("\ufffd", text)


def escaped(text: str) -> str:
    """A text for a line of Markdown, such as a table's cell."""
    return _MARKUP.sub(r"\\\g<0>", visible(" ".join(text.split())))


def code(text: str) -> str:
    """A code span for a line of Markdown; nothing for nothing."""
    text = visible(" ".join(text.split()))
    fence, pad = _fence(text, 1), " " if "`" in text[:1] + text[-1:] else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def cell(text: str) -> str:
    """A code span in a table, where readers disagree on how one could hold a `|`."""
    return escaped(text) if "|" in text else code(text)


def block(text: str, language: str) -> str:
    """A code block."""
    text = visible(text)
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than stand in a row within the text."""
    return "`" * max([least, *(1 + len(run) for run in re.findall("`+", text))])
