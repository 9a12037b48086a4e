"""The runs of a sweep as processes of this machine: started, looked at, ended."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.run_config import ROOT
from trainer.process.errors import ConfigError, cannot_write
from trainer.sweep.grid import CONSOLE, GridRun

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """A run to be made in a folder by these flags."""

    run: GridRun
    folder: Path
    flags: tuple[str, ...]
    steps: int

    @property
    def command(self) -> list[str]:
        """What its process is started with."""
        return [sys.executable, str(ROOT / "trainer" / "run.py"), *self.flags]


@dataclass
class Child:
    """A run under way, its output in `grid.CONSOLE` of its folder.

    It leads a session of its own, so that a terminal's Ctrl-C reaches the sweep alone, which tells
    its children to save and end. A `gpu` is the only one it sees.
    """

    job: Job
    gpu: str | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Starts the process."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        folder = self.job.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            output = (folder / CONSOLE).open("w", encoding="utf-8")
        except OSError as error:
            raise cannot_write("--output_dir", folder, error) from error
        with output:
            self.process = subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment, start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def end(self, kill: bool = False) -> None:
        """Lets it save and end, or ends it and its loader processes at once."""
        if kill:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.terminate()

    def steps_done(self) -> int:
        """Steps on record."""
        with suppress(OSError), (self.job.folder / "metrics.jsonl").open("rb") as rows:
            rows.seek(-min(rows.seek(0, os.SEEK_END), 2**16), os.SEEK_END)
            if found := re.findall(rb'^\{"step": (\d+),', rows.read(), re.MULTILINE):
                return int(found[-1]) + 1
        return 0


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within the block signals are put on a list; those that are ignored, as by nohup, stay so."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        for number in taken:
            signal.signal(number, before[number])


def visible_gpus(wanted: int) -> list[str]:
    """The first `wanted` GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    `ConfigError` if there are fewer.
    """
    import torch  # here: only a sweep over GPUs needs it

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(count)] if given is None else given.replace(" ", "").split(",")
    if wanted > count:
        raise ConfigError(
            f"--gpus {wanted}: {count} visible (CUDA_VISIBLE_DEVICES "
            f"{'is not set' if given is None else f'= {given!r}'}); give at most that many, or "
            "leave --gpus out for runs on the CPU or all on one GPU"
        )
    return names[:wanted]
