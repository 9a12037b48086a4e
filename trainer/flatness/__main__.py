"""`python -m trainer.flatness --adapter A [B ...]`: how flat the loss is around trained adapters.

For each adapter, over the same fixed samples: the largest eigenvalues of the Hessian, the adaptive
sharpness, and the loss along random normalised directions. Compare adapters of one base and method
count by sharpness and slices; eigenvalues also depend on how a method scales its weights.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.atomic_file import replace_text
from trainer.config.command_line import CommandParser
from trainer.evaluate.flags import add_shared_flags
from trainer.process.ending import conclude, leave
from trainer.process.errors import ConfigError, cannot_write
from trainer.process.tables import Table, output_console
from trainer.process.world import ALONE

NUMBERS: tuple[tuple[str, float, float, str], ...] = (
    ("samples", 32, 1, "samples of each domain"),
    ("batch", 32, 1, "images a batch; bounds memory, not the result"),
    ("eigenvalues", 1, 0, "largest eigenvalues of the Hessian; 0 leaves them out"),
    ("steps", 10, 1, "ascent steps of the sharpness"),
    ("directions", 3, 0, "random directions"),
    ("points", 21, 2, "points along each"),
    ("seed", 0, 0, "of samples, directions and the eigenvalues' start"),
    ("rho", 0.5, 0, "radius of the sharpness, in relative changes of the weights"),
    ("reach", 1.0, 0, "ends of the slices; at 1 a filter is moved by its own length"),
)
"""Flag, default, bound and help: whole numbers from the bound on, or finite ones above it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    first = (__doc__ or "").partition("\n\n")[2]
    result = CommandParser(prog="python -m trainer.flatness", description=first)
    add_shared_flags(result)
    result.add_argument("--out", type=Path, help="folder for flatness.json and flatness.png")
    result.add_argument(
        "--split", choices=["in", "out"], default="out", help="their split (%(default)s)"
    )
    for name, default, _, text in NUMBERS:
        result.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)"
        )
    result.add_argument("--json", action="store_true", help="print JSON, no table")
    return result


def flatness(args: argparse.Namespace) -> None:
    """Measures all adapters; prints a table or JSON, and writes files if asked to.

    Raises `OutputError`: `--out` cannot be written; found out before anything is measured.
    """
    _check(args)
    from trainer.evaluate.drawing import png
    from trainer.flatness.measure import measure, members_and_samples, slices_figure

    members, samples = members_and_samples(args)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.out):
                pass  # it can be written
        except OSError as error:
            raise cannot_write("--out", args.out, error) from error
    results = {member.source: measure(member, samples, args) for member in members}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    text = json.dumps({"settings": settings, "adapters": results}, indent=2)
    console = output_console()
    if args.json:
        console.out(text)
    else:
        _table(results, args.rho).show(console)
    if args.out is None:
        return
    picture = args.out / "flatness.png"
    try:
        replace_text(args.out / "flatness.json", text + "\n")
        picture.write_bytes(png(slices_figure(results)))
    except OSError as error:
        raise cannot_write("--out", args.out, error) from error
    if not args.json:
        console.out(f"slices: {picture}")


def _table(results: Mapping[str, Mapping[str, Any]], rho: float) -> Table:
    columns = ("adapter", "weights", "loss", "largest eigenvalues", f"sharpness ({rho})")
    rows = []
    for name, found in results.items():
        values = " ".join(f"{value:.4g}" for value in found["eigenvalues"]) or "-"
        loss, sharpness = (f"{found[key]:.4f}" for key in ("loss", "sharpness"))
        rows.append((name, f"{found['weights']:,}", loss, values, sharpness))
    return Table(columns, rows)


def _check(args: argparse.Namespace) -> None:
    found = []
    for name, _, bound, _ in NUMBERS:
        value = getattr(args, name)
        if isinstance(value, int) and value < bound:
            found.append(f"--{name}: {value}; must be a whole number >= {bound}")
        elif isinstance(value, float) and not bound < value < float("inf"):
            found.append(f"--{name}: {value}; must be a finite number > {bound}")
    if found:
        raise ConfigError("\n".join(found))


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: flatness(args), ALONE)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
