"""How a run ends: exit codes, and the errors that carry them to the command line."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moa.errors import AdapterError, MissingAdapterError, MoAConfigError
from shards.errors import (
    DamagedDataError,
    DataConfigError,
    LoaderKilledError,
    OutputError as OutputError,
    StorageError,
)

FINISHED = 0
FAILED = 1
BAD_CONFIGURATION = 2
DAMAGED_DATA = 65
PEER_LOST = 69
TRAINING_INVALID = 70
CANNOT_WRITE = 73
RESUBMIT = 75


class ConfigError(ValueError):
    """Bad configuration or command line; the message may hold several lines, one a problem."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or cannot be used."""


class TrainingInvalidError(RuntimeError):
    """Training went wrong: loss not finite, or a trainable tensor without gradient."""


class PeerLostError(RuntimeError):
    """Another process of the run is gone or hangs; `code` is its exit code, where it left one."""

    def __init__(self, message: str, code: int = PEER_LOST) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Collects what is wrong with a configuration instead of raising it."""
    try:
        yield
    except (ConfigError, MoAConfigError, DataConfigError) as error:
        problems.append(str(error))


def cannot_write(flag: str, folder: Path, error: OSError) -> OutputError:
    """What to raise when a command cannot write the folder that `flag` names."""
    reason = error.strerror or error
    return OutputError(f"{flag}: cannot write {folder} ({reason}); give another folder")


def did_you_mean(name: str, legal: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a message on an unknown name: the nearest legal one, else `otherwise`."""
    close = difflib.get_close_matches(name, list(legal), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def brief(value: object) -> str:
    """A value as a message shows it: of a hash the first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", repr(value))


EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: BAD_CONFIGURATION,
    MoAConfigError: BAD_CONFIGURATION,
    DataConfigError: BAD_CONFIGURATION,
    MissingAdapterError: BAD_CONFIGURATION,  # before its base, which it would be taken for
    AdapterError: DAMAGED_DATA,
    CheckpointError: DAMAGED_DATA,
    DamagedDataError: DAMAGED_DATA,
    StorageError: FAILED,
    LoaderKilledError: PEER_LOST,
    TrainingInvalidError: TRAINING_INVALID,
    OutputError: CANNOT_WRITE,
}
"""Errors that are the user's to mend: shown as plain lines, without a traceback."""


def exit_code(error: Exception) -> int | None:
    """The exit code that `error` stands for, or None if it is a defect of ours."""
    if isinstance(error, PeerLostError):
        return error.code
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), None)


def short_reason(error: Exception) -> str:
    """One line of why something cannot be had."""
    return " ".join(str(error).split())[:300] or type(error).__name__
