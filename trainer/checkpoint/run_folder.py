"""The run folder: claimed by one run, its JSON lines appended and cut back on resume."""

import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

from moa.files.atomic_folder import recover_folder, sync, with_path
from shards.addresses import without_secrets
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.folder_lock import FolderLock
from trainer.config.averages import AVERAGES
from trainer.config.run_config import ROOT, RunConfig, as_plain
from trainer.process.errors import CheckpointError, OutputError

ZERO_SHOT = "zero_shot.json"
"""A row as in `results.jsonl`, of the classifier made from text, before any training."""
SPEED = "moa/images_per_second"
"""Column of the training speed, in the rows of evaluations that could measure it."""
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "numpy")


class RunFolder:
    """Paths of a run's files; on the main rank it also writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter, self.adapter_last = path / "adapter", path / "adapter-last"
        self.averages = [path / f"adapter-{name}" for name in AVERAGES]
        self.tensorboard, self.log = path / "tensorboard", path / "log.txt"
        self.results, self.metrics = path / "results.jsonl", path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.scalars, self.tracking = path / "scalars.csv", path / "tracking.jsonl"
        self.routing, self.heartbeats = path / "routing.png", path / "heartbeats"
        self.done = path / "done"
        self._lock = FolderLock(path)
        self._rows: dict[Path, TextIO] = {}

    def claim(self) -> None:
        """Creates the folder and holds it until the process ends.

        Raises `OutputError`: it cannot be written, or another run holds it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            sync(self.path)
            self._lock.acquire()
            for adapter in (self.adapter, self.adapter_last, *self.averages):
                recover_folder(adapter)
            shutil.rmtree(self.heartbeats, ignore_errors=True)  # of a start that failed
        except OSError as error:
            raise OutputError(
                f"output_dir: cannot write {self.path} ({error.strerror}); give a writable "
                "--output_dir"
            ) from error

    def release(self) -> None:
        """Lets others use the folder."""
        with suppress(OSError):  # what could not be written was told of then
            self._close_rows()
        self._lock.release()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for the duration of a block; see `claim`."""
        self.claim()
        try:
            yield
        finally:
            self.release()

    def describe(
        self,
        config: RunConfig,
        ds_json: Mapping[str, Any],
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Writes the resolved configuration, the resolved DeepSpeed JSON and the environment.

        `changes` are what `--checkpoint.allow_changes` let through so far.
        """
        from trainer.process.device import tf32  # with torch, which reports do without

        text = yaml.safe_dump(as_plain(config), sort_keys=False)
        replace_text(self.path / "config.yaml", text)
        replace_text(self.path / "ds_config.json", json.dumps(ds_json, indent=2) + "\n")
        environment = {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "git_commit": git_commit(),
            "host": socket.gethostname(),
            "tf32": tf32(),
            "command": [*map(without_secrets, sys.argv)],
            "changes_on_resume": list(changes),
        }
        replace_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def before(self, step: int) -> Path:
        """Where what was evaluated and selected before a change at `step` is kept."""
        return self.path / f"before-step-{step}"

    def set_aside(self, step: int, also: Sequence[str] = ()) -> None:
        """Moves it there, with the files named in `also`; what an earlier try moved stays."""
        kept = self.before(step)
        kept.mkdir(exist_ok=True)
        for path in (self.results, self.evaluations, self.adapter, *map(self.path.joinpath, also)):
            if path.exists() and not (kept / path.name).exists():
                path.rename(kept / path.name)

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Adds one JSON line, with the system before this returns, so that a kill loses none.

        Raises `OutputError`: the folder is no longer this run's.
        """
        self._lock.check()
        with with_path(path):
            if path not in self._rows:
                self._rows[path] = path.open("a", buffering=1, encoding="utf-8")
            self._rows[path].write(json.dumps(row) + "\n")

    def sync_rows(self) -> None:
        """Waits until all rows are on the disk, before a checkpoint that comes after them."""
        self._lock.check()
        self._close_rows()
        for path in (self.results, self.evaluations, self.metrics):
            if path.exists():
                sync(path)

    def _close_rows(self) -> None:
        """The next row opens its file anew, in case somebody has replaced it meanwhile."""
        while self._rows:
            path, stream = self._rows.popitem()
            with with_path(path):
                stream.close()

    def cut_back(
        self, first_step: int, first_evaluation: int | None = None, keeps_results: bool = True
    ) -> None:
        """Drops what a resumed run does again: rows of `first_step` and later.

        Of evaluations it is those of `first_evaluation` and later, where that is another step, and
        unless it `keeps_results` all rows of `results.jsonl`, of which none is right any more.
        """
        self._close_rows()
        self.done.unlink(missing_ok=True)
        evaluation = first_step if first_evaluation is None else first_evaluation
        first = {
            self.metrics: first_step,
            self.evaluations: evaluation,
            self.results: evaluation if keeps_results else 0,
        }
        for path, step in first.items():
            if path.exists():
                rows = [row for row in read_rows(path, torn=True) if row["step"] < step]
                replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; `torn` leaves out a last line that a kill cut short.

    Raises `CheckpointError`: a line is not JSON.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if torn and number == len(lines):
                break
            raise CheckpointError(
                f"{path}: line {number} is not JSON ({error}); remove it"
            ) from error
    return rows


def git_commit() -> str:
    """The commit of the code that runs, or `unknown` outside its repository."""
    if not (ROOT / ".git").exists():  # installed, perhaps within a repository of somebody else's
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
