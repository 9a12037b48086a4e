"""The curves on their way to trackers beside TensorBoard: each point once, and never in the way."""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from moa.files.atomic_folder import with_path
from shards.addresses import without_secrets
from trainer.checkpoint.atomic_file import replace_text, replaced_file
from trainer.checkpoint.run_folder import RunFolder, read_rows
from trainer.config.log import PLUGINS
from trainer.config.resume_rules import FREE
from trainer.config.run_config import RunConfig, as_plain, flat
from trainer.monitor.trackers import ENVIRONMENT, KINDS, Tracker
from trainer.process.errors import CheckpointError, ConfigError

log = logging.getLogger("trainer")

Point = tuple[int, str, float, int]
"""Step, tag, value, and where in the file its line ends."""

CLOSING = 20.0
"""Seconds that trackers get at the end of a run for what is not sent yet."""


class Tracking:
    """Hands a run's points to what `config.log` names; for the main rank.

    A point is first written to `scalars.csv`. One whose step is not beyond the last of its tag
    there is what a resumed run does again, and is left out. A thread hands the points to the
    trackers, so that training waits for none, and notes in `tracking.jsonl` how far in the file
    each of them has got: a resumed run begins there, with a new tracker at the start. A tracker
    that fails is left out until the run is resumed, with a warning.

    Args:
        first_step: where the run (re)starts; at 0 with other settings it is another run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, first_step: int) -> None:
        self._config, self._folder, self._whole = config, folder, False
        self._known = _known(config, folder, first_step)
        mend(folder.scalars)
        self._last = {tag: step for step, tag, *_ in sorted(points(folder.scalars))}
        self._file = folder.scalars.open("ab", buffering=0)
        self._queue: SimpleQueue[tuple[int, dict[str, float], int] | None] = SimpleQueue()
        self._makers: dict[str, Callable[[], Tracker]] = {}
        self._trackers: dict[str, Tracker] = {}
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Imported here already, since a loader process could be forked amid a thread's import.
        for kind in KINDS:
            if (place := getattr(config.log, kind)) is not None:
                with self._left_out_after_error(name := f"log.{kind} {place}"):
                    import_module(kind)
                    self._makers[name] = partial(self._ours, name, kind, place)
        for entry in entry_points(group=PLUGINS):
            if entry.name in config.log.plugins:
                with self._left_out_after_error(name := f"log.plugins {entry.name}"):
                    self._makers[name] = partial(entry.load(), folder.path, as_plain(config))
        arguments = (self._file.seek(0, os.SEEK_END),)
        self._thread = Thread(target=self._send, args=arguments, name="tracking", daemon=True)
        self._thread.start()

    @contextmanager
    def _left_out_after_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._trackers.pop(name, None)
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            reason = f"{kind}{error}".splitlines()[0]
            log.warning("%s: %s; the run goes on without it", name, without_secrets(reason))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Takes in finite points; those that an earlier start has taken in are left out."""
        new = {tag: float(v) for tag, v in values.items() if step > self._last.get(tag, -1)}
        if new:
            self._last.update(dict.fromkeys(new, step))
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows(
                (step, *point) for point in new.items()
            )
            with with_path(self._folder.scalars):
                self._file.write(lines.getvalue().encode())
            self._queue.put((step, new, self._file.tell()))

    def _send(self, end: int) -> None:
        """Hands out what is in the file up to `end` and not sent yet, then what comes."""
        with self._left_out_after_error("log"):
            for name, make in self._makers.items():
                with self._left_out_after_error(name):
                    self._trackers[name] = make()
                earlier = points(self._folder.scalars, self._known.get(f"sent to {name}", 0), end)
                for step, group in groupby(earlier, itemgetter(0)):
                    rows = [*group]
                    self._hand(name, step, {tag: v for _, tag, v, _ in rows}, rows[-1][-1])
            while (message := self._queue.get()) is not None:
                for name in [*self._trackers]:
                    self._hand(name, *message)
            for name, tracker in [*self._trackers.items()]:
                with self._left_out_after_error(name):
                    getattr(tracker, "close", bool)(self._whole)

    def _hand(self, name: str, step: int, values: dict[str, float], end: int) -> None:
        if name in self._trackers:
            with self._left_out_after_error(name):
                self._note({f"sent to {name}": end})  # before it is, lest it be sent twice
                self._trackers[name].scalars(step, values)

    def _ours(self, name: str, kind: str, place: str) -> Tracker:
        config, run = as_plain(self._config), self._known.get(f"run of {name}")
        tracker = KINDS[kind](place, self._folder.path, config, run)
        self._note({f"run of {name}": tracker.run_id})
        log.info("%s: %s", name, tracker.place)
        return tracker

    def _note(self, row: Mapping[str, Any]) -> None:
        with self._folder.tracking.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def close(self, whole: bool) -> None:
        """Sends what is left, within `CLOSING`; `whole` if the run is complete."""
        self._whole = whole
        self._file.close()
        self._queue.put(None)
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            log.warning("log: trackers did not take everything within %.0f s", CLOSING)


def _known(config: RunConfig, folder: RunFolder, first_step: int) -> dict[str, Any]:
    """The trackers' runs that this one continues, how far they are, and what it was set to."""
    known: dict[str, Any] = {}
    with suppress(OSError, CheckpointError, ValueError, TypeError):
        for row in read_rows(folder.tracking, torn=True):
            known |= row
    settings = {key: value for key, value in flat(config).items() if key not in FREE}
    if first_step == 0 and known.get("settings") != settings:
        folder.scalars.unlink(missing_ok=True)
        known = {"settings": settings}
    replace_text(folder.tracking, json.dumps(known) + "\n")
    return known


def mend(record: Path) -> None:
    """Begins a record, or cuts it back to whole lines."""
    content = record.read_bytes() if record.exists() else b""
    whole, end, torn = content.rpartition(b"\n")
    if torn or not whole:
        with replaced_file(record) as temporary:
            temporary.write_bytes(whole + end or b"step,tag,value\n")


def points(record: Path, start: int = 0, end: int | None = None) -> Iterator[Point]:
    """What a record has between two places; lines that are no points are left out."""
    for line in record.read_bytes()[start:end].splitlines(keepends=True):
        start += len(line)
        with suppress(ValueError, csv.Error):
            step, tag, value = next(csv.reader([line.decode()]))
            yield int(step), tag, float(value), start
