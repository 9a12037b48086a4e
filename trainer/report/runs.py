"""Run folders as a report reads them: ours, and those of DomainBed, whose rows say enough."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moa.files.markdown import visible
from shards.datasets import DATASETS
from shards.stream.split import seed_hash
from trainer.checkpoint.folder_lock import FolderLock, describe, is_alive
from trainer.checkpoint.run_folder import ZERO_SHOT, read_rows
from trainer.config.run_config import dotted
from trainer.evaluate.selection import Row, num_domains
from trainer.process.errors import CheckpointError, ConfigError
from trainer.sweep.grid import CONSOLE, is_finished

SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast where PyYAML has it: a folder may hold hundreds of runs."""
LONGEST_NAME = 200
Seeds = tuple[int, int]
"""A repetition: seed and trial seed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder.

    Attributes:
        dataset: its name here, such as `officehome`, or that of the shard set if it has one.
        method: `moa.method`, or DomainBed's algorithm.
        domains: all names in order.
        held_out: numbers of the domains left out; one, or two for cross-validation.
        rows: complete evaluations in order.
        settings: dotted, and `model.base_hash` of the weights at the start; none of DomainBed's.
        hparams_seed: DomainBed's number of the settings; 0 is the defaults.
        data: hash of the images; empty if not recorded, as `split`, that of all domains' splits.
        zero_shot: the row of a classifier made from text, before training.
    """

    folder: Path
    dataset: str
    method: str
    domains: tuple[str, ...]
    held_out: tuple[int, ...]
    seeds: Seeds
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    hparams_seed: int = 0
    data: str = ""
    split: str = ""
    finished: bool = True
    zero_shot: Row | None = None

    def how_far(self) -> str:
        """In words, how far an unfinished run is."""
        steps = self.settings.get("train.steps")
        words = f"not finished: evaluated after step {self.rows[-1]['step']}"
        words += f" of {steps}" if steps else ""
        owner = FolderLock(self.folder).owner()
        if owner and is_alive(owner) is not False:
            return f"{words}, in use by {describe(owner)}"
        return f"{words}; the command that started it continues it"


def find_folders(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Run folders among `paths` and directly below, each once; a complaint for each without."""
    found: dict[Path, None] = {}
    complaints = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        below = [p for p in inside if _is_run(p)]
        started = [p for p in inside if (p / CONSOLE).is_file()]
        complaints += [f"{p}: no run; see {p / CONSOLE}" for p in started if p not in below]
        if _is_run(path):
            found[path] = None
        elif below:
            found |= dict.fromkeys(below)
        elif path.is_dir():
            complaints.append(
                f"{path}: neither a run folder (no config.yaml, no results.jsonl) nor a folder of "
                "run folders"
            )
        else:
            complaints.append(f"{path}: no such folder")
    return list(found), complaints


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", "results.jsonl"))


def read_run(folder: Path) -> Run:
    """Reads one run folder, finished or not.

    Raises:
        ConfigError: it holds no evaluation yet.
        CheckpointError: what it holds cannot be read.
    """
    finished, config = is_finished(folder), folder / "config.yaml"
    results, others = folder / "results.jsonl", folder / "evaluations.jsonl"
    rows = read_rows(results, torn=not finished) if results.is_file() else []
    if not (rows or finished) and others.is_file():
        rows = read_rows(others, torn=True)  # eval.mode selection: complete rows come at the end
    if not rows:
        hint = "results.jsonl is empty" if results.is_file() else "no results.jsonl"
        raise ConfigError(f"{folder}: no evaluation yet ({hint})")
    try:
        content = yaml.load(config.read_text("utf-8"), SAFE) if config.is_file() else {}
        settings = dict(dotted(content))
        if "moa/base_hash" in rows[0]:
            settings["model.base_hash"] = str(rows[0]["moa/base_hash"])[:12]
        args = rows[0]["args"]
        own = rows[0].get("moa/dataset")
        dataset = str(own or settings.get("data.dataset") or args["dataset"])
        dataset = dataset.lower() if dataset.lower() in DATASETS else _name(dataset)
        held_out = tuple(sorted(int(env) for env in args["test_envs"]))
        count = len(rows[0].get("moa/domains", ())) or num_domains(rows[0])
        if not held_out or not all(0 <= env < count for env in held_out):
            raise ValueError(f"test_envs {list(held_out)} of {count} domains")
        _check(rows, count, results.is_file())
        text = folder / ZERO_SHOT
        (zero_shot,) = read_rows(text) if text.is_file() else (None,)
        return Run(
            folder=folder, dataset=dataset, rows=tuple(rows), settings=settings,
            method=_name(str(settings.get("moa.method") or args["algorithm"])),
            domains=tuple(map(_name, _domains(rows[0], dataset, settings, held_out, count))),
            held_out=held_out, seeds=_seeds(args),
            hparams_seed=int(args.get("hparams_seed", 0)),
            data=str(rows[0].get("moa/data_hash", "")),
            split=str(rows[0].get("moa/split_hash", "")),
            finished=finished, zero_shot=zero_shot,
        )  # fmt: skip
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its results cannot be read ({error!r})") from error


def _check(rows: Sequence[Row], count: int, complete: bool) -> None:
    """Raises `ValueError` for a row that selection and averages could not use."""
    names = [f"env{env}_{split}_acc" for env in range(count) for split in ("in", "out")]
    more = [f"moa/env{env}_{split}_class_mean" for env in range(count) for split in ("in", "out")]
    for number, row in enumerate(rows, start=1):
        int(row["step"])
        for name in (*names, *more):
            wanted = (complete and name in names) or name in row
            value = row.get(name, "missing")
            if wanted and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"row {number}: {name} is {value}")


def _name(text: str) -> str:
    """A name as tables and pictures can show it; `ValueError` if it is too long for them."""
    if len(text) > LONGEST_NAME:
        raise ValueError(f"a name of {len(text)} letters, {text[:20]}...")
    return visible(text)


def _seeds(args: Mapping[str, Any]) -> Seeds:
    """The repetition that a row's `args` name.

    DomainBed's sweep derives a seed for every run from all that names it. Runs of one trial are one
    repetition there, whatever they hold out and whatever their settings.
    """
    seed, trial = int(args.get("seed", 0)), int(args["trial_seed"])
    hparams = int(args.get("hparams_seed", 0))
    derived = seed_hash(args["dataset"], args["algorithm"], args["test_envs"], hparams, trial)
    return (trial if seed == derived else seed, trial)


def _domains(
    row: Row, dataset: str, settings: Mapping[str, Any], held_out: Sequence[int], count: int
) -> tuple[str, ...]:
    """All domain names: from the row, else from what is known of the dataset and of the run."""
    if "moa/domains" in row:
        return tuple(map(str, row["moa/domains"]))
    known = DATASETS[dataset].domains if dataset in DATASETS else None
    if known is not None and len(known) == count:
        return known
    names = [f"env{i}" for i in range(count)]
    if len(held_out) == 1 and settings.get("data.held_out"):
        names[held_out[0]] = str(settings["data.held_out"])
    return tuple(names)
