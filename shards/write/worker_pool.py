"""Independent tasks in several processes, which never outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.errors import OutputError

Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_DEFAULT_JOBS = 16  # beyond this the storage is the limit


def default_jobs() -> int:
    """The CPU cores this process may use, at most 16."""
    return min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_JOBS)


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Apply a function to every task; yields a task's number and result as they are finished.

    The function must be importable by name, or a `functools.partial` of such. `jobs` is the number
    of processes; 1 works in this one.

    Raises:
        OutputError: a process was killed from outside.
        Exception: whatever `function` raises; tasks not yet begun are then left out.
    """
    if jobs == 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    # Not forked: a child would share locks, threads and open files with this process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BrokenProcessPool as error:
        raise OutputError(
            "a worker process was killed, perhaps for lack of memory; run the same command again "
            "to continue, with fewer --jobs if it happens twice"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which stops the workers in order, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's death, even by SIGKILL, and follow it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
