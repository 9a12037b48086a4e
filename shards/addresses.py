"""Addresses of files elsewhere: which are remote, and how they are shown without secrets."""

import re
from pathlib import Path
from typing import TypeGuard

COMMAND = "pipe:"
LEFT_OUT = "..."
"""What stands for a secret."""
_URL = re.compile(r"((?:--[\w.]+=)?\w[\w+.-]*://[^\s?#]*)([?#]\S+)?")
_USER_INFO = re.compile(r"""://([^\s'"/]*|[^\s'"/:]*:(?!\d*/)[^\s'"?#]*)@""")
"""Its password may hold a `/`, which makes it no URL and no less a secret."""
_WORD = r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"|;&<>()])+"""
_PIECES = re.compile(rf"(\s+)|([|;&<>()]+)|({_WORD})|.", re.DOTALL)
_PATH = re.compile(r"[~./][\w./~%+,{}:^$ -]*|[\w./~%+,{}:^$-]+")
_SUBCOMMAND = re.compile(r"[a-z]{1,8}|s3|-")
_SHORT_OPTIONS = re.compile(r"-[A-Za-z]{1,4}")


def is_remote(root: str | Path | None) -> TypeGuard[str]:
    """Whether a `data.root` is a URL or a command instead of a folder."""
    return isinstance(root, str) and (root.startswith(COMMAND) or "://" in root)


def without_secrets(text: str) -> str:
    """A text as it may be shown and written down: without what may give access.

    Of URLs that is user names, passwords, queries and fragments. Of a command (`pipe:`, up to the
    text's end) also the values of variables and options, comments, and every word that is neither a
    program nor a path; `...` stands for them. The result stays as it is if that is done again.
    """
    before, command, rest = text.partition(COMMAND)
    if command and not before[-1:].isalnum():
        return without_secrets(before) + command + _command_shown(rest)
    if url := _URL.fullmatch(text):
        text = url[1] + (f"{url[2][0]}{LEFT_OUT}" if url[2] else "")
    text = re.sub(r"(://[^\s'\"?#]*[?#])[^\s'\"]*[^\s'\":;,.)]", rf"\1{LEFT_OUT}", text)
    return _USER_INFO.sub("://", text)


def lacks_secrets(text: str) -> bool:
    """Whether something was left out of a URL or command by `without_secrets`."""
    remote = COMMAND in text or "://" in text
    return remote and bool(re.search(r"(?<![\w/.])\.\.\.(?![\w/.])", text))


def _command_shown(command: str) -> str:
    shown = ""
    starts, follows_option = True, False  # a program; what may be an option's value
    for space, operator, word in _PIECES.findall(command):
        bare = re.sub(r"""['"\\]""", "", word)
        if space or operator:
            shown += space or operator
            if operator:
                follows_option = bool(operator.strip("|;&()"))  # what is redirected to or from
                starts = not follows_option
            continue
        if not bare or bare.startswith("#"):  # a comment, or a quote that does not end
            return f"{shown}#{LEFT_OUT}"
        known = _word_shown(bare, starts, follows_option)
        shown += word if known == bare else known
        follows_option = bare.startswith("-") and bare != "-" and "=" not in bare
        starts = starts and "=" in bare  # variables come before the program
    return shown


def _word_shown(word: str, starts: bool, follows_option: bool) -> str:
    """A word of a command without its quotes; `...` unless it is known to be harmless."""
    name, equals, _ = word.partition("=")
    if "://" in name:
        return LEFT_OUT if re.search(r"\s", word) else without_secrets(word)
    if equals and re.fullmatch(r"[\w-]+", name):
        return f"{name}={LEFT_OUT}"
    if word.startswith("-") and word != "-":
        whole = re.fullmatch(r"--[\w-]+", word) or _SHORT_OPTIONS.fullmatch(word)
        return word if whole else f"-{LEFT_OUT}"
    is_path = _PATH.fullmatch(word) and ("{}" in word or (word[0] in "/.~" and not follows_option))
    is_name = (_PATH if starts else _SUBCOMMAND).fullmatch(word) and not follows_option
    return word if is_path or is_name or word == "-" else LEFT_OUT
