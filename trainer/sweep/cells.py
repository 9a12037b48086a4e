"""Runs of a grid, held-out domains x seeds x methods, by number; and which of them are done."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, product
from pathlib import Path

import yaml

from trainer.checkpoint.folder_lock import FolderLock, is_alive
from trainer.config.resume_rules import FREE
from trainer.config.run_config import RunConfig, dotted, flat

PAIRS = "also hold out every two of them together, for leave-one-domain-out cross-validation"
"""Help of the flag --pairs."""
TRIAL_SEED = "one trial seed, and so one split, for all runs (default: each run's seed)"
"""Help of the flag --trial-seed."""
OWN = {
    "moa.method": "--methods",
    "data.held_out": "--held-out",
    "train.seed": "--seeds",
    "train.trial_seed": "--trial-seed",
    "output_dir": "before the settings of all runs",
}
"""Settings in which the runs of a grid differ, and the flag of a grid that decides them."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        method: `moa.method`.
        held_out: `data.held_out`.
        seed: of initialisation and order.
        trial_seed: of the split; None is the same as `seed`.
    """

    method: str
    held_out: str
    seed: int
    trial_seed: int | None = None

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.method}-{self.held_out}-{self.seed}"

    def settings(self, root: Path) -> list[str]:
        """The flags of `trainer/run.py` that make a run this one, in a folder of `root`."""
        return [
            f"--moa.method={self.method}",
            f"--data.held_out={self.held_out}",
            f"--train.seed={self.seed}",
            f"--train.trial_seed={self.seed if self.trial_seed is None else self.trial_seed}",
            f"--output_dir={root / self.name}",
        ]


@dataclass(frozen=True)
class Grid:
    """All combinations of some methods, held-out domains and seeds."""

    methods: tuple[str, ...]
    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    trial_seed: int | None = None

    def cells(self) -> list[Cell]:
        """The runs in order of their array index; further seeds come after all others."""
        by_index = product(self.seeds, self.held_out, self.methods)
        return [Cell(m, held_out, seed, self.trial_seed) for seed, held_out, m in by_index]

    def extends(self, other: "Grid") -> bool:
        """Whether every index of `other` means the same run here."""
        return self.cells()[: len(other.cells())] == other.cells()


def misplaced(settings: Sequence[str], defaults: Collection[str] = ()) -> list[str]:
    """One line for each setting given for all runs in which the runs of a grid differ.

    Args:
        settings: the flags for all runs.
        defaults: settings that may be there, since they are the only value of their list.
    """
    names = {word.removeprefix("--").partition("=")[0] for word in settings} - set(defaults)
    return [
        f"--{name}: cannot be the same for every run; give it as {flag}"
        for name, flag in OWN.items()
        if name in names
    ]


def differences(run: Path, config: RunConfig) -> list[str]:
    """In what a finished run differs from the settings asked for, one line each."""
    kept = run / "config.yaml"
    if not kept.is_file():
        return [f"{run}: holds a finished run without its config.yaml; move that folder away"]
    found = dict(dotted(yaml.safe_load(kept.read_text(encoding="utf-8"))))
    asked = flat(replace(config, moa=config.moa.resolved()))
    return [
        f"{name}: the finished run in {run} has {found.get(name)!r}, now {value!r}; give another "
        "--output_dir, or remove that folder"
        for name, value in asked.items()
        if found.get(name) != value
        and (name not in FREE or name == "train.steps")
        and value not in (None, "auto")
    ]


def with_pairs(held_out: Sequence[str]) -> list[str]:
    """Domains, and every pair of them as `data.held_out` writes it."""
    return [*held_out, *("+".join(pair) for pair in combinations(held_out, 2))]


@dataclass(frozen=True)
class Progress:
    """Array indices of a grid by what became of them."""

    finished: tuple[int, ...]
    running: tuple[int, ...]
    missing: tuple[int, ...]


def is_finished(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (run / "done").is_file()


def progress(root: Path, cells: Sequence[Cell], queued: Collection[int] = ()) -> Progress:
    """Sorts the runs in `root` into finished, running and missing.

    Args:
        root: folder of the run folders.
        cells: the runs by index.
        queued: indices that SLURM runs, or holds in its queue.
    """
    finished, running, missing = [], [], []
    for index, cell in enumerate(cells):
        run = root / cell.name
        if is_finished(run):
            finished.append(index)
        elif index in queued or _runs_here(run):
            running.append(index)
        else:
            missing.append(index)
    return Progress(tuple(finished), tuple(running), tuple(missing))


def _runs_here(run: Path) -> bool:
    """Whether a process of this machine holds the folder."""
    return bool(is_alive(FolderLock(run).owner()))


def array_expression(indices: Sequence[int]) -> str:
    """Ascending indices as `sbatch --array` takes them, such as `0-3,7`."""
    parts = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
