"""The curves on their way to trackers beside TensorBoard: each point once, and never in the way."""

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from shards.addresses import without_secrets
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.log import PLUGINS
from trainer.config.resume_rules import FREE
from trainer.config.run_config import RunConfig, as_plain, flat
from trainer.monitor.trackers import ENVIRONMENT, KINDS, Tracker
from trainer.process.errors import ConfigError

log = logging.getLogger("trainer")

CLOSING = 20.0
"""Seconds that trackers get at the end of a run for what is not sent yet."""


class Tracking:
    """Hands a run's points to what `config.log` names; for the main rank.

    A point is written to `scalars.csv` and then sent, in a thread that training does not wait for.
    The file is thereby the record of what was sent: a point whose step is not beyond the last of
    its tag is what a resumed run does again, and is left out. A tracker that fails is left out from
    then on, with a warning.

    Args:
        first_step: where the run (re)starts; at 0 with other settings it is another run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, first_step: int) -> None:
        self._config, self._folder, self._whole = config, folder, False
        self._known = _known_runs(config, folder, first_step)
        self._last = last_steps(folder.scalars)
        self._queue: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._makers: dict[str, Callable[[], Tracker]] = {}
        self._trackers: dict[str, Tracker] = {}
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Imported here already, since a loader process could be forked amid a thread's import.
        for kind in KINDS:
            if (place := getattr(config.log, kind)) is not None:
                with self._left_out_after_error(f"log.{kind}"):
                    import_module(kind)
                    self._makers[f"log.{kind}"] = partial(self._ours, kind, place)
        for entry in entry_points(group=PLUGINS):
            if entry.name in config.log.plugins:
                setting = f"log.plugins: {entry.name}"
                with self._left_out_after_error(setting):
                    self._makers[setting] = partial(entry.load(), folder.path, as_plain(config))
        self._thread = Thread(target=self._send, name="tracking", daemon=True)
        self._thread.start()

    def _ours(self, kind: str, place: str) -> Tracker:
        known, key = self._known, f"{kind} {place}"
        tracker = KINDS[kind](place, self._folder.path, as_plain(self._config), known.get(key))
        known[key] = tracker.run_id
        replace_text(self._folder.tracking, json.dumps(known, indent=2) + "\n")
        log.info("log.%s: %s", kind, tracker.place)
        return tracker

    @contextmanager
    def _left_out_after_error(self, setting: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._trackers.pop(setting, None)
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            reason = f"{kind}{error}".splitlines()[0]
            log.warning("%s: %s; the run goes on without it", setting, without_secrets(reason))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Takes in finite points; what an earlier start has sent is left out."""
        new = {tag: float(v) for tag, v in values.items() if step > self._last.get(tag, -1)}
        self._last.update(dict.fromkeys(new, step))
        if new and self._thread.is_alive():
            self._queue.put((step, new))

    def _send(self) -> None:
        with (
            self._left_out_after_error("log"),
            self._folder.scalars.open("a", newline="", encoding="utf-8") as file,
        ):
            for setting, make in self._makers.items():
                with self._left_out_after_error(setting):
                    self._trackers[setting] = make()
            write = csv.writer(file, lineterminator="\n").writerows
            while (message := self._queue.get()) is not None:
                step, values = message
                write((step, tag, value) for tag, value in values.items())
                file.flush()
                for setting, tracker in [*self._trackers.items()]:
                    with self._left_out_after_error(setting):
                        tracker.scalars(step, values)
        for setting, tracker in [*self._trackers.items()]:
            with self._left_out_after_error(setting):
                getattr(tracker, "close", bool)(self._whole)

    def close(self, whole: bool) -> None:
        """Sends what is left, within `CLOSING`; `whole` if the run is complete."""
        self._whole = whole
        self._queue.put(None)
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            log.warning(
                "log: trackers did not take everything within %.0f s; metrics.jsonl has it", CLOSING
            )


def _known_runs(config: RunConfig, folder: RunFolder, first_step: int) -> dict[str, Any]:
    """The trackers' runs that this one continues, and the settings that make it the same run."""
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(folder.tracking.read_text(encoding="utf-8")))
    settings = {key: value for key, value in flat(config).items() if key not in FREE}
    if first_step == 0 and known.get("settings") != settings:
        folder.scalars.unlink(missing_ok=True)
        known = {"settings": settings}
        replace_text(folder.tracking, json.dumps(known, indent=2) + "\n")
    return known


def last_steps(record: Path) -> dict[str, int]:
    """The last step of each tag in a record, which is made or cut back to whole lines."""
    content = record.read_bytes() if record.exists() else b""
    whole, end, torn = content.rpartition(b"\n")
    if torn or not whole:
        replace_text(record, (whole + end).decode(errors="replace") or "step,tag,value\n")
    last: dict[str, int] = {}
    for line in whole.decode(errors="replace").splitlines():
        with suppress(ValueError, csv.Error):  # of the heading, and of what is no record
            step, tag, _ = next(csv.reader([line]))
            last[tag] = max(int(step), last.get(tag, -1))
    return last
