"""Progress with the time left: a live bar on a terminal, now and then a plain line elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]
"""Called with a number of images done."""


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Show the progress of a long task on stderr.

    Args:
        what: What is being done, for example `writing`.
        total: Number of images to do.

    Yields:
        A function to call with every number of images done.
    """
    if not sys.stderr.isatty():
        yield PlainProgress(what, total)
        return
    from rich.console import Console  # here: `--help` need not wait for it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)


class PlainProgress:
    """Logs a line every ten seconds, and one at the end.

    Args:
        what: What is being done.
        total: Number of images to do.
        clock: Seconds, never going back.
    """

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.what = what
        self.total = total
        self.clock = clock
        self.done = 0
        self._start = self._last = clock()

    def __call__(self, images: int) -> None:
        """Count images and log if it is time to.

        Args:
            images: Number of images done since the last call.
        """
        self.done += images
        now = self.clock()
        if self.done < self.total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = self.done / max(now - self._start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        log.info(
            "%s: %d of %d images (%d%%), %.0f images/s, %s",
            self.what,
            self.done,
            self.total,
            100 * self.done // max(self.total, 1),
            rate,
            f"{timedelta(seconds=round(left))} left" if left else "done",
        )
