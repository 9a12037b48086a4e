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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from shards.datasets import held_out_names
from trainer.config.command_line import parse, words
from trainer.config.run_config import ROOT, RunConfig
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError
from trainer.process.world import ALONE
from trainer.sweep.cells import (
    PAIRS,
    TRIAL_SEED,
    Cell,
    Grid,
    differences,
    is_finished,
    misplaced,
    with_pairs,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m trainer.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--methods", type=words, required=True, help="such as linear,moa_kron")
    result.add_argument(
        "--held-out", "--held_out", type=words, required=True, help="domains, with commas"
    )
    result.add_argument("--pairs", action="store_true", help=PAIRS)
    result.add_argument("--seeds", type=words, default=["0"], help="default: 0")
    result.add_argument("--trial-seed", "--trial_seed", type=int, help=TRIAL_SEED)
    result.add_argument(
        "--output_dir", "--output-dir", type=Path, required=True, help="folder of run folders"
    )
    result.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    result.add_argument("rest", nargs="*", help="after --: settings of every run")
    return result


def check(root: Path, cells: Sequence[Cell], rest: Sequence[str]) -> None:
    """Raises `ConfigError` for what no run could do, or a finished one did otherwise."""
    problems: dict[str, None] = dict.fromkeys(misplaced(rest))
    methods: set[str] = set()
    config: RunConfig | None = None
    differing: list[str] = []
    for cell in cells:
        finished = is_finished(root / cell.name) and not differing  # one example is enough
        if cell.method in methods and not finished:
            continue
        methods.add(cell.method)
        try:
            config = parse([*cell.settings(root), *rest])
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).splitlines())
            continue
        if finished:
            differing = differences(root / cell.name, config)
    if config is not None:
        problems |= dict.fromkeys(unknown_domains({cell.held_out for cell in cells}, config))
    if problems or differing:
        raise ConfigError("\n".join([*problems, *differing]))


def unknown_domains(held_out: Iterable[str], config: RunConfig) -> list[str]:
    """One line for each domain that the data do not have, where they are known yet."""
    from trainer.plan.data import domain_names

    known = domain_names(config)
    names = {name for text in held_out for name in held_out_names(text, known or ())}
    return [
        f"--held-out: no domain {name!r}; legal are {', '.join(known)}"
        for name in sorted(names)
        if known and name not in known
    ]


def run_one(root: Path, cell: Cell, rest: Sequence[str]) -> int:
    """Runs one cell, its output in `console.txt` of its folder; returns the exit code."""
    folder = root / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "trainer" / "run.py")]
    command += cell.settings(root)
    with (folder / "console.txt").open("w", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *rest], stdout=output, stderr=output, env=environment, check=False
        ).returncode


def sweep(root: Path, cells: Sequence[Cell], jobs: int, rest: Sequence[str]) -> int:
    """Runs what is not finished; returns the number of runs that failed."""
    check(root, cells, rest)
    console = Console()
    todo = [cell for cell in cells if not is_finished(root / cell.name)]
    console.print(f"{len(cells)} runs, {len(cells) - len(todo)} of them finished before")
    with ThreadPoolExecutor(jobs) as pool:
        codes = pool.map(lambda cell: run_one(root, cell, rest), todo)
        ended = zip(todo, codes, strict=True)
        failed = [
            (cell, code)
            for cell, code in track(ended, "runs", total=len(todo), console=console)
            if code
        ]
    for cell, code in failed:
        place = root / cell.name / "console.txt"
        lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [f": {line}" for line in lines if line.startswith("error")][-1:]
        console.print(f"exit code {code}, see {place}{''.join(said)}", soft_wrap=True, markup=False)
    command = f"python -m trainer.report {shlex.quote(str(root))}"
    console.print(f"table: {command}", soft_wrap=True, highlight=False, markup=False)
    return len(failed)


def main(argv: Sequence[str]) -> int:
    """Command line; returns 1 if a run failed, 2 if none could be started as asked for."""
    args = parser().parse_args(argv)
    if args.jobs < 1:
        parser().error(f"--jobs {args.jobs}: must be 1 or more")
    wrong = [seed for seed in args.seeds if not seed.isdecimal()]
    if wrong:
        parser().error(f"--seeds {wrong[0]!r}: must be whole numbers >= 0")
    for name in ("methods", "held_out", "seeds"):
        if not getattr(args, name):
            parser().error(f"--{name.replace('_', '-')}: names nothing")
    held_out = with_pairs(args.held_out) if args.pairs else args.held_out
    lists = (tuple(args.methods), tuple(held_out), tuple(map(int, args.seeds)))
    cells = Grid(*lists, args.trial_seed).cells()
    failed: list[int] = []
    code = conclude(
        lambda: failed.append(sweep(args.output_dir, cells, args.jobs, args.rest)), ALONE
    )
    return code or int(any(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
