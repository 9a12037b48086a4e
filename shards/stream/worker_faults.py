"""What can befall loader processes: no room in shared memory, or an end from outside.

Batches travel through /dev/shm. Without room there, torch drops a batch in a thread of the loader
process, and whoever waits for it waits for ever; so the room is asked for before, and the batches
are put there where an error can still be told.
"""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import get_worker_info

from shards.errors import DataConfigError, LoaderKilledError

SHARED_MEMORY = "/dev/shm"  # where Linux has it
PREFETCHED = 2  # batches that torch has each loader process make ahead
IN_HAND = 2  # the batch in use and the next one, which the loader has given away
_MIB = 2**20


def check_shared_memory(batch_bytes: int, workers: int, processes: int) -> None:
    """Raises `DataConfigError` unless what the processes of this host prefetch fits into memory.

    `batch_bytes` are those of a batch of each loader that is alive at the same time, `workers` the
    loader processes of each of the `processes`.
    """
    if not workers:
        return
    needed = batch_bytes * (PREFETCHED * workers + IN_HAND) * processes
    if needed > _bytes("f_bavail"):
        raise _no_room(workers, f"must hold {_mib(needed)} of batches in flight")


def share(images: torch.Tensor) -> None:
    """Moves the images of a batch to shared memory, in a loader process.

    Raises `DataConfigError`: there is no room.
    """
    workers = get_worker_info().num_workers  # type: ignore[union-attr]
    try:
        images.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        size = _mib(images.nbytes)
        raise _no_room(workers, f"has no room for a batch of {size} ({error})") from error


def told(batches: Callable[[], Iterator[Any]], workers: int) -> Iterator[Any]:
    """The batches of a loader of torch, whose errors are told as what they mean.

    Raises:
        DataConfigError: shared memory is full.
        LoaderKilledError: a loader process is gone.
    """
    remaining: Any = None
    try:
        remaining = batches()
        yield from remaining
    except (RuntimeError, OSError, EOFError) as error:  # the latter from a process just ending
        processes = getattr(remaining, "_workers", [])
        if processes:
            connection.wait([process.sentinel for process in processes], timeout=1)
        if gone := [_end(process) for process in processes if process.exitcode]:
            raise LoaderKilledError(
                f"data.workers = {workers}: {', '.join(gone)}; a machine that runs out of memory "
                "does that: give the job more of it, or lower data.workers; the same command "
                "resumes"
            ) from error
        if workers and isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _no_room(workers, "is full") from error  # queues and locks stand there, too
        raise


def _end(process: Any) -> str:
    code = process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"loader process {process.pid} was {how}"


def _no_room(workers: int, what: str) -> DataConfigError:
    return DataConfigError(
        f"data.workers = {workers}: {SHARED_MEMORY}, of {_mib(_bytes('f_blocks'))} with "
        f"{_mib(_bytes('f_bavail'))} free, {what}; start the container with a larger one (`docker "
        "run --shm-size=8g` or `--ipc=host`), or lower data.workers; 0 needs none"
    )


def _bytes(field: str) -> float:
    """Bytes of shared memory that a field of `statvfs` tells; infinite where there is none."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return float("inf")
    return float(getattr(status, field) * status.f_frsize)


def _mib(size: float) -> str:
    return f"{size / _MIB:.3g} MiB"
