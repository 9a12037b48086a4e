"""Progress with the time left: rich's live bar on a terminal, now and then a line elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of e.g. `writing` images on stderr; yields what to call with those done."""
    if not sys.stderr.isatty():
        yield PlainProgress(what, total)
        return
    from rich.console import Console  # here: `--help` need not wait for it
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)


@dataclass
class PlainProgress:
    """Logs a line every ten seconds, and one at the end; `clock` gives seconds."""

    what: str
    total: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.done = 0
        self._start = self._last = self.clock()

    def __call__(self, images: int) -> None:
        """Count images done since the last call, and log if it is time to."""
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
