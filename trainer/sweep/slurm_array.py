"""`python -m trainer.sweep.slurm_array`: runs of a sweep, numbered for a SLURM array.

Prints the `sbatch --array=` line for the runs that are missing; with `--index` the settings of one
run, a word a line, as `slurm/leave_one_out.sh` reads them. Other flags go to every run.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shards.addresses import without_secrets
from trainer.checkpoint.atomic_file import replace_text
from trainer.config.command_line import OwnFlags, command_parser, parse_without_data
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError
from trainer.process.world import ALONE
from trainer.sweep.checks import Shared, check, every_domain
from trainer.sweep.grid import (
    HPARAMS_SEEDS,
    Grid,
    add_grid_flags,
    array_expression,
    progress,
    with_pairs,
)

NOTE = "grid.json"
JOBS = "array-jobs"
"""Folder with a file for each array job that ran here, named by its number: options of `sbatch`."""

OPTIONS = {
    "NumNodes": "nodes", "CPUs/Task": "cpus-per-task", "MinMemoryNode": "mem",
    "MinMemoryCPU": "mem-per-cpu", "TimeLimit": "time", "Partition": "partition",
    "Account": "account", "QOS": "qos", "Features": "constraint", "Reservation": "reservation",
    "ReqNodeList": "nodelist", "ExcNodeList": "exclude", "MailUser": "mail-user",
    "MailType": "mail-type",
}  # fmt: skip
"""What `scontrol show job` calls an option of `sbatch`."""


@dataclass(frozen=True)
class Note:
    """What `grid.json` holds: the grid, and the other arguments that the script was given."""

    grid: Grid
    arguments: tuple[str, ...]

    def submit_line(self, indices: Sequence[int], options: Sequence[str] = ()) -> str:
        """The command that runs some of the runs, with options as of an array before."""
        lists = asdict(self.grid)
        trial_seed, hparams_seeds = lists.pop("trial_seed"), lists.pop("hparams_seeds")
        flags = [f"--{name}={','.join(map(str, values))}" for name, values in lists.items()]
        if hparams_seeds != (0,):
            flags.append(f"--hparams_seeds={array_expression(hparams_seeds)}")
        if trial_seed is not None:
            flags.append(f"--trial_seed={trial_seed}")
        throttle = "".join(option for option in options if option.startswith("%"))
        array = f"--array={array_expression(indices)}{throttle}"
        others = [option for option in options if not option.startswith("%")]
        return shlex.join(
            ["sbatch", array, *others, "slurm/leave_one_out.sh", *flags, *self.arguments]
        )


def read_note(root: Path) -> Note:
    """The grid whose runs are in `root`; `ConfigError` if there is none, or it is not readable."""
    try:
        content = json.loads((root / NOTE).read_text(encoding="utf-8"))
        grid = content["grid"]
        methods, held_out, seeds = (tuple(grid[k]) for k in ("methods", "held_out", "seeds"))
        drawn = tuple(grid.get("hparams_seeds", (0,)))  # of an older release
        arguments = tuple(content["arguments"])
        return Note(Grid(methods, held_out, seeds, grid["trial_seed"], drawn), arguments)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{root}: no {NOTE}; give the --output_dir of python -m trainer.sweep.slurm_array"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root / NOTE}: not readable ({error!r}); remove it") from error


def keep_note(root: Path, note: Note) -> Note:
    """Writes the grid down, so that a report knows which runs there should be.

    Returns what stands there now: a larger grid of before stays, with the new arguments. One in
    which an index means another run is a `ConfigError`.
    """
    note = replace(note, arguments=tuple(map(without_secrets, note.arguments)))
    if (root / NOTE).exists():
        old = read_note(root)
        if old.grid.extends(note.grid):
            note = replace(note, grid=old.grid)
        elif not note.grid.extends(old.grid):
            raise ConfigError(
                f"output_dir: {root} holds the grid {old.grid}, not {note.grid}; only further "
                "seeds may be added at the end, and hparams seeds while there is one seed: give "
                "another --output_dir"
            )
        if note == old:
            return note
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / NOTE, json.dumps(asdict(note), indent=1) + "\n", contended=True)
    return note


def report_lines(root: Path) -> list[str]:
    """Which runs of a grid are finished, running and missing, and the line that fills the gaps."""
    note = read_note(root)
    runs = note.grid.runs()
    queued = queued_indices(path.name for path in (root / JOBS).glob("*"))
    finished, running, missing = progress(root, runs, queued).values()
    lines = [
        f"{root}: {len(runs)} runs, {len(finished)} finished, {len(running)} running or queued, "
        f"{len(missing)} missing"
    ]
    lines += [f"running or queued: {index} {runs[index].name}" for index in running]
    lines += [f"missing: {index} {runs[index].name}" for index in missing]
    return [*lines, note.submit_line(missing, latest_options(root))] if missing else lines


def options_of(record: str) -> list[str]:
    """The options with which `sbatch` made the job that a line of `scontrol show job` describes.

    The largest number of runs of its array at a time comes last, as `%4`.
    """
    told = dict(word.split("=", 1) for word in record.split() if "=" in word)
    unset = {"", "0", "N/A", "(null)", "UNLIMITED", "Partition_Limit"}
    told = {key: value for key, value in told.items() if value not in unset}
    found = [f"--{option}={told[key]}" for key, option in OPTIONS.items() if key in told]
    if tasks := told.get("NumTasks", ""):
        a_node, nodes = told.get("NtasksPerN:B:S:C", "").partition(":")[0], told.get("NumNodes", "")
        even = a_node.isdecimal() and nodes.isdecimal() and tasks == str(int(a_node) * int(nodes))
        found.append(f"--ntasks-per-node={a_node}" if even else f"--ntasks={tasks}")
    if gpus := re.findall(r"gpu:([\w.:-]+)", told.get("TresPerNode", "")):
        found.append(f"--gpus-per-node={','.join(gpus)}")
    if " Requeue=0" in record:
        found.append("--no-requeue")
    return [*found, *(f"%{told[key]}" for key in ("ArrayTaskThrottle",) if key in told)]


def latest_options(root: Path) -> list[str]:
    """The options of the array job that ran in `root` last; none where no job has noted any."""
    jobs = [path for path in (root / JOBS).glob("*") if path.stat().st_size]
    latest = max(jobs, key=lambda path: path.stat().st_mtime, default=None)
    return latest.read_text(encoding="utf-8").splitlines() if latest else []


def progress_lines(paths: Iterable[Path]) -> list[str]:
    """`report_lines` of each folder that a grid filled; a complaint where that is not readable."""
    lines: list[str] = []
    for path in paths:
        if (path / NOTE).is_file():
            try:
                lines += report_lines(path)
            except ConfigError as error:
                lines.append(f"left out: {error}")
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.sweep.slurm_array", __doc__, OwnFlags, allow_abbrev=False)
    result.add_argument("--recipe", default="embedded", help="default: embedded")
    meanings = {
        "methods": "default: the recipe's", "held_out": "default: every domain of the dataset",
        "seeds": "such as 0,1,2 or 0-2; default: the recipe's", "hparams_seeds": HPARAMS_SEEDS,
        "output_dir": "default: outputs/RECIPE",
    }  # fmt: skip
    add_grid_flags(result, required=False, meanings=meanings)
    result.add_argument("--index", type=int, help="print the settings of this run alone")
    result.add_argument("--job", help="with --index: the array job that runs it")
    result.add_argument("--record", default="", help="with --job: what scontrol shows of it")
    return result


def read_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, Path, Note, Shared]:
    """The flags, the folder of the runs, the grid, and the settings that runs share.

    `ConfigError` for a setting that cannot work, or domains that nothing tells.
    """
    own, rest = parser().parse_known_args(argv)
    shared = Shared([f"--recipe={own.recipe}", *rest], own.set)
    config = parse_without_data(shared.flags)
    methods, seeds = own.methods or (config.moa.method,), own.seeds or (config.train.seed,)
    drawn = own.hparams_seeds or (config.hparams_seed,)
    held_out = own.held_out or every_domain(config)
    held_out = with_pairs(held_out) if own.pairs else held_out
    grid = Grid(methods, held_out, seeds, own.trial_seed, drawn)
    root = own.output_dir or Path("outputs") / Path(own.recipe).stem
    alone = {"moa.method"} if methods == (config.moa.method,) else set()
    alone |= {"train.seed"} if seeds == (config.train.seed,) else set()
    alone |= {"hparams_seed"} if drawn == (config.hparams_seed,) else set()
    check(root, grid.runs(), shared, parse_without_data, alone)
    sets = [f"--set={method}:{flag.removeprefix('--')}" for method, flag in own.set]
    note = Note(grid, (f"--recipe={own.recipe}", f"--output_dir={root}", *sets, *rest))
    return own, root, note, shared


def command(argv: Sequence[str]) -> None:
    """Reads the command line, notes the grid and prints what was asked for."""
    own, root, note, shared = read_command_line(argv)
    runs = note.grid.runs()
    if own.index is not None and not 0 <= own.index < len(runs):
        raise ConfigError(
            f"array index {own.index}: the grid has {len(runs)} runs; submit with "
            f"--array=0-{len(runs) - 1}"
        )
    keep_note(root, note)
    if own.index is None:
        lines = report_lines(root)
    else:
        if own.job:
            (root / JOBS).mkdir(exist_ok=True)
            options = "".join(f"{option}\n" for option in options_of(own.record))
            (root / JOBS / own.job).write_text(options, encoding="utf-8")
        run = runs[own.index]
        lines = [*shared.of(run.method), *run.flags(root)]
    sys.stdout.write("\n".join(lines) + "\n")


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    return conclude(lambda: command(argv), ALONE)


def queued_indices(jobs: Iterable[str]) -> set[int]:
    """Indices of some array jobs that run or wait to; none without SLURM or of jobs it forgot."""
    found: set[int] = set()
    for job in jobs:
        command = ["squeue", "--noheader", "--array", f"--job={job}", "--format=%K"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return set()
        found |= {int(word) for word in shown.stdout.split() if word.isdecimal()}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
