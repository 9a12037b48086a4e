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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from trainer.checkpoint.atomic_file import replace_text
from trainer.evaluate.flags import add_shared_flags
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError, cannot_write
from trainer.process.world import ALONE

if TYPE_CHECKING:
    from trainer.evaluate.fixed_images import FixedImages
    from trainer.evaluate.members import Member
    from trainer.flatness.surface import Surface


def parser() -> argparse.ArgumentParser:
    """The command line."""
    first = (__doc__ or "").partition("\n\n")[2]
    result = argparse.ArgumentParser(prog="python -m trainer.flatness", description=first)
    add_shared_flags(result)
    result.add_argument("--out", type=Path, help="folder for flatness.json and flatness.png")
    result.add_argument(
        "--split", choices=["in", "out"], default="out", help="their split (%(default)s)"
    )
    for flag, default, text in (
        ("--samples", 32, "samples of each domain"),
        ("--batch", 32, "images a batch; bounds memory, not the result"),
        ("--eigenvalues", 1, "largest eigenvalues of the Hessian; 0 leaves them out"),
        ("--steps", 10, "ascent steps of the sharpness"),
        ("--directions", 3, "random directions"),
        ("--points", 21, "points along each"),
        ("--seed", 0, "of samples, directions and the eigenvalues' start"),
    ):
        result.add_argument(flag, type=int, default=default, help=f"{text} (%(default)s)")
    result.add_argument(
        "--rho", type=float, default=0.5,
        help="radius of the sharpness, in relative changes of the weights (%(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--reach", type=float, default=1.0,
        help="ends of the slices; at 1 a filter is moved by its own length (%(default)s)",
    )  # fmt: skip
    result.add_argument("--json", action="store_true", help="print JSON, no table")
    return result


def flatness(args: argparse.Namespace) -> None:
    """Measures all adapters; prints a table or JSON, and writes files if asked to.

    Raises:
        OutputError: `--out` cannot be written; found out before anything is measured.
    """
    _check(args)
    members, samples = plan(args)
    if args.out is not None:
        _make_folder(args.out)
    results = {member.source: measure(member, samples, args) for member in members}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    text = json.dumps({"settings": settings, "adapters": results}, indent=2)
    console = Console()
    if args.json:
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(_table(results, args.rho))
    if args.out is None:
        return
    try:
        replace_text(args.out / "flatness.json", text + "\n")
        plot(results, args.out / "flatness.png")
    except OSError as error:
        raise cannot_write("--out", args.out, error) from error
    if not args.json:
        console.print(f"slices: {args.out / 'flatness.png'}", soft_wrap=True, markup=False)


def _make_folder(folder: Path) -> None:
    """Makes the folder of `--out`, and tries whether a file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write("--out", folder, error) from error


def _table(results: Mapping[str, Mapping[str, Any]], rho: float) -> Table:
    table = Table(Column("adapter", overflow="fold"), "weights", "loss", "largest eigenvalues")
    table.add_column(f"sharpness ({rho})")
    for name, found in results.items():
        values = " ".join(f"{value:.4g}" for value in found["eigenvalues"]) or "-"
        loss, sharpness = (f"{found[key]:.4f}" for key in ("loss", "sharpness"))
        table.add_row(escape(name), f"{found['weights']:,}", loss, values, sharpness)
    return table


def _check(args: argparse.Namespace) -> None:
    low = {"samples": 1, "batch": 1, "eigenvalues": 0, "steps": 1, "directions": 0, "points": 2}
    found = [
        f"--{name}: {getattr(args, name)}; must be a whole number >= {least}"
        for name, least in (low | {"seed": 0}).items()
        if getattr(args, name) < least
    ]
    found += [
        f"--{name}: {getattr(args, name)}; must be a finite number > 0"
        for name in ("rho", "reach")
        if not 0 < getattr(args, name) < float("inf")
    ]
    if found:
        raise ConfigError("\n".join(found))


def measure(member: "Member", samples: "FixedImages", args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one adapter."""
    import numpy as np

    from trainer.flatness.surface import (
        adaptive_sharpness,
        random_direction,
        slice_along,
        top_eigenvalues,
    )

    surface = surface_of(member, samples, args)
    loss = surface.loss(surface.weights)
    eigenvalues: list[float] = []
    products = 0
    if args.eigenvalues:
        eigenvalues, products = top_eigenvalues(surface, args.eigenvalues, args.seed)
    places = np.linspace(-args.reach, args.reach, args.points).tolist()
    slices = [
        slice_along(surface, random_direction(surface, args.seed + number), places)
        for number in range(args.directions)
    ]
    return {
        "weights": len(surface.weights),
        "samples": surface.number,
        "loss": loss,
        "eigenvalues": eigenvalues,
        "hessian_products": products,
        "sharpness": adaptive_sharpness(surface, args.rho, args.steps),
        "places": places,
        "slices": slices,
    }


def plan(args: argparse.Namespace) -> tuple[list["Member"], "FixedImages"]:
    """The adapters and the samples they are measured on, drawn by the seed."""
    import numpy as np

    from shards.stream.evaluation import split_ranks
    from trainer.evaluate.data import open_data
    from trainer.evaluate.fixed_images import fixed_images
    from trainer.evaluate.members import read_members

    members = read_members(args.adapter)
    data = open_data(args, members)
    for warning in data.warnings:
        Console(stderr=True).print(f"warning: {warning}", markup=False, soft_wrap=True)
    places = []
    for env in data.envs:
        ranks = np.sort(
            split_ranks(
                data.index, env, args.split, trial_seed=data.trial_seed,
                holdout_fraction=data.config.holdout_fraction,
            )
        )  # fmt: skip
        chosen = np.random.default_rng((args.seed, env)).permutation(len(ranks))[: args.samples]
        places += [(env, int(ranks[place])) for place in sorted(chosen.tolist())]
    if not places:
        raise ConfigError(f"--split: {args.split} has no sample in the domains asked for")
    return members, fixed_images(data.index, places, members[0].info.data_config, data.decoder)


def surface_of(member: "Member", samples: "FixedImages", args: argparse.Namespace) -> "Surface":
    """The loss around an adapter, in fp32, over the samples."""
    import torch

    from trainer.evaluate.combine import models_on
    from trainer.evaluate.members import base_of
    from trainer.flatness.surface import Surface

    backbone = base_of(member, args.weights)
    (model,) = models_on(backbone.model, [(member.label, member.info, member.tensors)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.tensor(samples.labels)
    parts = [slice(start, start + args.batch) for start in range(0, len(labels), args.batch)]
    batches = [(samples.images[part].to(device), labels[part].to(device)) for part in parts]
    return Surface(model.to(device), batches)


def plot(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """The losses along the random directions, one colour for each adapter."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (name, found) in enumerate(results.items()):
        for line, losses in enumerate(found["slices"]):
            label = name if line == 0 else None
            axes.plot(found["places"], losses, color=f"C{number}", alpha=0.8, label=label)
    axes.set_xlabel("step along a direction with the weights' filter norms")
    axes.set_ylabel("mean cross-entropy")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: flatness(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
