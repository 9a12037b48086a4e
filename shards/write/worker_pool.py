"""Independent tasks in several processes, which never outlive the process that started them."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.errors import OutputError

Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_DEFAULT_JOBS = 16  # beyond this the storage is the limit


def default_jobs() -> int:
    """Give the number of processes to use unless told otherwise.

    Returns:
        The CPU cores this process may use, at most 16.
    """
    return min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_JOBS)


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Apply a function to every task.

    Args:
        function: Importable by name, or a `functools.partial` of such; so are its results.
        tasks: What to do; taken from the iterable only as fast as processes become free.
        jobs: Number of processes; 1 works in this one.

    Yields:
        The number of a task and its result, in the order in which they are finished.

    Raises:
        OutputError: If a process is killed from outside.
        Exception: Whatever `function` raises; tasks not yet begun are then left out.
    """
    if jobs == 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    # Not forked: a child would share locks, threads and open files with this process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        feed = enumerate(tasks)
        pending: dict[Future[Result], int] = {}
        while True:
            for number, task in itertools.islice(feed, 2 * jobs - len(pending)):
                pending[pool.submit(function, task)] = number
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
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
