"""`python -m trainer.evaluate --adapter A [B C ...]`: accuracy and calibration on every domain.

Adapters are loaded into one freshly created backbone; nothing of the training runs is needed. From
several, an ensemble (the mean of what they predict) or a soup (the mean of their weights) is made.
Under `torchrun` or `srun` the images are shared out among the processes; the counts stay exact.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.config import DataConfig
from trainer.config.command_line import command_parser
from trainer.engine.leaving import conclude_together
from trainer.evaluate.flags import add_pace_flags, add_shared_flags, add_size_flag
from trainer.process.ending import leave
from trainer.process.world import World


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.evaluate", __doc__, allow_abbrev=False)
    add_shared_flags(result)
    add_size_flag(result)
    add = result.add_argument
    add(
        "--combine", nargs="+", choices=["each", "ensemble", "soup"], default=None,
        help="from several adapters: each alone, their ensemble (which shows each as well), their "
        "soup; one or more of these (ensemble)",
    )  # fmt: skip
    add(
        "--average", choices=["probabilities", "logits"], default="probabilities",
        help="what an ensemble takes the mean of (%(default)s)",
    )  # fmt: skip
    add("--split", choices=["both", "in", "out", "all"], default="both", help="(in and out)")
    add("--save", type=Path, metavar="FOLDER", help="write the soup as an adapter")
    add("--output", type=Path, metavar="FOLDER", help="write evaluation.json, tables and pictures")
    add("--json", action="store_true", help="print one JSON line per result, no table")
    add_pace_flags(result)
    limit = DataConfig().max_bad_fraction
    add(
        "--data.max_bad_fraction", dest="max_bad_fraction", type=float, default=limit,
        help="largest share of unusable images (%(default)s)",
    )  # fmt: skip
    return result


def run(args: argparse.Namespace, world: World) -> None:
    """Evaluates, on all ranks, and reports on the main one."""
    # Heavy imports come after the command line has proved legal.
    from trainer.evaluate.job import evaluate, prepare
    from trainer.evaluate.output import report

    job = prepare(args)
    if world.size == 1:
        report(evaluate(job, world, lambda value: value), args)
        return
    from trainer.engine import collectives  # imports deepspeed, which takes seconds

    collectives.start(world)
    found = evaluate(job, world, collectives.sum_over_ranks)
    if world.is_main:
        report(found, args)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude_together(lambda world: run(args, world))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
