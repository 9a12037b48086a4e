"""What a sweep tells while it runs: a line for each run that ends, on a terminal a bar for each."""

import signal
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from shards.datasets import held_out_names
from trainer.checkpoint.run_folder import read_rows
from trainer.evaluate.selection import training_domain_validation
from trainer.process.errors import FINISHED, RESUBMIT, CheckpointError
from trainer.sweep.grid import CONSOLE, GridRun
from trainer.sweep.processes import Child, Job


class SweepConsole:
    """Tells of the runs of a sweep, of which so many are to be made, so many at a time.

    Attributes:
        codes: exit codes of the runs that have ended.
    """

    def __init__(self, console: Console, runs: int, jobs: int) -> None:
        self.console, self.runs, self.jobs = console, runs, jobs
        self.codes: list[int] = []
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            "steps", TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[GridRun, TaskID] = {}
        self._running: list[Child] = []
        self._took: list[float] = []  # seconds of those that finished

    def begins(self, child: Child) -> None:
        """Of a run."""
        self._running.append(child)
        self._bars[child.job.run] = self.bars.add_task(child.job.run.name, total=child.job.steps)

    def shows(self) -> None:
        """Draws the bars anew."""
        if self.console.is_terminal:
            for child in self._running:
                self.bars.update(self._bars[child.job.run], completed=child.steps_done())

    def ends(self, child: Child, code: int) -> None:
        """Of a run, with a line: what came of it, how long it took, what is left."""
        run = child.job.run
        self._running.remove(child)
        self.bars.remove_task(self._bars[run])
        self.codes.append(code)
        self._took += [child.seconds] if code == FINISHED else []
        said = f"{run.name}: {_outcome(child, code)}; took {_clock(child.seconds)}"
        self.console.out(f"{len(self.codes)} of {self.runs}: {said}; {self._left()}")

    def stops(self, number: int, killed: bool) -> None:
        """Of a signal that ends all runs under way."""
        runs = f"{_count(len(self._running))} under way"
        said = f"killing {runs}" if killed else f"{runs} to save and end; Ctrl-C again kills"
        self.console.out(f"{signal.Signals(number).name}: {said}")

    def _left(self) -> str:
        """Runs that have not ended, and how long they may take by those that finished."""
        left = self.runs - len(self.codes)
        usual = sum(self._took) / max(1, len(self._took))
        done = sum(min(child.seconds, usual) for child in self._running)
        seconds = (usual * left - done) / max(1, min(self.jobs, left))
        return f"{_count(left)} left" + (f", about {_clock(seconds)}" if seconds >= 1 else "")


def _count(runs: int) -> str:
    return f"{runs} run{'s' * (runs != 1)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _outcome(child: Child, code: int) -> str:
    """Of a run that has ended: its accuracy, or why there is none."""
    if code == FINISHED:
        accuracy = held_out_accuracy(child.job)
        return "its results cannot be read" if accuracy is None else f"{100 * accuracy:.1f} %"
    if code == RESUBMIT:
        return "stopped, and can be continued"
    ended = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    place = child.job.folder / CONSOLE
    lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [f": {line}" for line in lines if line.startswith("error")][-1:]
    return f"{ended}, see {place}{''.join(said)}"


def held_out_accuracy(job: Job) -> float | None:
    """Of a finished run on its target, by training-domain validation; None if nothing tells it."""
    try:
        rows = read_rows(job.folder / "results.jsonl")
        domains, withheld = rows[0]["moa/domains"], rows[0]["args"]["test_envs"]
        target = domains.index(held_out_names(job.run.held_out, domains)[0])
        return float(training_domain_validation(rows, withheld)[f"env{target}_in_acc"])
    except (OSError, CheckpointError, LookupError, TypeError, ValueError):
        return None
