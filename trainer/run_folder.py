"""The run folder: claimed by one run, its JSON lines appended and cut back on resume."""

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from trainer.config import ROOT, RunConfig, as_plain
from trainer.errors import CheckpointError, OutputError

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "numpy")


class RunFolder:
    """Paths of a run's files; on the main rank it also writes them.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter, self.adapter_last = path / "adapter", path / "adapter-last"
        self.tensorboard, self.log = path / "tensorboard", path / "log.txt"
        self.results, self.metrics = path / "results.jsonl", path / "metrics.jsonl"
        self.done = path / "done"
        self._lock = FileLock(path / ".lock")

    def claim(self) -> None:
        """Creates the folder and holds it until the process ends.

        Raises:
            OutputError: it cannot be written, or another run holds it.
        """
        from moa.state import recover_folder  # here: reading results needs no torch

        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            for adapter in (self.adapter, self.adapter_last):
                recover_folder(adapter)
            owner = f"{socket.gethostname()} pid {os.getpid()}\n"
            (self.path / "owner.txt").write_text(owner, encoding="utf-8")
        except Timeout as error:
            file = self.path / "owner.txt"
            owner = file.read_text(encoding="utf-8").strip() if file.exists() else "another run"
            raise OutputError(
                f"output_dir: {self.path} is in use by {owner}; give another --output_dir or end "
                "that run"
            ) from error
        except OSError as error:
            raise OutputError(
                f"output_dir: cannot write {self.path} ({error.strerror}); give a writable "
                "--output_dir"
            ) from error

    def release(self) -> None:
        """Lets others use the folder."""
        (self.path / "owner.txt").unlink(missing_ok=True)
        self._lock.release()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for the duration of a block; see `claim`."""
        self.claim()
        try:
            yield
        finally:
            self.release()

    def describe(self, config: RunConfig, ds_json: Mapping[str, Any]) -> None:
        """Writes the resolved configuration, the resolved DeepSpeed JSON and the environment."""
        text = yaml.safe_dump(as_plain(config), sort_keys=False)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")
        (self.path / "ds_config.json").write_text(json.dumps(ds_json, indent=2) + "\n")
        environment = {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "git_commit": git_commit(),
            "host": socket.gethostname(),
            "command": sys.argv,
        }
        (self.path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Adds one JSON line, flushed to the file before returning."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def cut_back(self, first_step: int) -> None:
        """Drops what a resumed run does again: rows of `first_step` and later."""
        self.done.unlink(missing_ok=True)
        for path in (self.results, self.metrics):
            if path.exists():
                rows = [row for row in read_rows(path, torn=True) if row["step"] < first_step]
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
                temporary.replace(path)


def read_rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    Args:
        path: the file.
        torn: whether a last line that a kill cut short may be left out.

    Raises:
        CheckpointError: a line is not JSON.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
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
    """The commit of the code that runs, or `unknown` outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
