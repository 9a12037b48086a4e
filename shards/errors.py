"""Errors of the data path; the command lines turn each into its own exit code."""


class DataConfigError(ValueError):
    """A setting that cannot work: the message names it, its value, what is legal and the remedy."""


class DamagedDataError(RuntimeError):
    """Stored data that is not what the index promises: missing, cut short or altered."""


class OutputError(RuntimeError):
    """An output folder that cannot be written, is in use, or already holds something else."""
