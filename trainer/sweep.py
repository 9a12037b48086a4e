"""`python -m trainer.sweep`: methods x held-out domains x seeds, one run folder each.

Finished runs are left alone, so the command may be interrupted and repeated. Each run is a plain
process of `trainer/run.py` on one thread; what follows `--` goes to every run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trainer.config import ROOT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m trainer.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--methods", type=_names, required=True, help="such as linear,moa_kron")
    result.add_argument("--held-out", type=_names, required=True, help="domains, with commas")
    result.add_argument("--seeds", type=_names, default=["0"], help="default: 0")
    result.add_argument("--output-dir", type=Path, required=True, help="folder of run folders")
    result.add_argument("--jobs", type=int, default=1, help="runs at the same time; default: 1")
    result.add_argument("rest", nargs="*", help="after --: settings of every run")
    return result


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run_one(folder: Path, method: str, held_out: str, seed: str, rest: Sequence[str]) -> int:
    """Runs one cell, its output in `console.txt`; returns the exit code.

    The seed counts for everything: initialisation, order and, as DomainBed's trial seed, the split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "moa.method": method, "data.held_out": held_out, "train.seed": seed,
        "train.trial_seed": seed, "output_dir": str(folder),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "trainer" / "run.py")]
    command += [f"--{key}={value}" for key, value in settings.items()]
    with (folder / "console.txt").open("w", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *rest], stdout=output, stderr=output, env=environment, check=False
        ).returncode


def main(argv: Sequence[str]) -> int:
    """Command line; returns 1 if a run failed."""
    args = parser().parse_args(argv)
    if args.jobs < 1:
        parser().error(f"--jobs {args.jobs}: must be 1 or more")
    console = Console()
    cells = [
        (args.output_dir / f"{method}-{held_out}-{seed}", method, held_out, seed)
        for seed, held_out, method in product(args.seeds, args.held_out, args.methods)
    ]
    todo = [cell for cell in cells if not (cell[0] / "done").is_file()]
    console.print(f"{len(cells)} runs, {len(cells) - len(todo)} of them finished before")
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = pool.map(lambda c: run_one(c[0], c[1], c[2], c[3], args.rest), todo)
        failed = [
            (cell[0], code)
            for cell, code in track(
                zip(todo, codes, strict=True), "runs", total=len(todo), console=console
            )
            if code
        ]
    for folder, code in failed:
        console.print(f"exit code {code}: see {folder / 'console.txt'}", soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
