"""`python -m trainer.sweep`: methods x held-out domains x seeds, one run folder each.

Finished runs are left alone, so the command may be interrupted and repeated; a finished run of
other settings is refused. Each run is a plain process of `trainer/run.py` on one thread; what
follows `--` goes to every run. Ctrl-C lets the runs under way save and end.
"""

import argparse
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.addresses import without_secrets
from trainer.config.command_line import command_parser, parse
from trainer.process.ending import conclude
from trainer.process.errors import FAILED, FINISHED, RESUBMIT
from trainer.process.tables import output_console
from trainer.process.world import ALONE
from trainer.sweep import grid
from trainer.sweep.checks import Shared, check, every_domain
from trainer.sweep.processes import Child, Job, noting_signals, visible_gpus

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.sweep.console import SweepConsole

POLL = 0.2
"""Seconds between two looks at the runs under way."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.sweep", __doc__)
    meanings = {
        "methods": "such as linear,moa_kron",
        "held_out": "domains, with commas; default: every domain of the dataset",
        "seeds": "such as 0,1,2 or 0-2; default: 0", "hparams_seeds": grid.HPARAMS_SEEDS,
        "output_dir": "folder of run folders",
    }  # fmt: skip
    grid.add_grid_flags(result, required=True, meanings=meanings)
    result.set_defaults(seeds=(0,), hparams_seeds=(0,))
    add = result.add_argument
    add("--jobs", type=int, help="runs at the same time; default: 1, or one on each of --gpus")
    add("--gpus", type=int, help="so many runs at the same time, each on a visible GPU of its own")
    add("--dry_run", action="store_true", help="show what would be run, and run nothing")
    add("rest", nargs="*", help="after --: settings of every run")
    return result


def sweep(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs what is not finished; returns the exit code."""
    shared = Shared(args.rest, args.set)
    of_first = [*shared.of(args.methods[0]), f"--moa.method={args.methods[0]}"]
    held_out = args.held_out or every_domain(parse(of_first))
    held_out = grid.with_pairs(held_out) if args.pairs else held_out
    everything = grid.Grid(args.methods, held_out, args.seeds, args.trial_seed, args.hparams_seeds)
    root, runs = args.output_dir, everything.runs()
    configs = check(root, runs, shared, parse)
    gpus: Sequence[str | None] = visible_gpus(args.gpus) if args.gpus else [None] * (args.jobs or 1)
    jobs = [
        Job(run, root / run.name, (*shared.of(run.method), *run.flags(root)),
            configs[run.method, run.hparams_seed].train.steps)
        for run in runs
    ]  # fmt: skip
    todo = [job for job in jobs if not grid.is_finished(job.folder)]
    console = output_console()
    console.out(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
    if args.dry_run:
        show_plan(console, root, jobs)
        return FINISHED
    from trainer.sweep.console import SweepConsole  # here: `--help` need not wait for rich

    told = SweepConsole(console, len(todo), len(gpus))
    with told.bars:
        signals = work(todo, gpus, told)
    failed = len(todo) - told.codes.count(FINISHED)
    if signals and failed:
        again = shlex.join(["python", "-m", "trainer.sweep", *map(without_secrets, argv)])
        console.out(f"finished {len(todo) - failed} of {len(todo)} runs; to go on: {again}")
        return RESUBMIT
    if failed:
        console.out(f"{failed} of {len(todo)} runs did not finish, see above")
    tune = " --tune" if len(args.hparams_seeds) > 1 else ""
    console.out(f"table: python -m trainer.report {shlex.quote(str(root))}{tune}")
    return FAILED if failed else FINISHED


def show_plan(console: "Console", root: Path, jobs: Sequence[Job]) -> None:
    """Which runs are finished or under way, and the commands of the others."""
    states = grid.progress(root, [job.run for job in jobs])
    word = {index: state for state, found in states.items() for index in found}
    for index, job in enumerate(jobs):
        console.out(f"{word[index]}: {job.run.name}")
        if word[index] == "missing":
            console.out(f"  {shlex.join(map(without_secrets, job.command))}")


def work(jobs: Sequence[Job], gpus: Sequence[str | None], told: "SweepConsole") -> list[int]:
    """Runs the jobs, one a GPU at a time; returns the signals that broke them off.

    At the first signal no more are begun and those under way save and end; one more Ctrl-C kills.
    """
    waiting, free, running = deque(jobs), [*gpus], list[Child]()
    obeyed = 0
    with noting_signals() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and free and not signals:
                    running.append(Child(waiting.popleft(), free.pop(0)))
                    told.begins(running[-1])
                if len(signals) > obeyed:
                    obeyed, again = len(signals), signal.SIGINT in signals[1:]
                    for child in running:
                        child.end(kill=again)
                    told.stops(signals[-1], again)
                told.shows()
                time.sleep(POLL)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    free.append(child.gpu)
                    told.ends(child, child.process.returncode)
        finally:  # an error of ours leaves nothing behind
            for child in running:
                child.end()
            for child in running:
                child.process.wait()
    return signals


def main(argv: Sequence[str]) -> int:
    """Command line; returns 1 if a run failed, 2 if none could be started, 75 if broken off."""
    args = parser().parse_args(argv)
    for name, number in (("jobs", args.jobs), ("gpus", args.gpus)):
        if number is not None and number < 1:
            parser().error(f"--{name} {number}: must be 1 or more")
    if args.gpus and args.jobs not in (None, args.gpus):
        parser().error(f"--jobs {args.jobs}: --gpus {args.gpus} says how many; leave --jobs out")
    codes: list[int] = []
    code = conclude(lambda: codes.append(sweep(args, argv)), ALONE)
    return code or codes[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
