"""What the commands of this package share: flags, lines on stderr, exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shards.datasets import nearest
from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError

log = logging.getLogger("shards")

EXIT_CODES = "Exit codes: 0 done, 2 bad settings, 65 damaged data, 73 output cannot be written"
_EXIT_CODES = {DataConfigError: 2, DamagedDataError: 65, OutputError: 73, StorageError: 1}


def path(text: str) -> Path:
    """Read a path; a shell leaves the `~` of `--out=~/set` as it is."""
    return Path(os.path.expanduser(text))


def _underscored(word: str) -> str:
    """Spell a flag such as `--shard-size=9` with underscores; leave any other word as it is."""
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class _Formatter(logging.Formatter):
    """Begins warnings with `warning: `, as errors begin with `error: `."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno == logging.WARNING else text


class Parser(argparse.ArgumentParser):
    """Takes dashes for the underscores of a flag; errors take one line and suggest the nearest."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse flags in either spelling."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with one line."""
        flag = message.rpartition("unrecognized arguments: ")[2].split()[0]
        hint = nearest(flag, list(self._option_string_actions)) if "unrec" in message else ""
        self.exit(2, f"error: {message}{hint}; see {self.prog} --help\n")


def run_command(run: Callable[[], int]) -> int:
    """Run a command with its lines on stderr; gives the exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        return run()
    except tuple(_EXIT_CODES) as error:
        log.error("error: %s", error)
        return next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to finish")
        return 130
