"""The command line `python -m shards.writer`: image folders to shard sets, and their check."""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Sequence

from shards.command_line import EXIT_CODES, Parser, path, run_command
from shards.config import MAX_PIXELS
from shards.datasets import DATASETS, DatasetSpec, dataset_spec, nearest
from shards.errors import DataConfigError
from shards.opening import check_dataset
from shards.read.index import ShardIndex
from shards.read.subset import read_list
from shards.stream.split import split_domain
from shards.write.conversion import (
    DEFAULT_SHARD_BYTES,
    DEFAULT_SHARD_SIZE,
    check_at_least_one,
    write_shards,
)
from shards.write.extension import extend_shards
from shards.write.row_files import READERS, row_source
from shards.write.rows import USUAL, Rows
from shards.write.set_name import name_set
from shards.write.survey import (
    class_counts,
    counts_table,
    find_look_alikes,
    imbalances,
    survey,
    told,
)
from shards.write.verify import verify_shards
from shards.write.worker_pool import default_jobs

log = logging.getLogger("shards.writer")

__all__ = ["main", "write_shards"]


def _byte_count(text: str) -> int:
    """Read a number of bytes such as `512M`."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 512M or 2G")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    result = Parser(
        prog="python -m shards.writer",
        description="Convert images to a WebDataset shard set with an index, or check an existing "
        "set. They lie in folders <domain>/<class>/, or as --format says.",
        epilog=f"{EXIT_CODES}, 130 interrupted.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--dataset",
        help=f"one of {', '.join(DATASETS)} (default: folder; with --verify alone: what the index "
        f"says); {', '.join(READERS)} stand for folder in that --format",
    )
    add("--root", type=path, help="folder of the images; not needed for --dataset digits")
    add("--format", choices=["folder", *READERS], default="folder",
        help="how the images lie there (default: %(default)s)")  # fmt: skip
    add("--columns", nargs="+", default=[], metavar="ROLE=COLUMN",
        help=f"where another format has {', '.join(USUAL)}, if not where it is usual")  # fmt: skip
    add("--out", type=path, required=True, help="folder of the shard set")
    add("--name", help="what tables and cards shall call this set; without --root one that exists")
    add("--exclude_list", type=path, metavar="FILE",
        help="images to leave out, one path per line")  # fmt: skip
    add(
        "--extend", nargs="+", default=[], metavar="DOMAIN",
        help="add these domains of --root to the set in --out, whose own files stay as they are",
    )  # fmt: skip
    add(
        "--group_by", metavar="PATTERN",
        help="regular expression searched in <domain>/<class>/<image>; images for which it, or "
        "what is in its parentheses, matches the same text stay on one side of the split",
    )  # fmt: skip
    add(
        "--quick", action="store_true",
        help="do not look for images that are there twice, for which all are decoded",
    )  # fmt: skip
    add(
        "--shard_size", type=int, default=DEFAULT_SHARD_SIZE, metavar="N",
        help="largest number of images of one shard (default: %(default)s)",
    )  # fmt: skip
    add(
        "--shard_bytes", type=_byte_count, default=DEFAULT_SHARD_BYTES, metavar="SIZE",
        help="largest size of a shard of several images, with K, M, G or T for powers of 1024 "
        "(default: 512M)",
    )  # fmt: skip
    add(
        "--jobs", type=int, default=default_jobs(), metavar="N",
        help="processes; changes speed, never the result (default: the usable CPU cores)",
    )  # fmt: skip
    add(
        "--verify", action="store_true",
        help="check every byte of the set in --out against its index (after converting, "
        "if --root is given too)",
    )  # fmt: skip
    add("--deep", action="store_true", help="with --verify: also decode every image")
    add(
        "--max_pixels", type=int, default=MAX_PIXELS, metavar="N",
        help="when images are decoded, those with more are too large, as data.max_pixels says in "
        "training (default: %(default)s)",
    )  # fmt: skip
    return result


def _source(args: argparse.Namespace) -> Rows | None:
    """The source that `--format` and `--columns` describe; None for an image folder."""
    columns = dict(word.partition("=")[::2] for word in args.columns)
    if args.columns and args.format == "folder":
        raise DataConfigError(f"--columns: not with --format folder; legal: {', '.join(READERS)}")
    for role in columns:
        if role not in USUAL:
            raise DataConfigError(
                f"--columns {role}=: legal: {', '.join(USUAL)}{nearest(role, list(USUAL))}"
            )
    return None if args.format == "folder" else row_source(args.format, args.root, columns)


def _open(args: argparse.Namespace, spec: DatasetSpec) -> ShardIndex:
    """Write the set the command line asks for, or open the one that is to be verified."""
    exclude = []
    if args.exclude_list is not None:
        exclude = read_list(f"--exclude_list {args.exclude_list}", args.exclude_list)
    if args.root is not None:
        log.info("listing %s", args.root)
        options = {
            "exclude": exclude, "shard_size": args.shard_size, "shard_bytes": args.shard_bytes,
            "jobs": args.jobs, "source": _source(args), "group_by": args.group_by,
        }  # fmt: skip
        if not args.extend:
            return write_shards(args.root, args.out, spec, name=args.name, **options)
        index = extend_shards(args.root, args.out, spec, args.extend, **options)
        return index if args.name is None else _named(args)
    for flag in ("extend", "group_by"):
        if getattr(args, flag):
            raise DataConfigError(f"--{flag}: give the folder of the images, too, with --root")
    if spec.name == "digits" and not args.verify:
        from shards.embedded.digits import write_digits

        write_digits(args.out).close()
    elif not args.verify and args.name is None:
        raise DataConfigError("--root is not set: give the folder that holds the domain folders")
    index = ShardIndex.load(args.out, dataset=spec.name)
    if args.dataset is not None:
        check_dataset(index, spec, "--dataset")
    return index if args.name is None else _named(args)


def _named(args: argparse.Namespace) -> ShardIndex:
    name_set(args.out, args.name)
    return ShardIndex.load(args.out)


def _tell(index: ShardIndex, args: argparse.Namespace) -> None:
    """Say what a set that was just written holds, and what is odd about it."""
    counts = class_counts(index)
    log.info("%s", counts_table(index, counts))
    for line in imbalances(index, counts):
        log.warning("%s", line)
    if args.quick:
        return
    seen = survey(index, args.jobs, args.max_pixels)
    held_out = [split_domain(index, domain, 0, 0.2)[1] for domain in range(len(index.domains))]
    if said := told(index, find_look_alikes(index, seen, held_out), 0):
        log.warning(
            "%s; `python -m shards.preview --root %s` lists them, --exclude_list leaves some out, "
            "--group_by keeps what belongs together on one side", said, shlex.quote(str(args.out)),
        )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    """Do what the command line asks."""
    if args.dataset in READERS:
        args.dataset, args.format = "folder", args.dataset
    spec = dataset_spec(args.dataset or "folder", "--dataset", [*READERS])
    if args.deep and not args.verify:
        raise DataConfigError("--deep: only with --verify")
    check_at_least_one(jobs=args.jobs, max_pixels=args.max_pixels)
    index = _open(args, spec)
    total = sum(shard.samples for shard in index.shards)
    if args.root is not None or (spec.name == "digits" and not args.verify):
        _tell(index, args)
    if args.verify:
        report = verify_shards(index, deep=args.deep, jobs=args.jobs, max_pixels=args.max_pixels)
        for problem in report.problems:
            log.error("error: %s", problem)
        if report.bad_images:
            log.warning("%d of %d images cannot be used as they are", report.bad_images, total)
        if report.problems:
            return 65
    log.info(
        "%s%s: %d images, %d domains (%s), %d classes, %d shards%s",
        args.out,
        "" if index.name == index.dataset else f" ({index.name})",
        total,
        len(index.domains),
        ", ".join(map(shlex.quote, index.domains)),  # as a shell takes them for data.held_out
        len(index.classes),
        len(index.shards),
        ", verified" if args.verify else "",
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, of this process unless `argv` is given; gives the exit code."""
    return run_command(lambda: _run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
