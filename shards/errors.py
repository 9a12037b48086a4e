"""Errors of the data path; the command lines turn each into its own exit code."""


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
