"""How a run ends: exit codes, and the errors that carry them to the command line."""

from moa.errors import AdapterError, MoAConfigError
from shards.errors import DamagedDataError, DataConfigError, StorageError
from shards.errors import OutputError as ShardOutputError

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
    """Another process of the run is gone or hangs."""


class OutputError(OSError):
    """The output folder cannot be written or is in use."""


EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: BAD_CONFIGURATION,
    MoAConfigError: BAD_CONFIGURATION,
    DataConfigError: BAD_CONFIGURATION,
    AdapterError: DAMAGED_DATA,
    CheckpointError: DAMAGED_DATA,
    DamagedDataError: DAMAGED_DATA,
    StorageError: FAILED,
    PeerLostError: PEER_LOST,
    TrainingInvalidError: TRAINING_INVALID,
    OutputError: CANNOT_WRITE,
    ShardOutputError: CANNOT_WRITE,
}
"""Errors that are the user's to mend: shown as plain lines, without a traceback."""


def exit_code(error: Exception) -> int | None:
    """The exit code that `error` stands for, or None if it is a defect of ours."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return None
