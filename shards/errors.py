"""Errors of the data path; the command lines turn each into its own exit code."""

import shlex
from pathlib import Path


class DataConfigError(ValueError):
    """A setting that cannot work: the message names it, its value, what is legal and the remedy."""


class DamagedDataError(RuntimeError):
    """Stored data that is not what the index promises: missing, cut short or altered."""


class OutputError(RuntimeError):
    """An output folder that cannot be written, is in use, or already holds something else."""


class DamagedSampleError(DamagedDataError):
    """One stored image whose bytes are not those that the index promises; others may be sound."""


class StorageError(OSError):
    """A disk, server or command that does not give the data, however often it is asked."""


class LoaderKilledError(RuntimeError):
    """A loader process was ended from outside, as a machine does that runs out of memory."""


def make_command(dataset: str, root: Path | str = "IMAGE_FOLDER", out: Path | str = "SET") -> str:
    """The command that makes a shard set, in backquotes; words in capitals for what is unknown."""
    source = "" if dataset == "digits" else f" --root {shlex.quote(str(root))}"
    return f"`python -m shards.writer --dataset {dataset}{source} --out {shlex.quote(str(out))}`"


def verify_command(out: Path | str = "SET", *, deep: bool = True) -> str:
    """The command that checks a shard set, in backquotes; `deep` also decodes every image."""
    command = f"python -m shards.writer --out {shlex.quote(str(out))} --verify"
    return f"`{command} --deep`" if deep else f"`{command}`"
