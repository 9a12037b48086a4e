"""`python -m trainer.sweep`: methods x held-out domains x seeds, one run folder each.

Finished runs are left alone, so the command may be interrupted and repeated; a finished run of
other settings is refused. Each run is a plain process of `trainer/run.py` on one thread; what
follows `--` goes to every run.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.config.command_line import command_parser, parse
from trainer.config.run_config import ROOT
from trainer.process.ending import conclude
from trainer.process.tables import output_console
from trainer.process.world import ALONE
from trainer.sweep import grid


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.sweep", __doc__)
    meanings = {
        "methods": "such as linear,moa_kron", "held_out": "domains, with commas",
        "seeds": "default: 0", "output_dir": "folder of run folders",
    }  # fmt: skip
    grid.add_grid_flags(result, required=True, meanings=meanings)
    result.set_defaults(seeds=(0,))
    result.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    result.add_argument("rest", nargs="*", help="after --: settings of every run")
    return result


def run_one(folder: Path, settings: Sequence[str]) -> int:
    """Runs one, its output in `grid.CONSOLE` of its folder; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / grid.CONSOLE).open("w", encoding="utf-8") as output:
        return subprocess.call(command, stdout=output, stderr=output, env=environment)


def sweep(root: Path, runs: Sequence[grid.GridRun], jobs: int, rest: Sequence[str]) -> int:
    """Runs what is not finished; returns the number of runs that failed."""
    from rich.progress import track  # here: `--help` need not wait for it

    grid.check(root, runs, rest, parse)
    console = output_console()
    todo = [run for run in runs if not grid.is_finished(root / run.name)]
    console.out(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
    with ThreadPoolExecutor(jobs) as pool:
        ended = pool.map(lambda r: run_one(root / r.name, [*r.flags(root), *rest]), todo)
        codes = list(track(ended, "runs", total=len(todo), console=console))
    for run, code in zip(todo, codes, strict=True):
        if code:
            place = root / run.name / grid.CONSOLE
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [f": {line}" for line in lines if line.startswith("error")][-1:]
            console.out(f"exit code {code}, see {place}{''.join(said)}")
    console.out(f"table: python -m trainer.report {shlex.quote(str(root))}")
    return sum(map(bool, codes))


def main(argv: Sequence[str]) -> int:
    """Command line; returns 1 if a run failed, 2 if none could be started as asked for."""
    args = parser().parse_args(argv)
    if args.jobs < 1:
        parser().error(f"--jobs {args.jobs}: must be 1 or more")
    held_out = grid.with_pairs(args.held_out) if args.pairs else args.held_out
    runs = grid.Grid(args.methods, held_out, args.seeds, args.trial_seed).runs()
    failed: list[int] = []
    code = conclude(
        lambda: failed.append(sweep(args.output_dir, runs, args.jobs, args.rest)), ALONE
    )
    return code or int(any(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
