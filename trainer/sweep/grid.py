"""A grid of runs by number, seeds x sets of hyper-parameters x held-out domains x methods."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, product
from pathlib import Path

from trainer.checkpoint.folder_lock import FolderLock, is_alive
from trainer.config.command_line import words

CONSOLE = "console.txt"
"""What a sweep on this machine leaves of a run's output, even of one that did not start."""
HPARAMS_SEEDS = "sets of hyper-parameters to draw as DomainBed does, such as 0-19; 0: none drawn"


@dataclass(frozen=True)
class GridRun:
    """One run of a grid; a `trial_seed` of None is the same as `seed`."""

    method: str
    held_out: str
    seed: int
    trial_seed: int | None = None
    hparams_seed: int = 0

    @property
    def name(self) -> str:
        """Name of its run folder."""
        drawn = f"-h{self.hparams_seed}" if self.hparams_seed else ""
        return f"{self.method}-{self.held_out}-{self.seed}{drawn}"

    def settings(self, root: Path) -> dict[str, str | int]:
        """The settings that make a run this one, in a folder of `root`."""
        return {
            "moa.method": self.method,
            "data.held_out": self.held_out,
            "train.seed": self.seed,
            "train.trial_seed": self.seed if self.trial_seed is None else self.trial_seed,
            "hparams_seed": self.hparams_seed,
            "output_dir": str(root / self.name),
        }

    def flags(self, root: Path) -> list[str]:
        """These settings as flags of `trainer/run.py`."""
        return [f"--{name}={value}" for name, value in self.settings(root).items()]


@dataclass(frozen=True)
class Grid:
    """All combinations of some methods, held-out domains, seeds and sets of hyper-parameters."""

    methods: tuple[str, ...]
    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    trial_seed: int | None = None
    hparams_seeds: tuple[int, ...] = (0,)

    def runs(self) -> list[GridRun]:
        """The runs in order of their array index; further seeds come after all others."""
        by_index = product(self.seeds, self.hparams_seeds, self.held_out, self.methods)
        return [GridRun(m, out, seed, self.trial_seed, h) for seed, h, out, m in by_index]

    def extends(self, other: "Grid") -> bool:
        """Whether every index of `other` means the same run here."""
        return self.runs()[: len(other.runs())] == other.runs()

    def __str__(self) -> str:
        lists = (self.methods, self.held_out, map(str, self.seeds))
        fixed = "" if self.trial_seed is None else f" with trial seed {self.trial_seed}"
        if self.hparams_seeds != (0,):
            fixed += f" with hparams seeds {array_expression(self.hparams_seeds)}"
        return " x ".join(f"[{', '.join(names)}]" for names in lists) + fixed


def add_grid_flags(
    result: argparse.ArgumentParser, required: bool, meanings: Mapping[str, str]
) -> None:
    """The flags that name a grid and its folder.

    Methods and folder must be given if `required`; `meanings` has the help of the
    lists and of the folder.
    """
    kinds: dict[str, Callable[[str], object]] = {
        "methods": listed, "held_out": listed, "seeds": whole_numbers,
        "hparams_seeds": whole_numbers, "output_dir": Path,
    }  # fmt: skip
    for name, kind in kinds.items():
        must = required and name in ("methods", "output_dir")
        result.add_argument(f"--{name}", type=kind, required=must, help=meanings[name])
    result.add_argument(
        "--pairs", action="store_true",
        help="also hold out every two of them together, for leave-one-domain-out cross-validation",
    )  # fmt: skip
    result.add_argument(
        "--trial_seed", type=int,
        help="one trial seed, and so one split, for all runs (default: each run's seed)",
    )  # fmt: skip
    result.add_argument(
        "--set", type=method_setting, action="append", default=[], metavar="METHOD:SETTING=VALUE",
        help="a setting of one method's runs, such as lora:optim.lr=1e-3; may be repeated",
    )  # fmt: skip


def method_setting(text: str) -> tuple[str, str]:
    """Argument type: `METHOD:SETTING=VALUE` as the method and a flag of `trainer/run.py`."""
    method, colon, setting = text.partition(":")
    name, equals, _ = setting.removeprefix("--").partition("=")
    if not (method and colon and name and equals):
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be METHOD:SETTING=VALUE, such as lora:optim.lr=1e-3"
        )
    return method, f"--{setting.removeprefix('--')}"


def listed(text: str) -> tuple[str, ...]:
    """Argument type: names with commas, each once and at least one."""
    found = tuple(words(text))
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """Argument type: seeds with commas, and ranges such as `0-19`."""
    found: list[int] = []
    for part in listed(text):
        ends = part.split("-", 1)
        if not all(end.isdecimal() for end in ends) or not 0 <= int(ends[-1]) - int(ends[0]) < 1e4:
            raise argparse.ArgumentTypeError(
                f"{part!r}: legal are whole numbers >= 0, and ranges of them such as 0-19"
            )
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return tuple(dict.fromkeys(found))


def with_pairs(held_out: Sequence[str]) -> tuple[str, ...]:
    """Domains, and every pair of them as `data.held_out` writes it."""
    return (*held_out, *("+".join(pair) for pair in combinations(held_out, 2)))


def is_finished(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (run / "done").is_file()


def progress(
    root: Path, runs: Sequence[GridRun], queued: Collection[int] = ()
) -> dict[str, list[int]]:
    """Array indices of the `finished`, `running` and `missing` runs in `root`.

    SLURM runs those of `queued`, or holds them in its queue.
    """
    found: dict[str, list[int]] = {"finished": [], "running": [], "missing": []}
    for index, run in enumerate(runs):
        folder = root / run.name
        if is_finished(folder):
            found["finished"].append(index)
        elif index in queued or is_alive(FolderLock(folder).owner()):  # the latter on this machine
            found["running"].append(index)
        else:
            found["missing"].append(index)
    return found


def array_expression(indices: Sequence[int]) -> str:
    """Ascending indices as `sbatch --array` takes them, such as `0-3,7`."""
    parts = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
