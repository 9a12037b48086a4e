"""`python -m trainer.predict --adapter A [B C ...] --images FOLDER --out FILE`: unlabelled images.

The most probable classes of every image, with their probabilities; several adapters are an
ensemble. An image that cannot be used is listed with what is wrong with it. Under `torchrun` or
`srun` the images are shared out among the processes.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.command_line import command_parser
from trainer.engine.leaving import conclude_together
from trainer.evaluate import flags
from trainer.process.ending import leave
from trainer.process.errors import ConfigError
from trainer.process.world import World

if TYPE_CHECKING:
    from trainer.predict.images import Images
    from trainer.predict.job import Prediction

SHOWN = 10
"""Images with a problem that are named on the terminal; the file names all."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.predict", __doc__, allow_abbrev=False)
    flags.add_adapter_flag(result)
    add = result.add_argument
    add(
        "--images", required=True, metavar="PLACE",
        help="a folder, a list of image files, a shard set, or one image",
    )  # fmt: skip
    add(
        "--out", type=Path, required=True, metavar="FILE",
        help="what is written: a file that ends in .csv, .jsonl or .parquet",
    )  # fmt: skip
    add("--top_k", type=int, default=5, help="classes of each image (%(default)s)")
    add(
        "--average", choices=["probabilities", "logits"], default="probabilities",
        help="what an ensemble takes the mean of (%(default)s)",
    )  # fmt: skip
    add("--routes", action="store_true", help="write the experts of every token, layer by layer")
    flags.add_weights_flag(result)
    flags.add_size_flag(result)
    flags.add_pace_flags(result)
    flags.add_decoding_flags(add)
    return result


def run(args: argparse.Namespace, world: World) -> None:
    """Predicts, on all ranks; the main one writes the file."""
    # Heavy imports come after the command line has proved legal.
    from trainer.predict.job import predict
    from trainer.predict.output import check_target, part_of, read_parts, save

    check_target(args.out)
    places = ("images", "adapter", "out", "launcher")
    options = {name: value for name, value in vars(args).items() if name not in places}
    job = predict(args.images, args.adapter, world=world, **options)
    rows: Iterable[Prediction] = job
    if world.size > 1:
        from trainer.engine import collectives  # imports deepspeed, which takes seconds
        from trainer.process.device import device_of

        collectives.start(world)
        save(job, part_of(args.out, world.rank), job.top_k, job.routes)
        collectives.sum_numbers([0.0], device_of(world))  # all are done
        rows = read_parts(args.out, world.size)
    if world.is_main:
        save(_told(rows, job.images, args.out), args.out, job.top_k, job.routes)


def _told(rows: Iterable["Prediction"], images: "Images", out: Path) -> Iterator["Prediction"]:
    """The rows as they are, with a word on those that have a problem.

    Raises:
        ConfigError: they are not as many as the images.
        DamagedDataError: no image can be used; a wrong list shall not pass for a result.
    """
    from shards.errors import DamagedDataError
    from trainer.predict.output import plain

    number = predicted = 0
    problems: list[str] = []
    for row in rows:
        number, predicted = number + 1, predicted + bool(row.classes)
        if row.problem:
            problems.append(plain(f"{row.image}: {row.problem}"))
            if len(problems) <= SHOWN:
                sys.stderr.write(f"warning: {problems[-1]}\n")
        yield row
    if number != len(images.names):
        raise ConfigError(
            f"--images: {number} images instead of {len(images.names)}: the processes found "
            "different ones; let nothing change there meanwhile"
        )
    if not predicted:
        raise DamagedDataError(
            f"--images: none of {number} images can be used ({problems[0]}); paths in a list count "
            "from the current folder"
        )
    more = f", {len(problems)} with a problem that the file names" if problems else ""
    if images.passed_over:
        more += f"; files that are no images by their names: {images.passed_over}"
    sys.stdout.write(f"{out}: {predicted} of {number} images predicted{more}\n")


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude_together(lambda world: run(args, world))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
