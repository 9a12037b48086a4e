"""A grid of runs, held-out domains x seeds x methods, by number; and which of them are done."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, product
from pathlib import Path

import yaml

from shards.datasets import held_out_names
from trainer.checkpoint.folder_lock import FolderLock, is_alive
from trainer.config.command_line import words
from trainer.config.resume_rules import FREE
from trainer.config.run_config import RunConfig, dotted, flat
from trainer.process.errors import ConfigError

CONSOLE = "console.txt"
"""What a sweep on this machine leaves of a run's output, even of one that did not start."""
OWN = {
    "moa.method": "--methods",
    "data.held_out": "--held_out",
    "train.seed": "--seeds",
    "train.trial_seed": "--trial_seed",
    "output_dir": "before the settings of all runs",
}
"""Settings in which the runs of a grid differ, and the flag of a grid that decides them."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid; a `trial_seed` of None is the same as `seed`."""

    method: str
    held_out: str
    seed: int
    trial_seed: int | None = None

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.method}-{self.held_out}-{self.seed}"

    def settings(self, root: Path) -> dict[str, str | int]:
        """The settings that make a run this one, in a folder of `root`."""
        return {
            "moa.method": self.method,
            "data.held_out": self.held_out,
            "train.seed": self.seed,
            "train.trial_seed": self.seed if self.trial_seed is None else self.trial_seed,
            "output_dir": str(root / self.name),
        }

    def flags(self, root: Path) -> list[str]:
        """These settings as flags of `trainer/run.py`."""
        return [f"--{name}={value}" for name, value in self.settings(root).items()]


@dataclass(frozen=True)
class Grid:
    """All combinations of some methods, held-out domains and seeds."""

    methods: tuple[str, ...]
    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    trial_seed: int | None = None

    def runs(self) -> list[GridRun]:
        """The runs in order of their array index; further seeds come after all others."""
        by_index = product(self.seeds, self.held_out, self.methods)
        return [GridRun(m, held_out, seed, self.trial_seed) for seed, held_out, m in by_index]

    def extends(self, other: "Grid") -> bool:
        """Whether every index of `other` means the same run here."""
        return self.runs()[: len(other.runs())] == other.runs()

    def __str__(self) -> str:
        lists = (self.methods, self.held_out, map(str, self.seeds))
        fixed = "" if self.trial_seed is None else f" with trial seed {self.trial_seed}"
        return " x ".join(f"[{', '.join(names)}]" for names in lists) + fixed


def add_grid_flags(
    result: argparse.ArgumentParser, required: bool, meanings: Mapping[str, str]
) -> None:
    """The flags that name a grid and its folder.

    All but the seeds must be given if `required`; `meanings` has the help of `methods`, `held_out`,
    `seeds` and `output_dir`.
    """
    kinds: dict[str, Callable[[str], object]] = {
        "methods": listed, "held_out": listed, "seeds": whole_numbers, "output_dir": Path,
    }  # fmt: skip
    for name, kind in kinds.items():
        must = required and name != "seeds"
        result.add_argument(f"--{name}", type=kind, required=must, help=meanings[name])
    result.add_argument(
        "--pairs", action="store_true",
        help="also hold out every two of them together, for leave-one-domain-out cross-validation",
    )  # fmt: skip
    result.add_argument(
        "--trial_seed", type=int,
        help="one trial seed, and so one split, for all runs (default: each run's seed)",
    )  # fmt: skip


def listed(text: str) -> tuple[str, ...]:
    """Argument type: names with commas, each once and at least one."""
    found = tuple(words(text))
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """Argument type: seeds with commas."""
    found = listed(text)
    if wrong := [seed for seed in found if not seed.isdecimal()]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: legal are whole numbers >= 0")
    return tuple(map(int, found))


def with_pairs(held_out: Sequence[str]) -> tuple[str, ...]:
    """Domains, and every pair of them as `data.held_out` writes it."""
    return (*held_out, *("+".join(pair) for pair in combinations(held_out, 2)))


def check(
    root: Path,
    runs: Sequence[GridRun],
    shared: Sequence[str],
    parse: Callable[[list[str]], RunConfig],
    defaults: Collection[str] = (),
) -> None:
    """Raises `ConfigError` for what no run in `root` could do, or a finished one did otherwise.

    `shared` are the flags of all runs; those of `defaults` among them are the only value of their
    list in the grid. `parse` makes a configuration of a run's flags.
    """
    from trainer.plan.data import domain_names

    given = {word.removeprefix("--").partition("=")[0] for word in shared} - set(defaults)
    problems = [
        f"--{name}: cannot be the same for every run; give it as {flag}"
        for name, flag in OWN.items()
        if name in given
    ]
    configs: dict[str, RunConfig] = {}
    for run in {run.method: run for run in reversed(runs)}.values():  # one for each method
        try:
            configs[run.method] = parse([*shared, *run.flags(root)])
        except ConfigError as error:
            problems += str(error).splitlines()
    if configs:
        domains = domain_names(next(iter(configs.values()))) or ()
        names = {name for run in runs for name in held_out_names(run.held_out, domains)}
        problems += [
            f"--held_out: no domain {name!r}; legal are {', '.join(domains)}"
            for name in sorted(names)
            if domains and name not in domains
        ]
    finished = [run for run in runs if run.method in configs and is_finished(root / run.name)]
    differing = (differences(root, run, configs[run.method]) for run in finished)
    problems += next(filter(None, differing), [])  # one example is enough
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def differences(root: Path, run: GridRun, config: RunConfig) -> list[str]:
    """In what a finished run differs from its method's settings as asked for, one line each."""
    folder = root / run.name
    kept = folder / "config.yaml"
    if not kept.is_file():
        return [f"{folder}: holds a finished run without its config.yaml; move that folder away"]
    found = dict(dotted(yaml.safe_load(kept.read_text(encoding="utf-8"))))
    asked = flat(replace(config, moa=config.moa.resolved())) | run.settings(root)
    return [
        f"{name}: the finished run in {folder} has {found.get(name)!r}, now {value!r}; give "
        "another --output_dir, or remove that folder"
        for name, value in asked.items()
        if found.get(name) != value
        and (name not in FREE or name == "train.steps")
        and value not in (None, "auto")
    ]


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
