"""Writes checkpoints beside the training, one at a time and in order."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class SaveQueue:
    """Runs saves at once, or in one thread of its own; as a context it ends when all are done.

    A save must own everything it reads, since training goes on meanwhile. A new save waits for the
    one before, so at most one is under way and none overtakes another.
    """

    def __init__(self, background: bool) -> None:
        self._executor = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[object] | None = None

    def put(self, save: Callable[[], object]) -> None:
        """Runs or starts a save; raises what this one (at once) or the one before raised."""
        self.wait()
        if self._executor is None:
            save()
        else:
            self._pending = self._executor.submit(save)

    def check(self) -> None:
        """Raises the error of a save that has failed meanwhile; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "SaveQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last save; its error gives way to one that is on its way already."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.error("%s", error)
        finally:
            if self._executor is not None:
                self._executor.shutdown()
