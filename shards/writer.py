"""Image folders to shard sets, and the command line `python -m shards.writer`.

Images are stored byte for byte, shuffled once with a fixed seed so that reading a shard from front
to back already mixes the classes. Files get their final name only when complete, and `index.json`
comes last: a folder without it is an unfinished conversion, which the next run starts afresh. The
same images always give the same bytes.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import filelock

from shards.datasets import DATASETS, DatasetSpec, dataset_spec, nearest
from shards.errors import DamagedDataError, DataConfigError, OutputError
from shards.index import ShardIndex
from shards.layout import INDEX_NAME
from shards.listing import list_images
from shards.packing import ShardPacker, source_sha256

log = logging.getLogger("shards.writer")

DEFAULT_SHARD_SIZE = 1000
_LOCK_NAME = ".writer.lock"


def write_shards(
    root: Path,
    out: Path,
    spec: DatasetSpec,
    *,
    exclude: Collection[str] = (),
    shard_size: int = DEFAULT_SHARD_SIZE,
) -> ShardIndex:
    """Convert an image folder to a shard set; do nothing if that has been done already.

    Args:
        root: Folder `<domain>/<class>/**/<image>`.
        out: Folder of the shard set, made if needed.
        spec: The dataset.
        exclude: Paths relative to `root` to leave out.
        shard_size: Largest number of samples of one shard.

    Returns:
        The opened shard set.

    Raises:
        DataConfigError: If the images or the settings do not fit.
        DamagedDataError: If an image cannot be read, or `out` holds a damaged copy of this set.
        OutputError: If `out` cannot be written, is in use, or holds something else.
    """
    _check_settings(root, out, shard_size)
    listing = list_images(root, spec, exclude)
    if listing.excluded < len(set(exclude)):
        log.warning("only %d of %d excluded paths exist", listing.excluded, len(set(exclude)))
    source = source_sha256(listing, spec.name, shard_size)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / _LOCK_NAME, timeout=0):
            if _is_done(out, source):
                log.info("%s already holds this set", out)
            else:
                packer = ShardPacker(listing, out, spec.name, shard_size)
                _clear_left_overs(out, packer)
                packer.pack(source)
    except filelock.Timeout as error:
        raise OutputError(f"--out {out}: another writer is at work there") from error
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return ShardIndex.load(out)


def _check_settings(root: Path, out: Path, shard_size: int) -> None:
    """Raise on settings that cannot work, before anything is listed."""
    if shard_size < 1:
        raise DataConfigError(f"--shard-size {shard_size}: must be 1 or more")
    if out.resolve().is_relative_to(root.resolve()):
        raise DataConfigError(f"--out {out}: must not lie inside --root {root}")


def _is_done(out: Path, source: str) -> bool:
    """Tell whether `out` holds exactly this set already; refuse any other set."""
    try:
        found = json.loads((out / INDEX_NAME).read_bytes()).get("source_sha256")
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError):
        found = None
    if found != source:
        raise OutputError(
            f"--out {out}: holds another shard set; give an empty folder, or delete this one"
        )
    return True


def _clear_left_overs(out: Path, packer: ShardPacker) -> None:
    """Delete what an unfinished conversion left; refuse a folder that holds anything else."""
    names = [name for name in sorted(os.listdir(out)) if name != _LOCK_NAME]
    for name in names:
        if not packer.writes(name):
            raise OutputError(f"--out {out}: not empty, it holds {name!r}; give an empty folder")
    for name in names:
        log.info("removing %s, left over from an unfinished conversion", name)
        (out / name).unlink()


def read_exclude_list(path: Path | None) -> list[str]:
    """Read a list of images to leave out.

    Args:
        path: Text file, one path relative to the image folder per line, as in DomainNet's list of
            duplicates; None for no list.

    Returns:
        The paths, with forward slashes.

    Raises:
        DataConfigError: If the file cannot be read.
    """
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataConfigError(f"--exclude-list {path}: cannot be read ({error})") from error
    return [line.strip().removeprefix("./") for line in lines if line.strip()]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line and suggest the nearest flag."""

    def error(self, message: str) -> NoReturn:
        flag = message.rpartition("unrecognized arguments: ")[2].split()[0]
        hint = nearest(flag, list(self._option_string_actions)) if "unrec" in message else ""
        self.exit(2, f"error: {message}{hint}; see python -m shards.writer --help\n")


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = _Parser(
        prog="python -m shards.writer",
        description="Convert an image folder <domain>/<class>/<image> to a WebDataset shard set "
        "with an index, or check an existing set.",
        epilog="Exit codes: 0 done, 2 bad settings, 65 damaged data, 73 output cannot be written.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dataset", default="folder", help=f"one of {', '.join(DATASETS)} (default: folder)"
    )
    parser.add_argument("--root", type=Path, help="image folder; not needed for --dataset digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shard set")
    parser.add_argument(
        "--exclude-list", type=Path, metavar="FILE", help="images to leave out, one path per line"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=DEFAULT_SHARD_SIZE,
        metavar="N",
        help="largest number of images of one shard (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check every byte of the set in --out against its index (after converting, "
        "if --root is given too)",
    )
    parser.add_argument(
        "--deep", action="store_true", help="with --verify: also decode every image"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    """Do what the command line asks."""
    spec = dataset_spec(args.dataset, "--dataset")
    if args.deep and not args.verify:
        raise DataConfigError("--deep: only with --verify")
    exclude = read_exclude_list(args.exclude_list)
    if args.root is not None:
        log.info("listing %s", args.root)
        index = write_shards(args.root, args.out, spec, exclude=exclude, shard_size=args.shard_size)
    elif args.verify:
        index = ShardIndex.load(args.out)
    elif spec.name == "digits":
        from shards.digits import write_digits

        index = write_digits(args.out)
    else:
        raise DataConfigError("--root is not set: give the folder that holds the domain folders")
    if args.verify:
        problems = index.verify(deep=args.deep)
        for problem in problems:
            log.error("error: %s", problem)
        if problems:
            return 65
    total = sum(index.num_samples(env) for env in range(len(index.domains)))
    log.info(
        "%s: %d images, %d domains, %d classes, %d shards%s",
        args.out,
        total,
        len(index.domains),
        len(index.classes),
        len(index.shards),
        ", verified" if args.verify else "",
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _run(_parser().parse_args(argv))
    except DataConfigError as error:
        log.error("error: %s", error)
        return 2
    except DamagedDataError as error:
        log.error("error: %s", error)
        return 65
    except OutputError as error:
        log.error("error: %s", error)
        return 73
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to finish")
        return 130


if __name__ == "__main__":
    sys.exit(main())
